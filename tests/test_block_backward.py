"""The Triton kernels of a block's backward pass against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from raven.models import mlp
from raven.models.layers import RMSNorm
from raven.testing import poisoned_memory, relative_rms

pytest.importorskip("triton")
from raven.kernels import block_backward  # noqa: E402

LANES = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpret),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
]
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # of a result that is rounded once


@pytest.mark.parametrize("device, dtype", LANES)
@pytest.mark.parametrize("tokens, width", [(1, 40), (129, 513), (300, 48)])
def test_gelu_backward(device, dtype, tokens, width):
    hidden = (3 * torch.randn(tokens, width)).to(device=device, dtype=dtype)
    grad = torch.randn(tokens, width).to(device=device, dtype=dtype)
    want = torch.ops.aten.gelu_backward(grad.double(), hidden.double(), approximate="tanh")
    with poisoned_memory():
        sums = block_backward.gelu_backward(hidden, grad)
    assert relative_rms(grad, want) <= ROUNDING[dtype]
    assert (sums - want.sum(0)).norm() <= 1e-6 * want.abs().sum(0).norm(), "the sum of what was not rounded yet"


@pytest.mark.parametrize("device, dtype", LANES)
@pytest.mark.parametrize("segments, rows, width", [(1, 3, 5), (5, 7, 1100), (8, 2, 640)])
def test_weigh_products(device, dtype, segments, rows, width):
    products = torch.randn(segments, rows, width, device=device)
    gate = torch.randn(segments, 6, rows, device=device)[:, 5]  # a slice of a table
    weight = torch.randn(rows, width).to(device=device, dtype=dtype)
    wide = products.double()
    dots, sums = torch.einsum("sck,ck->sc", wide, weight.double()), torch.einsum("sck,sc->ck", wide, gate.double())
    for first in (True, False):
        dgate = torch.full(gate.shape, float("nan"), device=device)
        dweight = torch.full(weight.shape, float("nan") if first else 1.0, device=device)
        block_backward.weigh_products(products, weight, gate, dgate, dweight, first)
        assert relative_rms(dgate, dots) <= 2e-6
        assert relative_rms(dweight, sums if first else sums + 1) <= 2e-6


@pytest.mark.parametrize("device, dtype", LANES)
@pytest.mark.parametrize("tokens, channels", [(1, 8), (33, 96), (40, 64)])
def test_rms_norm_backward(device, dtype, tokens, channels, monkeypatch):
    monkeypatch.setattr(block_backward, "PROGRAMS", 7)
    x, grad = (torch.randn(tokens, channels).to(device=device, dtype=dtype) for _ in range(2))
    weight = (1 + torch.randn(channels)).to(device=device, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(F.rms_norm(exact[0], (channels,), exact[1], 1e-6), exact, grad.double())
    rstd = torch.rsqrt(x.float().square().mean(1) + 1e-6)
    with poisoned_memory():
        got = block_backward.rms_norm_backward(x, grad, weight, rstd)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and relative_rms(a, b) <= ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_model_takes_the_kernel(dtype):
    norm = RMSNorm(96, 1e-6).to(device="cuda", dtype=dtype)
    x = torch.randn(2, 17, 96, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 17, 2, 96, device="cuda", dtype=dtype)[:, :, 1]  # strided
    y = norm(x)
    assert "RMSNormFunction" in type(y.grad_fn).__name__
    plain = F.rms_norm(x, (96,), norm.weight, 1e-6)
    assert torch.equal(y, plain)
    got, want = (torch.autograd.grad(out, (x, norm.weight), grad) for out in (y, plain))
    for a, b in zip(got, want, strict=True):
        assert relative_rms(a, b) <= 2 * ROUNDING[dtype]


@pytest.mark.parametrize("device, dtype", LANES)
@pytest.mark.parametrize("lengths", [(40,) * 13, (50, 20, 10)])
def test_products_by_segment(device, dtype, lengths):
    """Of two samples, with gates out of a table as a block takes them; kernels and float64 agree."""
    length = sum(lengths)
    grad, hidden = torch.randn(2, length, 24), 2 * torch.randn(2, length, 56)
    table, weight, bias = torch.randn(2, len(lengths), 6, 24), torch.randn(24, 56), torch.randn(24)
    tensors = [t.to(device=device, dtype=dtype) for t in (grad, hidden, weight, bias)]
    gate = table.to(device)[:, :, 5]

    def run(grad, hidden, weight, bias, gate):
        return mlp._by_segment(grad, hidden, gate, weight, bias, lengths)

    want = run(*(t.double() for t in tensors), gate.double())
    for got, exact in zip(run(*tensors, gate), want, strict=True):
        assert relative_rms(got, exact) <= 2 * ROUNDING[dtype]
