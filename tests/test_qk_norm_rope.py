"""qk_norm_rope: the reference against plain statements of the formula, the Triton kernels against the reference."""

import functools
import math
from fractions import Fraction

import pytest
import torch

import raven
from raven import backends, native, rows
from raven.ops import qk_norm_rope
from raven.ops.qk_norm_rope import _qk_norm_rope, _qk_norm_rope_backward
from raven.reference import qk_norm_rope as reference

EVERY_GPU_BACKEND = True
# Unit roundoff of each dtype, and room for the float32 arithmetic before that one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
ARITHMETIC = 2e-6


def make(B=2, L=5, H=4, Hk=2, D=16, dtype=torch.float32, per_head=False, weights=True, device="cpu", frames=40):
    """Arguments of the op; positions are not in order and reach ``frames``."""
    q = torch.randn(B, L, H, D, dtype=dtype, device=device)
    k = torch.randn(B, L, Hk, D, dtype=dtype, device=device)
    dtype = torch.float32 if dtype != torch.float64 else dtype
    q_weight = torch.rand(D if per_head else H * D, dtype=dtype, device=device) + 0.5 if weights else None
    k_weight = torch.rand(D if per_head else Hk * D, dtype=dtype, device=device) + 0.5 if weights else None
    sizes = torch.tensor([frames, 30, 52])
    positions = (torch.rand(B, L, 3) * sizes).int().to(device)
    return [q, k, q_weight, k_weight, positions]


def in_double(arguments):
    return [x.detach().double() if x is not None and x.is_floating_point() else x for x in arguments]


def assert_rounded(got, want):
    """``got`` is the float64 ``want``, computed in float32 and rounded once to its own dtype."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    slack = 1.01 * ROUNDING[got.dtype] * want.abs() + ARITHMETIC * want.abs().max() + 2.0**-25
    excess = (got.double() - want).abs() - slack
    assert excess.max() <= 0, f"error above the rounding of {got.dtype} by {excess.max():.2e}"


def with_gradients(arguments, per_head=False):
    """Outputs and the gradients of every float argument, for fixed gradients of the outputs."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
    outputs = qk_norm_rope(*leaves, per_head=per_head)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, grads)), grads


def expected_with_gradients(arguments, grads, per_head=False):
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in in_double(arguments)]
    outputs = reference.qk_norm_rope(*leaves, per_head=per_head)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, [g.double() for g in grads]))


def check_against_reference(arguments, per_head=False):
    outputs, gradients, grads = with_gradients(arguments, per_head)
    expected, expected_gradients = expected_with_gradients(arguments, grads, per_head)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert_rounded(got, want)


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
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in make(**shape)]
    q, k = qk_norm_rope(*leaves)
    assert q.shape == leaves[0].shape and k.shape == leaves[1].shape
    (q.sum() + k.sum()).backward()
    assert torch.equal(leaves[2].grad, torch.zeros_like(leaves[2]))


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


# Triton in its interpreter


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def configured():
    """Change ``CONFIGS`` for one test."""
    from raven.kernels import qk_norm_rope as kernels

    before = {kind: dict(config) for kind, config in kernels.CONFIGS.items()}

    def change(kind, **values):
        kernels.CONFIGS[kind].update(values)
        kernels.plan.cache_clear()

    yield change
    for kind, config in before.items():
        change(kind, **config)


def strided(arguments):
    """The same q and k as slices of one wider tensor, as a fused projection gives them."""
    q, k, *rest = arguments
    fused = torch.cat((q.flatten(2), k.flatten(2), k.flatten(2)), dim=2)
    width = q.shape[2] * q.shape[3]
    return [fused[..., :width].view_as(q), fused[..., width : width + k[0, 0].numel()].view_as(k), *rest]


INTERPRETED = [
    {"H": 3, "Hk": 3, "D": 32},
    {"H": 5, "Hk": 1, "dtype": torch.float16},
    {"H": 3, "Hk": 2, "D": 32, "per_head": True},
    {"B": 1, "L": 3, "H": 12, "Hk": 3, "D": 64},  # q in parts of 8 and 4 heads, k with one of four masked
    {"weights": False},
]


@pytest.mark.interpret
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(triton_backend, poisoned, configured, case):
    configured("forward", tokens=2)  # the last program of an odd number of tokens has one to do
    check_against_reference(strided(make(**{"L": 3, "frames": 100_000} | case)), case.get("per_head", False))


@pytest.mark.interpret
def test_interpreted_alone_as_in_batch(triton_backend):
    check_alone_as_in_batch(make(L=2))


@pytest.mark.interpret
def test_interpreted_empty(triton_backend):
    test_empty({"L": 0})


@pytest.mark.interpret
def test_interpreter_refuses_bfloat16(triton_backend):
    with pytest.raises(raven.BackendUnavailableError, match="bfloat16"):
        qk_norm_rope(*make(dtype=torch.bfloat16))


def check_alone_as_in_batch(arguments):
    outputs, gradients, _ = with_gradients(arguments)
    q, k, q_weight, k_weight, positions = arguments
    last = (q[1:, -1:], k[1:, -1:], q_weight, k_weight, positions[1:, -1:])
    for got, want in zip(qk_norm_rope(*last), outputs, strict=True):
        assert torch.equal(got, want[1:, -1:])
    again = with_gradients(arguments)
    for got, want in zip(again[0] + again[1], outputs + gradients, strict=True):
        assert torch.equal(got, want)


# On a GPU

on_gpu = functools.partial(make, device="cuda", frames=100_000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        {"L": 1563, "H": 12, "Hk": 12, "D": 128},
        {"L": 77, "H": 40, "Hk": 40, "D": 128},
        {"L": 133, "H": 24, "Hk": 4, "D": 64, "per_head": True},
        {"L": 130, "H": 7, "Hk": 7, "D": 256},
        {"L": 129, "H": 4, "Hk": 4, "D": 32},
        {"L": 129, "H": 12, "Hk": 3, "D": 128, "weights": False},
        {"L": 65, "H": 5, "Hk": 3, "D": 16},
        {"L": 66, "H": 8, "Hk": 8, "D": 256, "per_head": True},
        {"B": 1, "L": 1, "H": 16, "Hk": 16, "D": 128},
    ],
    ids=str,
)
def test_gpu(poisoned, dtype, case):
    check_against_reference(strided(on_gpu(dtype=dtype, **case)), case.get("per_head", False))


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16])
def test_gpu_weights_of_two_bytes(weight):
    q, k, q_weight, k_weight, positions = on_gpu(L=300, H=6, Hk=6, D=128, dtype=torch.bfloat16)
    check_against_reference([q, k, q_weight.to(weight), k_weight.to(weight), positions])


@pytest.mark.gpu
def test_gpu_unaligned_rows_are_copied():
    """Rows that do not begin at a multiple of 16 bytes."""
    arguments = on_gpu(L=33, H=3, Hk=3, D=64, dtype=torch.bfloat16)
    expected = with_gradients(arguments)
    for i in range(2):
        wide = torch.nn.functional.pad(arguments[i].flatten(2), (1, 2))
        arguments[i] = wide[..., 1:-2].view_as(arguments[i])
    got = with_gradients(arguments)
    for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_empty():
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in on_gpu(L=0)]
    q, k = qk_norm_rope(*leaves)
    (q.sum() + k.sum()).backward()
    assert torch.equal(leaves[2].grad, torch.zeros_like(leaves[2]))


@pytest.mark.gpu
def test_gpu_nan_stays_in_its_token():
    arguments = on_gpu(L=50, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    clean = qk_norm_rope(*arguments)
    arguments[0][0, 7, 3, 5] = math.nan
    q, k = qk_norm_rope(*arguments)
    assert q[0, 7].isnan().all() and torch.equal(k, clean[1])
    others = torch.ones(2, 50, dtype=torch.bool, device="cuda")
    others[0, 7] = False
    assert torch.equal(q[others], clean[0][others])


@pytest.mark.gpu
def test_gpu_in_a_graph():
    """Captured once, replayed on other numbers: forward and backward."""
    arguments = on_gpu(L=400, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    new = on_gpu(L=400, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    expected = with_gradients(new)
    with_gradients(arguments)  # compiles, and makes the table of frequencies
    grads = expected[2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _qk_norm_rope(*arguments, 1e-6, 1e4, False)
        gradients = _qk_norm_rope_backward(*grads, *arguments, 1e-6, 1e4, False, True)
    for x, y in zip(arguments, new, strict=True):
        x.copy_(y)
    for _ in range(2):
        graph.replay()
        for got, want in zip((*outputs, *gradients), expected[0] + expected[1], strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_gpu_alone_as_in_batch():
    check_alone_as_in_batch(on_gpu(L=700, H=12, Hk=12, D=128, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_gpu_chosen_and_equal_to_reference(gpu_backend):
    arguments = on_gpu(H=12, Hk=12, D=128)
    compiled = "cuda" if gpu_backend == "automatic" and native.reason(*arguments) is None else "triton"
    assert raven.explain("qk_norm_rope", *arguments[:4]).chosen == compiled
    outputs = qk_norm_rope(*arguments)
    for got, want in zip(outputs, reference.qk_norm_rope(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    L, H, D = 2**31 // (32 * 256) + 3, 32, 256
    q = torch.zeros(1, L, H, D, dtype=torch.bfloat16, device="cuda")
    q[:, -5:].normal_()
    k = torch.randn(1, L, 1, D, dtype=torch.bfloat16, device="cuda")
    q_weight, k_weight = torch.rand(H * D, device="cuda"), torch.rand(D, device="cuda")
    positions = torch.arange(L, dtype=torch.int32, device="cuda")[:, None].expand(L, 3)
    outputs = qk_norm_rope(q, k, q_weight, k_weight, positions)
    last = [x[:, -5:] for x in (q, k)]
    expected = reference.qk_norm_rope(*in_double([*last, q_weight, k_weight, positions[-5:]]))
    for got, want in zip(outputs, expected, strict=True):
        assert_rounded(got[:, -5:], want)


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
