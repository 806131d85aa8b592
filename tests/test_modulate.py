"""modulate: the reference against a plain statement of the formula, the Triton kernels against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

import raven
from raven import backends
from raven.ops import modulate
from raven.ops.modulate import _modulate
from raven.reference import gated_residual as reference_backward
from raven.reference import modulate as reference
from raven.testing import assert_bitwise, poisoned_memory

# Unit roundoff of each dtype, and room for the float32 arithmetic before that one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
ARITHMETIC = 3e-6


def make(B=2, L=6, N=2, C=24, dtype=torch.float32, table=None, device="cpu"):
    """x [B, L, C], shift and scale [B, N, C], the last two slices of one table."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (0.5 + torch.randn(B, L, C, dtype=wide, device=device)).to(dtype)
    return [x, *torch.randn(B, N, 2, C, dtype=wide, device=device).to(table or wide).unbind(2)]


def leaves_of(arguments):
    return [x.detach().requires_grad_() for x in arguments]


def plainly(x, shift, scale, lengths=None, eps=1e-6):
    each = [x.shape[1] // shift.shape[1]] * shift.shape[1] if lengths is None else list(lengths)
    shift, scale = (t.repeat_interleave(torch.tensor(each, device=t.device), dim=1) for t in (shift, scale))
    return F.layer_norm(x, x.shape[-1:], None, None, eps) * (1 + scale) + shift


def assert_rounded(got, want, name):
    """``got`` is the float64 ``want``, computed in float32 and rounded once to its own dtype."""
    assert got.shape == want.shape and torch.isfinite(got).all(), name
    slack = 1.01 * ROUNDING[got.dtype] * want.abs() + ARITHMETIC * max(1.0, float(want.abs().max())) + 2.0**-25
    excess = (got.double() - want).abs() - slack
    assert excess.max() <= 0, f"{name}: error above the rounding of {got.dtype} by {excess.max():.2e}"


def check_against_float64(arguments, lengths=None, dtype=None):
    leaves = leaves_of(arguments)
    y = modulate(*leaves, lengths, dtype=dtype)
    grad = torch.randn(y.shape, device=y.device).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, grad)
    x, shift, scale = (t.double() for t in arguments)
    want, stats = reference.modulate(x, shift, scale, lengths, 1e-6, torch.float64)
    assert_rounded(y, want, "y")
    wanted = (True, False, False, True, True)
    expected = reference_backward.backward(
        None, grad.double(), x, stats, None, None, scale, lengths, (torch.float64,) * 2, wanted
    )
    for name, got, want in zip(("x", "shift", "scale"), gradients, expected, strict=True):
        assert_rounded(got, want, f"gradient of {name}")
    return y.detach(), gradients


# The reference and the op


@pytest.mark.parametrize("lengths", [None, (1, 5), (0, 6)], ids=str)
def test_reference_is_the_formula(lengths):
    arguments = make(dtype=torch.float64)
    torch.testing.assert_close(modulate(*arguments, lengths), plainly(*arguments, lengths), rtol=0, atol=1e-12)


def test_small_spread_about_a_large_mean():
    """The variance is of centred values: what ``mean(x^2) - mean(x)^2`` in float32 would lose here."""
    x = 300 + torch.randn(1, 4, 256)
    zeros = torch.zeros(1, 1, 256)
    torch.testing.assert_close(modulate(x, zeros, zeros).double(), plainly(x.double(), zeros, zeros), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_rounds_once(dtype):
    check_against_float64(make(dtype=dtype), (2, 4))
    check_against_float64(make(dtype=dtype, table=torch.bfloat16))


def test_dtype_of_the_result():
    arguments = make()
    y = modulate(*arguments, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert_bitwise(y, modulate(*arguments).bfloat16())
    check_against_float64(arguments, dtype=torch.bfloat16)


@pytest.mark.parametrize("lengths", [None, (0, 1, 3)], ids=str)
def test_gradcheck(lengths):
    leaves = leaves_of(make(B=1, L=4, N=3 if lengths else 2, C=5, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: modulate(*x, lengths), leaves)


def test_opcheck():
    for lengths in (None, (2, 4)):
        torch.library.opcheck(_modulate, (*leaves_of(make(B=1, C=5)), lengths, 1e-6, torch.float32))


def test_compiles_to_one_graph():
    arguments = make()
    eager, compiled = leaves_of(arguments), leaves_of(arguments)
    run = torch.compile(lambda *x: 2 * modulate(*x), fullgraph=True, backend="aot_eager")
    outputs = run(*compiled), 2 * modulate(*eager)
    assert torch.equal(*outputs)
    grad = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, x, grad) for y, x in zip(outputs, (compiled, eager), strict=True)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_compiles_with_dynamic_shapes():
    run = torch.compile(modulate, fullgraph=True, dynamic=True, backend="eager")
    for length in (4, 6, 8):
        arguments = make(L=length)
        assert torch.equal(run(*arguments), modulate(*arguments))


def test_gradients_only_where_asked():
    arguments = make()
    want = torch.autograd.grad(modulate(*(leaves := leaves_of(arguments))).square().sum(), leaves)
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(arguments)]
        (got,) = torch.autograd.grad(modulate(*leaves).square().sum(), leaves[i])
        torch.testing.assert_close(got, want[i], rtol=1e-6, atol=1e-6)


def check_strides(arguments):
    x, shift, scale = arguments
    want = modulate(x, shift.contiguous(), scale.contiguous())
    assert_bitwise(modulate(torch.cat((x, x), dim=2)[..., : x.shape[2]], shift, scale), want)
    assert_bitwise(modulate(x.transpose(0, 1).contiguous().transpose(0, 1), shift, scale), want)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(modulate(turned, shift, scale), want, rtol=1e-6, atol=1e-6)
    one = shift[:, :1]
    assert_bitwise(modulate(x, one.expand_as(shift), scale), modulate(x, one.repeat(1, shift.shape[1], 1), scale))


def test_strides():
    check_strides(make())


def check_empty(device="cpu", lengths=None, **shape):
    leaves = leaves_of(make(device=device, **shape))
    y = modulate(*leaves, lengths)
    assert y.shape == leaves[0].shape
    y.sum().backward()
    assert torch.equal(leaves[1].grad, torch.zeros_like(leaves[1]))


@pytest.mark.parametrize("shape", [{"L": 0}, {"B": 0}, {"L": 0, "lengths": (0, 0)}], ids=str)
def test_empty(shape):
    check_empty(**shape)


ERRORS = [
    (ValueError, "x: got shape", lambda a: {"x": a["x"][0]}),
    (TypeError, "x: got dtype int64", lambda a: {"x": a["x"].long()}),
    (ValueError, "x: got 0 channels", lambda a: {k: x[..., :0] for k, x in a.items()}),
    (TypeError, "shift: got NoneType, expected a tensor", lambda a: {"shift": None}),
    (TypeError, "scale: got NoneType, expected a tensor", lambda a: {"scale": None}),
    (ValueError, r"shift: got shape \(1, 2, 24\), expected \[2, N, 24\]", lambda a: {"shift": a["shift"][:1]}),
    (ValueError, r"shift: got shape \(24,\)", lambda a: {"shift": a["shift"][0, 0]}),
    (ValueError, r"scale: got shape \(2, 1, 24\), expected \[2, 2, 24\]", lambda a: {"scale": a["scale"][:, :1]}),
    (TypeError, "scale: got dtype int32", lambda a: {"scale": a["scale"].int()}),
    (ValueError, "shift: got device meta", lambda a: {"shift": a["shift"].to("meta")}),
    (ValueError, "shift: got no segment", lambda a: {"shift": a["shift"][:, :0], "scale": a["scale"][:, :0]}),
    (ValueError, r"lengths: got \(2, 3\), expected 2 lengths that sum to 6", lambda a: {"lengths": (2, 3)}),
    (ValueError, "lengths: got None for 5 tokens", lambda a: {"x": a["x"][:, :5]}),
    (ValueError, "eps: got -1", lambda a: {"eps": -1.0}),
    (TypeError, "dtype: got torch.int64", lambda a: {"dtype": torch.int64}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    arguments = dict(zip(("x", "shift", "scale"), make(), strict=True))
    with pytest.raises(error, match=message):
        modulate(**(arguments | change(arguments)))


def test_forward_mode_derivative_is_not_dropped():
    x, shift, scale = make()
    with pytest.raises(NotImplementedError, match="modulate: forward-mode derivatives"):
        torch.func.jvp(lambda x: modulate(x, shift, scale), (x,), (x,))


def test_says_which_backend_runs(triton_backend):
    arguments = make(dtype=torch.float64)
    reasons = raven.explain("modulate", *arguments).reasons
    assert reasons["cuda"] == "modulate has no cuda implementation" and "float64" in reasons["triton"]
    with pytest.raises(raven.BackendUnavailableError, match="float64"):
        modulate(*arguments)


# Triton in its interpreter


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        ({"L": 4}, None),
        ({"L": 3, "dtype": torch.float16}, (1, 2)),
        ({"L": 4, "B": 1, "C": 33, "table": torch.float16}, (4, 0)),
        ({"L": 2, "N": 1, "B": 1, "C": 768}, None),
    ],
    ids=str,
)
def test_interpreted(triton_backend, case, lengths):
    with poisoned_memory():
        check_against_float64(make(**case), lengths)


@pytest.mark.interpret
def test_interpreted_strides(triton_backend):
    check_strides(make(L=2))


@pytest.mark.interpret
def test_interpreted_empty(triton_backend):
    check_empty(L=0)


@pytest.mark.interpret
def test_interpreted_small_spread(triton_backend):
    test_small_spread_about_a_large_mean()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("case", "lengths"),
    [
        ({"L": 9360, "C": 1536, "B": 1}, None),
        ({"L": 1563, "C": 1536}, (1000, 563)),
        ({"L": 66, "C": 5120}, None),
        ({"L": 130, "C": 100, "table": torch.bfloat16}, (130, 0)),
        ({"L": 64, "C": 64, "N": 64}, None),
    ],
    ids=str,
)
def test_gpu(dtype, case, lengths):
    with poisoned_memory():
        check_against_float64(make(device="cuda", dtype=dtype, **case), lengths)


@pytest.mark.gpu
def test_gpu_strides_and_dtype():
    arguments = make(device="cuda", L=50, C=1536)
    check_strides(arguments)
    check_against_float64(arguments, dtype=torch.bfloat16)
    assert raven.explain("modulate", *arguments).chosen == "triton"


@pytest.mark.gpu
def test_gpu_alone_as_in_batch():
    arguments = make(device="cuda", L=700, C=1536, dtype=torch.bfloat16)
    y, gradients = check_against_float64(arguments)
    x, shift, scale = arguments
    assert_bitwise(modulate(x[1:, -1:], shift[1:, -1:], scale[1:, -1:]), y[1:, -1:])
    x[0, 3, 8] = math.nan
    other = modulate(*arguments)
    assert other[0, 3].isnan().all() and torch.equal(other[1], y[1]) and torch.equal(other[0, 4:], y[0, 4:])
    runs = []
    for _ in range(2):
        leaves = leaves_of(make(device="cuda", L=700, C=1536) if not runs else runs[0][0])
        runs.append((leaves, torch.autograd.grad(modulate(*leaves).square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.gpu
def test_gpu_in_a_graph():
    arguments, new = ([*make(device="cuda", L=400, C=1536, dtype=torch.bfloat16)] for _ in range(2))
    expected = modulate(*new)
    assert expected.any()
    modulate(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulate(*arguments)
    for x, other in zip(arguments, new, strict=True):
        x.copy_(other)
    graph.replay()
    assert torch.equal(y, expected)


def test_registered():
    assert "modulate" in backends.operators()


def test_lengths_are_integers():
    x, table = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
    with pytest.raises(TypeError, match="lengths: got"):
        modulate(x, table, table, (2.5, 2.5))
