"""modulate and gated_residual with ``quantize``: bit for bit quantize_rows of what they give without."""

import copy
import math

import pytest
import torch
from test_gated_residual import Case
from test_modulate import make
from tiny_wan import CONFIG, tiny_inputs, tiny_model

import raven
from raven import backends
from raven.models import fp8, layers
from raven.models.fp8 import Float8Rows, quantize_linears, takes_rows
from raven.ops import gated_residual, modulate, quantize_rows
from raven.ops.gated_residual import _gated_residual_quantized
from raven.ops.modulate import _modulate_quantized
from raven.testing import assert_bitwise

FLOAT8 = torch.float8_e4m3fn


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b)


def check(case, x=None, dtype=None):
    """Both ops on a ``Case`` with a norm: the sum as without, its norm and that of x quantised."""
    case.x = case.x if x is None else x
    rows = case.table.unbind(2)
    total, y = case(dtype=dtype)
    found = case(dtype=dtype, quantize=True)
    assert_same(found, (total, *quantize_rows(y)))
    assert found[1].dtype == FLOAT8 and found[1].is_contiguous() and found[2].shape == total.shape[:2]
    arguments = (case.x, rows[0], rows[1], case.lengths)
    plain = modulate(*arguments, dtype=dtype)
    assert_same(modulate(*arguments, dtype=dtype, quantize=True), quantize_rows(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [{}, {"norm": "affine", "gated": False}, {"lengths": (1, 5)}], ids=str)
def test_is_both_ops_in_one(dtype, case):
    check(Case(dtype=dtype, **case))
    check(Case(dtype=dtype, **case), dtype=torch.bfloat16)


def spoiled(device="cpu", **sizes):
    """Rows that are zero, tiny, infinite or not a number."""
    case = Case(device=device, **sizes)
    case.x[0, 0], case.branch[0, 0] = 0.0, 0.0
    case.x[0, 1, 3], case.x[1, 2, 4] = math.nan, math.inf
    case.table[1] = 1e-30
    return case


def test_extremes():
    check(spoiled())


@pytest.mark.parametrize("shape", [{"L": 0}, {"B": 0}], ids=str)
def test_empty(shape):
    check(Case(**shape))


def test_strides():
    case = Case(C=48)
    check(case, torch.randn(2, 48, 6).transpose(1, 2))
    check(case, torch.randn(2, 6, 144)[..., 48:96])


def test_opcheck():
    case = Case(lengths=(1, 5))
    gate, shift, scale = case.table.unbind(2)[2:5]
    norm = (shift, scale, case.lengths, 1e-6, torch.bfloat16)
    torch.library.opcheck(_gated_residual_quantized, (case.x, case.branch, gate, *norm))
    torch.library.opcheck(_modulate_quantized, (case.x, *norm))


def test_compiles_to_one_graph():
    arguments, case = make(), Case()
    f = torch.compile(lambda *args: modulate(*args, quantize=True), fullgraph=True, backend="aot_eager")
    assert_same(f(*arguments), modulate(*arguments, quantize=True))
    f = torch.compile(lambda: case(quantize=True), fullgraph=True, backend="aot_eager")
    assert_same(f(), case(quantize=True))


def test_refuses():
    case, arguments = Case(), make()
    with pytest.raises(ValueError, match="quantize: got True without a norm, expected shift and scale"):
        gated_residual(case.x, case.branch, quantize=True)
    message = "quantize: got True for tensors with requires_grad=True, expected torch.no_grad"
    with pytest.raises(ValueError, match=message):
        case.requiring_gradients()(quantize=True)
    arguments[1].requires_grad_()
    with pytest.raises(ValueError, match=message):
        modulate(*arguments, quantize=True)
    with torch.no_grad():
        assert modulate(*arguments, quantize=True)[0].dtype == FLOAT8


# In a model


@pytest.fixture
def separately(monkeypatch):
    """Models whose norms do not quantise."""

    def switch(apart):
        monkeypatch.setattr(layers, "takes_rows", (lambda *_: False) if apart else takes_rows)

    return switch


@torch.no_grad()
def check_model(model, separately, monkeypatch, device="cpu"):
    """The same bits as with quantisations of their own, of which those before qkv, q and the MLP are gone."""
    x, _, t, context = tiny_inputs(3)
    inputs = x.to(device), t.to(device), [prompt.to(device) for prompt in context]
    counted = []

    def counting(x, gelu=False):
        counted.append(gelu)
        return quantize_rows(x, gelu)

    monkeypatch.setattr(fp8, "quantize_rows", counting)
    separately(True)
    want, apart = model(*inputs), len(counted)
    counted.clear()
    separately(False)
    assert torch.equal(model(*inputs), want)
    blocks = CONFIG.num_layers
    assert (apart, len(counted), sum(counted)) == (6 * blocks, 3 * blocks, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(separately, monkeypatch, dtype):
    check_model(quantize_linears(tiny_model(dtype)), separately, monkeypatch)


def test_which_layers_take_rows():
    model = quantize_linears(tiny_model(), parts=("self_attn", "ffn"))
    attention, cross, ffn = (getattr(model.blocks[0], name) for name in ("self_attn", "cross_attn", "ffn"))
    assert takes_rows(attention, "qkv") and takes_rows(ffn, "0") and not takes_rows(cross, "q")
    for module in (attention, attention.qkv):
        hook = module.register_forward_pre_hook(lambda *_: None)
        assert not takes_rows(attention, "qkv")
        hook.remove()
        module.forward = module.forward  # as who patches it does
        assert not takes_rows(attention, "qkv")
        del module.forward
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not takes_rows(attention, "qkv")
    hook.remove()
    assert takes_rows(attention, "qkv")
    attention.qkv = torch.nn.Sequential(attention.qkv)  # wrapped
    assert not takes_rows(attention, "qkv")


@torch.no_grad()
def test_hooks_and_wrapped_layers_see_tensors():
    model = quantize_linears(tiny_model())
    x, _, t, context = tiny_inputs(3)
    want = model(x, t, context)
    other, seen = copy.deepcopy(model), []
    for block in other.blocks:
        block.self_attn.qkv = torch.nn.Sequential(block.self_attn.qkv)
        block.cross_attn.q.register_forward_pre_hook(lambda _, args: seen.append(type(args[0])))
        block.ffn.register_forward_hook(lambda _, args, out: seen.append(type(args[0])))
    assert torch.equal(other(x, t, context), want)
    assert seen == [torch.Tensor] * (2 * CONFIG.num_layers)


def test_a_gradient_is_refused_by_the_layer_that_has_none():
    x, _, t, context = tiny_inputs(3)
    with pytest.raises(ValueError, match="blocks.0.self_attn.qkv|x: got"):
        quantize_linears(tiny_model())(x.requires_grad_(), t, context)


def test_a_layer_takes_rows_in_place_of_the_tensor():
    layer = quantize_linears(tiny_model()).blocks[0].cross_attn.q
    x = torch.randn(2, 5, 64, dtype=torch.float16)
    rows = Float8Rows(*quantize_rows(x), x.dtype)
    assert torch.equal(layer(rows), layer(x)) and layer(rows).dtype == torch.float16
    with pytest.raises(ValueError, match=r"x: got shape \(2, 5, 32\), expected \[..., 64\]"):
        layer(Float8Rows(*quantize_rows(x[..., :32]), x.dtype))


# Triton


@pytest.mark.interpret
@pytest.mark.parametrize("channels", [1, 24, 40, 768])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_before_the_rounding(channels, branch, dtype):
    """The interpreter has no float8: the kernel writes what it would round, from a y that has the rounding of dtype."""
    import triton.language as tl

    from raven.kernels import gated_residual as kernels

    x, added = torch.randn(2, 1, 3, channels).unbind(0)
    gate, shift, scale = torch.randn(3, 1, 1, channels).unbind(0)
    total, y, y_scale = torch.empty_like(x), torch.full((4, channels), -7.0), torch.full((4,), -7.0)
    a, b, _ = kernels.cut("forward", channels)
    given = (added, gate) if branch else (None, None)
    kernels._forward_kernel[(3, 1, 1)](
        x, *given, shift, scale, total if branch else None, y, y_scale, None, None, 3, 3,
        *kernels.strides(x), *kernels.strides(given[0]), *kernels.strides(given[1]), *kernels.strides(shift),
        *kernels.strides(scale), 1e-6, channels, a, b, False,
        tl.float16 if dtype == torch.float16 else tl.float32,
    )  # fmt: skip
    normed = modulate(x + gate * added if branch else x, shift, scale, dtype=dtype)[0].float()
    largest = normed.abs().amax(1, keepdim=True).clamp_min(2.0**-64)
    # Half an ulp of y may fall the other way.
    room = {torch.float32: 1e-3, torch.float16: 0.5}[dtype]
    torch.testing.assert_close(y[:3], normed * 448 / largest, rtol=2e-3, atol=room)
    torch.testing.assert_close(y_scale[:3], largest[:, 0] / 448, rtol=2e-3, atol=0)
    assert (y[:3].abs().amax(1) - 448).abs().max() < 1e-3
    torch.testing.assert_close(y_scale[:3] * 448, (y_scale[:3] * 448).to(dtype).float(), rtol=1e-6, atol=0)
    assert (y[3] == -7).all() and y_scale[3] == -7


def test_the_interpreter_leaves_it_to_two_ops(monkeypatch):
    """A backend that has only one of the two ops is none for both in one pass."""
    from raven.ops.gated_residual import in_one_pass

    chosen = {"modulate": "triton", "quantize_rows": "reference"}
    monkeypatch.setattr(backends, "select", lambda op, *tensors: chosen[op])
    x = torch.randn(1, 2, 8)
    assert not in_one_pass("modulate", torch.bfloat16, x)
    chosen["quantize_rows"] = "triton"
    assert in_one_pass("modulate", torch.bfloat16, x) and not in_one_pass("modulate", torch.float64, x)


GPU_CASES = [
    {"L": 4680, "C": 1536, "N": 1, "B": 1},
    {"L": 1563, "C": 1536, "lengths": (1000, 563), "norm": "affine"},
    {"L": 66, "C": 5120, "gated": False},
    {"L": 130, "C": 100, "lengths": (129, 1)},
    {"L": 36, "C": 64, "branch": torch.float32},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu(dtype, case):
    check(Case(device="cuda", dtype=dtype, **case))
    check(Case(device="cuda", dtype=dtype, **case), dtype=torch.bfloat16)


@pytest.mark.gpu
def test_gpu_extremes():
    check(spoiled("cuda", C=1536))


@pytest.mark.gpu
def test_gpu_empty_and_strides():
    check(Case(device="cuda", L=0))
    case = Case(device="cuda", L=40, C=1536, dtype=torch.bfloat16)
    check(case, torch.randn(2, 40, 4608, device="cuda", dtype=torch.bfloat16)[..., 1536:3072])


@pytest.mark.gpu
def test_gpu_one_launch(monkeypatch):
    """On Triton there is no second pass; the scales are those of the reference but for y's rounding."""
    from raven.kernels import quantize_rows as kernels

    def refuse(*_):
        raise AssertionError("quantised in a pass of its own")

    monkeypatch.setattr(kernels, "quantize", refuse)
    x, shift, scale = make(device="cuda", C=1536, dtype=torch.bfloat16)
    got = modulate(x, shift, scale, quantize=True)
    raven.set_backend("reference")
    try:
        want = modulate(x, shift, scale, quantize=True)
    finally:
        raven.set_backend(None)
    torch.testing.assert_close(got[1], want[1], rtol=2**-7, atol=0)


@pytest.mark.gpu
def test_gpu_model(separately, monkeypatch):
    check_model(quantize_linears(tiny_model(torch.bfloat16).cuda()), separately, monkeypatch, "cuda")
