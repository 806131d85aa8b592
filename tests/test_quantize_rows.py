"""quantize_rows: the rule of float8 storage, row by row, and GELU before it."""

import math

import pytest
import torch

import raven
from raven.ops import quantize_rows
from raven.ops.quantize_rows import _quantize_rows

FLOAT8 = torch.float8_e4m3fn


def gelu(number):
    return number / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (number + 0.044715 * number**3)))


def check_rule(x, stored, scale, activation=None):
    """One number at a time, in Python; only what lies between two float8 numbers may go either way."""
    assert stored.shape == x.shape and stored.dtype == FLOAT8 and stored.is_contiguous()
    assert scale.shape == x.shape[:-1] and scale.dtype == torch.float32 and scale.is_contiguous()
    rows = zip(x.flatten(0, -2).tolist(), stored.flatten(0, -2), scale.flatten().tolist(), strict=True)
    for row, got, factor in rows:
        numbers = [activation(number) for number in row] if activation else row
        largest = max(max(map(abs, numbers)), 2.0**-64)
        assert factor == pytest.approx(largest / 448, rel=1e-5)
        exact = torch.tensor([number / factor for number in numbers], dtype=torch.float64)
        want = exact.to(FLOAT8).double()
        different = got.cpu().double() != want
        middle = (got.cpu().double() + want)[different] / 2
        torch.testing.assert_close(exact[different], middle, rtol=1e-4, atol=1e-6)


def make(shape=(2, 3, 40), dtype=torch.float32, device="cpu"):
    """Rows of very different size."""
    x = torch.randn(shape, device=device)
    return (x * torch.logspace(-3, 3, x[..., 0].numel(), device=device).view(*shape[:-1], 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, gelu])
def test_rule(dtype, activation):
    x = make(dtype=dtype)
    check_rule(x, *quantize_rows(x, gelu=activation is not None), activation)


def check_extremes(device):
    x = torch.randn(5, 24, device=device)
    x[0], x[1] = 0.0, x[1] * 1e-30
    x[2, 3], x[3, 4] = torch.nan, -torch.inf
    stored, scale = quantize_rows(x)
    read = stored.float() * scale.unsqueeze(-1)
    assert (read[0] == 0).all() and read[1].abs().max() < 1e-28  # below the smallest scale
    assert read[2:4].isnan().all()
    torch.testing.assert_close(read[4], x[4], rtol=0.07, atol=float(x[4].abs().max()) * 2e-3)


def test_extremes():
    check_extremes("cpu")


def test_reads_any_strides():
    x = make((2, 40, 3)).transpose(1, 2)
    fused = make((2, 3, 120))[..., 40:80]
    for view in (x, fused):
        stored, scale = quantize_rows(view)
        want, want_scale = quantize_rows(view.contiguous())
        assert torch.equal(stored.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scale, want_scale)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 16)])
def test_empty(shape):
    stored, scale = quantize_rows(torch.empty(shape))
    assert stored.shape == shape and scale.shape == shape[:-1]


def test_opcheck():
    torch.library.opcheck(_quantize_rows, (make(), True))


def test_compiles_to_one_graph():
    x = make()
    f = torch.compile(quantize_rows, fullgraph=True, backend="aot_eager")
    for got, want in zip(f(x, True), quantize_rows(x, True), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_refuses():
    with pytest.raises(TypeError, match="x: got dtype int64, expected bfloat16"):
        quantize_rows(torch.arange(8))
    with pytest.raises(ValueError, match=r"x: got shape \(\), expected \[..., C\]"):
        quantize_rows(torch.tensor(1.0))
    x = make().requires_grad_()
    with pytest.raises(ValueError, match=r"x: got requires_grad=True.*no_grad"):
        quantize_rows(x)
    with torch.no_grad():
        assert quantize_rows(x)[0].dtype == FLOAT8
        with pytest.raises(NotImplementedError, match="quantize_rows: forward-mode"):
            torch.func.jvp(quantize_rows, (make(),), (make(),))


def test_the_interpreter_leaves_it_to_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = raven.explain("quantize_rows", make()).reasons
    assert "float8_e4m3fn, which Triton's interpreter" in reasons["triton"] and reasons["reference"] is None


@pytest.mark.interpret
@pytest.mark.parametrize("channels", [1, 24, 40, 300])
@pytest.mark.parametrize("activation", [None, gelu])
def test_interpreted_before_the_rounding(channels, activation):
    """The interpreter has no float8: the kernel writes what it would round, and rows of other tensors stay."""
    from raven.kernels.quantize_rows import _quantize_kernel, plan

    x, cut, count = make((3, channels)), plan(channels), 3
    out, scale = torch.full((count + 1, channels), -7.0), torch.full((count + 1,), -7.0)
    _quantize_kernel[(-(-count // cut.rows),)](
        x, out, scale, count, channels, channels, cut.first, cut.second, cut.rows, activation is not None
    )
    numbers = torch.tensor([[activation(n) if activation else n for n in row] for row in x.tolist()])
    largest = numbers.abs().amax(1, keepdim=True).clamp_min(2.0**-64)
    torch.testing.assert_close(out[:count], numbers * 448 / largest, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scale[:count], largest[:, 0] / 448, rtol=1e-5, atol=0)
    assert (out[count] == -7).all() and scale[count] == -7


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 48, 128, 1536, 5120, 8960])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, gelu])
def test_gpu(channels, dtype, activation):
    assert raven.explain("quantize_rows", x := make((3, channels), dtype, "cuda")).chosen == "triton"
    check_rule(x, *quantize_rows(x, gelu=activation is not None), activation)


@pytest.mark.gpu
def test_gpu_extremes():
    check_extremes("cuda")


@pytest.mark.gpu
def test_gpu_strides():
    fused = make((2, 30, 3 * 1536), torch.bfloat16, "cuda")
    for view in (fused[..., 1536:3072], fused[:, ::2, :1536], fused[..., ::3]):
        stored, scale = quantize_rows(view)
        want, want_scale = quantize_rows(view.contiguous())
        assert torch.equal(stored.view(torch.uint8), want.view(torch.uint8)) and torch.equal(scale, want_scale)


@pytest.mark.gpu
def test_gpu_reads_nothing_back():
    x = make((8, 1536), torch.bfloat16, "cuda")
    quantize_rows(x, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize_rows(x, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_rows_without_channels(shape):
    with pytest.raises(ValueError, match="x: got shape"):
        quantize_rows(torch.zeros(shape))
