"""qk_norm_rope: the reference against plain statements of the formula, and the rules of an op."""

import math
from fractions import Fraction

import pytest
import torch
from rope_cases import check_against_reference, check_empty, make, with_gradients

import raven
from raven import backends, rows
from raven.ops import qk_norm_rope
from raven.ops.qk_norm_rope import _qk_norm_rope, _qk_norm_rope_backward
from raven.reference import qk_norm_rope as reference

# The reference against the formula


def by_complex_numbers(x, weight, positions, eps=1e-6, theta=10000.0):
    """The formula of Wan for one tensor [L, H, D] in float64: one axis after the other, as complex numbers."""
    L, H, D = x.shape
    rows = x.reshape(L, H * D)
    rows = rows / torch.sqrt((rows**2).mean(-1, keepdim=True) + eps) * weight
    pairs = torch.view_as_complex(rows.view(L, H, D // 2, 2).contiguous())
    third = D // 2 // 3
    turned = []
    for axis, part in enumerate(pairs.split([D // 2 - 2 * third, third, third], dim=-1)):
        width = 2 * part.shape[-1]
        frequency = torch.tensor([theta ** (-2 * i / width) for i in range(part.shape[-1])], dtype=torch.float64)
        angle = positions[:, axis, None].double() * frequency
        turned.append(part * torch.polar(torch.ones_like(angle), angle)[:, None])
    return torch.view_as_real(torch.cat(turned, dim=-1)).flatten(-2)


@pytest.mark.parametrize("D", [4, 16, 32, 128])
def test_reference_is_the_formula(D):
    q, k, q_weight, k_weight, positions = make(L=4, D=D, dtype=torch.float64, frames=100_000)
    q_out, k_out = qk_norm_rope(q, k, q_weight, k_weight, positions)
    for b in range(2):
        torch.testing.assert_close(q_out[b], by_complex_numbers(q[b], q_weight, positions[b]), rtol=0, atol=1e-10)
        torch.testing.assert_close(k_out[b], by_complex_numbers(k[b], k_weight, positions[b]), rtol=0, atol=1e-10)


def test_wan_split():
    assert [2 * n for n in reference.axis_pairs(128)] == [44, 42, 42]


def test_scores_depend_on_relative_positions_only():
    """What rotary is for: moving all positions by the same amount changes no score, at 100,000 frames too."""
    q, k, *weights, positions = make(B=1, Hk=4, dtype=torch.float64)
    moved = positions + torch.tensor([100_000, 7, -3], dtype=torch.int32)
    here, there = (torch.einsum("blhd,bmhd->bhlm", *qk_norm_rope(q, k, *weights, p)) for p in (positions, moved))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)
    assert not torch.allclose(qk_norm_rope(q, k, *weights, moved)[0], qk_norm_rope(q, k, *weights, positions)[0])


def test_norm_covers_all_heads_or_each():
    q, k, *_, positions = make(H=3, Hk=3, dtype=torch.float64)
    ones, one = torch.ones(48, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    full, _ = qk_norm_rope(q, k, ones, ones, positions, eps=0.0)
    each, _ = qk_norm_rope(q, k, one, one, positions, eps=0.0, per_head=True)
    # A rotation keeps lengths, so the mean square is 1 over what the norm covered.
    torch.testing.assert_close((full**2).mean(dim=(2, 3)), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close((each**2).mean(dim=3), torch.ones(2, 5, 3, dtype=torch.float64))
    assert (full**2).mean(dim=3).std() > 0.01


def test_no_weight_is_rotation_only():
    q, k, q_weight, k_weight, positions = make(dtype=torch.float64)
    normed = reference.norm(q, q_weight, 1e-6, False)
    expected, _ = qk_norm_rope(q, k, q_weight, k_weight, positions)
    rotated, k_rotated = qk_norm_rope(normed, k, None, None, positions)
    torch.testing.assert_close(rotated, expected)
    torch.testing.assert_close(k_rotated.norm(dim=-1), k.norm(dim=-1))


def test_positions_may_be_shared():
    *tensors, positions = make()
    shared = qk_norm_rope(*tensors, positions[1])
    spread = qk_norm_rope(*tensors, positions[1].expand(2, 5, 3))
    assert all(torch.equal(a, b) for a, b in zip(shared, spread, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
def test_reference_rounds_once(dtype, per_head):
    check_against_reference(make(dtype=dtype, per_head=per_head, frames=100_000), per_head)


# The op


@pytest.mark.parametrize(("weights", "per_head"), [(True, False), (True, True), (False, False)])
def test_gradcheck(weights, per_head):
    *leaves, positions = make(B=1, L=3, H=2, Hk=1, D=6, dtype=torch.float64, weights=weights, per_head=per_head)
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, positions, per_head=per_head), leaves)


@pytest.mark.parametrize(("weights", "per_head"), [(True, False), (True, True), (False, False)])
def test_opcheck(weights, per_head):
    *leaves, positions = make(B=1, L=3, D=6, weights=weights, per_head=per_head)
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    torch.library.opcheck(_qk_norm_rope, (*leaves, positions, 1e-6, 1e4, per_head))
    plain = [x if x is None else x.detach() for x in leaves]
    grads = [torch.randn_like(x) for x in plain[:2]]
    for weight_grad in (True, False):
        torch.library.opcheck(_qk_norm_rope_backward, (*grads, *plain, positions, 1e-6, 1e4, per_head, weight_grad))


def test_compiles_to_one_graph():
    arguments = make()
    eager = with_gradients(arguments)[:2]

    def f(*x):
        q, k = qk_norm_rope(*x)
        return q * 2, k + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in arguments]
    q, k = compiled(*leaves)
    assert torch.equal(q, eager[0][0] * 2) and torch.equal(k, eager[0][1] + 1)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator) for x in (q, k)]
    gradients = torch.autograd.grad((q, k), leaves[:4], (grads[0] / 2, grads[1]))
    for got, want in zip(gradients, eager[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_gradients_only_where_asked():
    q, k, q_weight, k_weight, positions = make()
    q.requires_grad_()
    qk_norm_rope(q, k, q_weight, k_weight, positions)[0].sum().backward()
    assert q.grad.abs().max() > 0 and q_weight.grad is None
    # A loss on keys alone reaches the queries as zeros.
    (grad,) = torch.autograd.grad(qk_norm_rope(q, k.requires_grad_(), None, k_weight, positions)[1].sum(), q)
    assert torch.equal(grad, torch.zeros_like(q))


@pytest.mark.parametrize("shape", [{"L": 0}, {"B": 0}])
def test_empty(shape):
    check_empty(shape)


ERRORS = [
    (ValueError, "q: got shape", lambda a: a | {"q": a["q"][0]}),
    (ValueError, "k: got shape", lambda a: a | {"k": a["k"][:, :4]}),
    (ValueError, "head dim 15", lambda a: a | {"q": a["q"][..., :15], "k": a["k"][..., :15]}),
    (ValueError, "expected at least 1", lambda a: a | {"k": a["k"][:, :, :0]}),
    (TypeError, "q: got dtype int32", lambda a: a | {"q": a["q"].int()}),
    (TypeError, "k: got dtype float16, expected float32", lambda a: a | {"k": a["k"].half()}),
    (ValueError, "q_weight: got shape", lambda a: a | {"q_weight": a["q_weight"][:16]}),
    (ValueError, "k_weight: got shape", lambda a: a | {"k_weight": a["k_weight"].view(2, 16)}),
    (TypeError, "k_weight: got dtype int64", lambda a: a | {"k_weight": a["k_weight"].long()}),
    (ValueError, "positions: got shape", lambda a: a | {"positions": a["positions"][..., :2]}),
    (TypeError, "positions: got dtype int64, expected int32", lambda a: a | {"positions": a["positions"].long()}),
    (ValueError, "positions: got device meta", lambda a: a | {"positions": a["positions"].to("meta")}),
    (ValueError, "eps: got -1", lambda a: a | {"eps": -1.0}),
    (ValueError, "theta: got inf", lambda a: a | {"theta": math.inf}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    arguments = dict(zip(("q", "k", "q_weight", "k_weight", "positions"), make(), strict=True))
    with pytest.raises(error, match=message):
        qk_norm_rope(**change(arguments))


@pytest.mark.parametrize(("D", "dtype", "reason"), [(16, torch.float64, "float64"), (24, torch.float32, "head dim 24")])
def test_triton_by_name_is_not_replaced(triton_backend, D, dtype, reason):
    arguments = make(D=D, dtype=dtype)
    assert reason in raven.explain("qk_norm_rope", *arguments[:4]).reasons["triton"]
    with pytest.raises(raven.BackendUnavailableError, match=reason):
        qk_norm_rope(*arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"D": 24}, "head dim 24"),
        ({"H": 65, "D": 128, "dtype": torch.bfloat16}, "q has 8320 channels in a token, more than 8192"),
        ({"Hk": 33, "D": 256}, "k has 8448 channels in a token, more than 8192"),
        ({"D": 64}, "the tensors are on cpu"),
    ],
    ids=str,
)
def test_cuda_says_what_it_cannot_take(change, reason):
    assert reason in raven.explain("qk_norm_rope", *make(**change)[:4]).reasons["cuda"]


def test_rows_are_read_in_place_where_they_are_aligned():
    """What the CUDA kernels read in 16-byte pieces: packed heads, every row at a multiple of 16 bytes."""
    q = torch.randn(2, 3, 4, 16)
    fused = torch.randn(2, 3, 3 * 64)
    in_place = (q, fused[..., 64:128].view(2, 3, 4, 16), q[:, 1:], q[:, :1].expand(2, 3, 4, 16))
    assert all(rows.aligned_rows(x) is x for x in in_place)
    shifted = fused[..., 1:65].view(2, 3, 4, 16)
    for x in (shifted, q.transpose(1, 2).contiguous().transpose(1, 2), q[..., 8:].half()[..., :4]):
        copy = rows.aligned_rows(x)
        assert copy is not x and rows.are_aligned(copy) and torch.equal(copy, x)


def test_frequencies_in_fixed_point():
    """position * table, modulo 2^64, is the angle in turns: what the kernels multiply, held against exact fractions."""
    from raven.rows import frequency_table

    table = frequency_table(128, 10000.0, torch.device("cpu")).tolist()
    for frequency, entry in zip(reference.frequencies(128, 10000.0), table, strict=True):
        turns = Fraction(frequency) / Fraction("6.283185307179586476925286766559005768")
        for position in (1, 1025, 100_000, -7, 2**31 - 1):
            error = (Fraction(position * entry, 2**64) - position * turns) % 1
            assert min(error, 1 - error) < max(1, abs(position)) * Fraction(1, 2**53)


def test_registered():
    assert "qk_norm_rope" in backends.operators()


def test_forward_mode_derivative_is_not_dropped():
    x = torch.randn(1, 3, 2, 16)
    with pytest.raises(NotImplementedError, match="qk_norm_rope: forward-mode derivatives"):
        torch.func.jvp(lambda x: qk_norm_rope(x, x, None, None, torch.zeros(3, 3, dtype=torch.int32)), (x,), (x,))


def test_compiles_with_dynamic_shapes():
    rotate = torch.compile(
        lambda q, p: qk_norm_rope(q, q, None, None, p)[0], fullgraph=True, dynamic=True, backend="eager"
    )
    for length in (3, 5):
        q, positions = torch.randn(1, length, 2, 16), torch.arange(3 * length, dtype=torch.int32).view(length, 3)
        torch.testing.assert_close(rotate(q, positions), qk_norm_rope(q, q, None, None, positions)[0])
