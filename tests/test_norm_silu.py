"""norm_silu: RMS norm and SiLU of rows, the sum before them, and memory that is not its own."""

import math

import pytest
import torch
import torch.nn.functional as F

import raven
from raven.ops import norm_silu
from raven.ops.norm_silu import _norm_silu
from raven.testing import relative_rms

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
TERMS = [(), ("bias",), ("residual",), ("bias", "residual")]


def make(shape=(2, 3, 40), dtype=torch.float32, device="cpu", terms=("bias", "residual")):
    """x, a weight, and the terms asked for."""
    generator = torch.Generator(device).manual_seed(1)
    sizes = {"x": shape, "weight": shape[-1:], "bias": shape[-1:], "residual": shape}
    numbers = {name: torch.randn(size, generator=generator, device=device).to(dtype) for name, size in sizes.items()}
    return numbers.pop("x"), numbers.pop("weight"), {name: numbers[name] for name in terms}


def exact(x, weight, bias=None, residual=None):
    total = sum(term.double() for term in (x, bias, residual) if term is not None)
    if weight is None:
        return total
    return F.silu(F.rms_norm(total, total.shape[-1:], weight.double(), eps=1e-24))


def check(x, weight, terms):
    for used in (weight, None):
        got = norm_silu(x, used, **terms)
        assert got.dtype == x.dtype and got.shape == x.shape
        assert relative_rms(got, exact(x, used, **terms)) <= LIMITS[x.dtype]


def test_one_row_by_hand():
    got = norm_silu(torch.tensor([3.0, -4.0]), torch.tensor([1.0, 2.0]), bias=torch.tensor([0.0, 8.0]))
    root = math.sqrt(12.5)  # of (9 + 16) / 2
    want = [y / (1 + math.exp(-y)) for y in (3 / root, 2 * 4 / root)]
    torch.testing.assert_close(got, torch.tensor(want))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_against_float64(dtype, terms):
    check(*make(dtype=dtype, terms=terms))


def check_extremes(device):
    x, weight, _ = make((4, 40), device=device)
    x[0], x[1] = 0.0, x[1] * 1e-10
    x[2, 3] = torch.nan
    got = norm_silu(x, weight)
    assert (got[0] == 0).all() and got[2].isnan().all()
    torch.testing.assert_close(got[1], norm_silu(x[1] * 1e10, weight), rtol=1e-4, atol=1e-4)
    big = norm_silu(x[3:] * 1e4, 300 * weight)  # exp overflows on the way
    torch.testing.assert_close(big, exact(x[3:], 300 * weight).float(), rtol=1e-4, atol=1e-4)


def test_extremes():
    check_extremes("cpu")


def check_memory(device, dtype):
    """Into the middle of something larger, and onto itself."""
    x, weight, terms = make((6, 40), dtype, device)
    want = norm_silu(x, weight, **terms)
    larger = torch.full((9, 40), -7.0, dtype=dtype, device=device)
    assert norm_silu(x, weight, **terms, out=larger[2:8]).data_ptr() == larger[2:8].data_ptr()
    assert torch.equal(larger[2:8], want) and (larger[[0, 1, 8]] == -7).all()
    wide = torch.full((8, 64), -7.0, dtype=dtype, device=device)
    norm_silu(x, weight, **terms, out=wide[1:7])
    assert torch.equal(wide[1:7, :40], want) and (wide[1:7, 40:] == 0).all() and (wide[[0, 7]] == -7).all()
    total = norm_silu(x, None, **terms)
    assert torch.equal(norm_silu(x, None, **terms, out=x), total) and torch.equal(x, total)


def test_memory():
    check_memory("cpu", torch.float32)


def test_any_strides():
    x, weight, terms = make()
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(norm_silu(turned, weight, **terms), norm_silu(x, weight, **terms))
    wide = torch.zeros(2, 3, 80)
    norm_silu(x, weight, **terms, out=wide[..., ::2])
    assert torch.equal(wide[..., ::2], norm_silu(x, weight, **terms)) and (wide[..., 1::2] == 0).all()
    reason = raven.explain("norm_silu", turned, turned, weight).reasons["triton"]
    assert "rows must be packed" in reason


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 16)])
def test_empty(shape):
    assert norm_silu(torch.empty(shape), torch.ones(shape[-1])).shape == shape


def test_opcheck():
    x, weight, terms = make()
    torch.library.opcheck(_norm_silu, (x, weight, terms["bias"], terms["residual"], torch.empty_like(x)))
    torch.library.opcheck(_norm_silu, (x, None, None, None, torch.empty_like(x)))


def test_compiles_to_one_graph():
    x, weight, terms = make()
    f = torch.compile(norm_silu, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x, weight, **terms), norm_silu(x, weight, **terms))


def test_refuses():
    x, weight, terms = make()
    with pytest.raises(TypeError, match="x: got dtype int64, expected bfloat16"):
        norm_silu(torch.arange(8), None)
    with pytest.raises(TypeError, match="weight: got dtype float16, expected float32"):
        norm_silu(x, weight.half())
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match=r"x: got shape .*expected \[..., C\]"):
            norm_silu(torch.zeros(shape), None)
    for name, wrong in (("bias", x), ("residual", x[:1]), ("out", x[:1]), ("out", x[..., :8])):
        with pytest.raises(ValueError, match=f"{name}: got "):
            norm_silu(x, weight, **{name: wrong})
    with pytest.raises(ValueError, match="bias: got requires_grad=True.*no_grad"):
        norm_silu(x, weight, bias=terms["bias"].requires_grad_())
    with torch.no_grad():
        assert norm_silu(x, weight, **terms).shape == x.shape
        with pytest.raises(NotImplementedError, match="norm_silu: forward-mode"):
            torch.func.jvp(lambda x: norm_silu(x, weight), (make()[0],), (make()[0],))


@pytest.mark.interpret
@pytest.mark.parametrize("channels", [1, 24, 96, 300])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_interpreted(channels, terms):
    x, weight, terms = make((3, channels), terms=terms)
    assert raven.explain("norm_silu", x, x, weight).chosen == "triton"
    check(x, weight, terms)
    check_memory("cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 24, 96, 128, 192, 384, 1536, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu(channels, dtype):
    for terms in TERMS:
        x, weight, terms = make((37, channels), dtype, "cuda", terms)
        assert raven.explain("norm_silu", x, x, weight).chosen == "triton"
        check(x, weight, terms)
    check_memory("cuda", dtype)


@pytest.mark.gpu
def test_gpu_extremes():
    check_extremes("cuda")


@pytest.mark.gpu
def test_gpu_many_rows():
    """More numbers than 32 bits count."""
    x = torch.zeros(2**24, 160, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(160, device="cuda")
    got = norm_silu(x, torch.ones(160, dtype=torch.bfloat16, device="cuda"))
    torch.testing.assert_close(got[-1], norm_silu(x[-1:].clone(), x.new_ones(160))[0], rtol=0, atol=0)
    assert got[:-1].abs().max() == 0


@pytest.mark.gpu
def test_gpu_reads_nothing_back():
    x, weight, terms = make((8, 96), torch.bfloat16, "cuda")
    norm_silu(x, weight, **terms)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm_silu(x, weight, **terms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
