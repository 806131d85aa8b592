"""chunk_attention: the reference against a dense mask in float64, and the rules of an op."""

import pytest
import torch
from attention_cases import LAYOUTS, check, check_nan_outside, check_spans, check_strided, make

from raven import backends
from raven.layout import ChunkLayout
from raven.ops import chunk_attention
from raven.spans import Spans
from raven.testing import assert_bitwise, poisoned_memory


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reference_equals_dense(name, dtype):
    check(LAYOUTS[name], dtype, head_dim=32, heads=4, key_heads=2)


@pytest.mark.parametrize("seed", range(20))
def test_reference_on_random_spans(seed):
    check_spans(seed, torch.float32, "cpu", 150 + 31 * seed, 90 + 41 * seed)


def test_nan_outside():
    check_nan_outside("cpu", torch.float32)


def test_strided():
    check_strided("cpu", torch.float32, torch.testing.assert_close, LAYOUTS["interleaved"])


def test_gradcheck():
    layout = ChunkLayout.repacked((1, 2), 3, sink=1)
    inputs, _ = make(layout, torch.float64, 8, 2, 1, batch=1)
    assert torch.autograd.gradcheck(lambda *x: chunk_attention(*x, layout, return_lse=True), inputs)


def test_opcheck():
    layout = LAYOUTS["cut_chunks"]
    inputs, _ = make(layout, torch.float32, 32, 4, 2)
    spans = layout.spans
    arguments = (*inputs, spans.q_ranges, spans.kv_indptr, spans.kv_ranges, 0.3)
    torch.library.opcheck(torch.ops.raven.chunk_attention.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_without_graph_breaks(backend):
    layout = LAYOUTS["interleaved"]
    inputs, grad = make(layout, torch.float32)
    compiled = torch.compile(lambda q, k, v: chunk_attention(q, k, v, layout) * 2, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*inputs), inputs, grad)
    want = torch.autograd.grad(chunk_attention(*inputs, layout) * 2, inputs, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 7, 7), (2, 0, 7), (2, 7, 0), (2, 0, 0)], ids=str)
def test_empty(shape):
    B, Lq, Lk = shape
    q, k, v = (torch.randn(B, n, 2, 32, requires_grad=True) for n in (Lq, Lk, Lk))
    out, lse = chunk_attention(q, k, v, Spans.full(Lq, Lk), return_lse=True)
    assert out.shape == q.shape and (out == 0).all() or Lk
    assert Lk or (lse == float("-inf")).all()
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape and (B and Lq and Lk or (grad == 0).all())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_empty_tensors_reach_no_kernel(backend, monkeypatch):
    """A GPU backend, without a GPU: nothing may be launched on a tensor without elements."""
    monkeypatch.setattr(backends, "select", lambda *_: backend)
    for B, Lq, Lk, H in ((0, 7, 7, 2), (2, 0, 7, 2), (2, 7, 0, 2), (2, 7, 7, 0)):
        q, k, v = (torch.randn(B, n, h, 64, requires_grad=True) for n, h in ((Lq, H), (Lk, 1), (Lk, 1)))
        with poisoned_memory():
            out, lse = chunk_attention(q, k, v, Spans.full(Lq, Lk), return_lse=True)
            grads = torch.autograd.grad((out.sum(), lse.sum()), (q, k, v))
        assert (out == 0).all() and (lse == float("-inf")).all()
        for x, grad in zip((q, k, v), grads, strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


def test_autocast_changes_nothing():
    inputs, grad = make(LAYOUTS["one_token"], torch.float32)

    def run():
        out, lse = chunk_attention(*inputs, LAYOUTS["one_token"], return_lse=True)
        return out, lse, *torch.autograd.grad((out, lse), inputs, (grad, torch.ones_like(lse)))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for a, b in zip(got, run(), strict=True):
        assert_bitwise(a, b)
