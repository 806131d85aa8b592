"""What chunk_attention refuses, who runs it, and which derivatives it has."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import raven
from raven.layout import ChunkLayout
from raven.ops import chunk_attention
from raven.spans import Spans


def test_no_heads():
    q, k = torch.randn(1, 3, 0, 32, requires_grad=True), torch.randn(1, 3, 1, 32, requires_grad=True)
    dq, dk = torch.autograd.grad(chunk_attention(q, k, k, Spans.full(3, 3)).sum(), (q, k))
    assert dq.shape == q.shape and (dk == 0).all()


def test_spans_made_in_inference_mode_train():
    with torch.inference_mode():
        spans = Spans.full(3, 3)
    q = torch.randn(1, 3, 1, 32, requires_grad=True)
    chunk_attention(q, q, q, spans).sum().backward()
    assert q.grad.norm() > 0


def test_no_derivative_is_dropped():
    """Second and forward-mode derivatives are not there, and must not come out as zero."""
    q = torch.randn(1, 3, 1, 32, requires_grad=True)
    spans = Spans.full(3, 3)
    (grad,) = torch.autograd.grad(chunk_attention(q, q, q, spans).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="chunk_attention: forward-mode derivatives"):
        torch.func.jvp(lambda x: chunk_attention(x, x, x, spans), (q.detach(),), (q.detach(),))


def test_what_triton_leaves_to_the_reference(monkeypatch):
    def why_not(*shape, dtype=torch.float32):
        return raven.explain("chunk_attention", *[torch.empty(shape, dtype=dtype)] * 3).reasons["triton"]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in why_not(1, 3, 1, 32, dtype=torch.bfloat16)
    assert "65535" in why_not(65536, 0, 1, 32) and "65535" in why_not(1, 0, 65536, 32)


def test_explain_tells_the_two_forward_kernels_of_triton_apart(monkeypatch):
    q = torch.empty(1, 3, 1, 64)
    assert not raven.explain("chunk_attention", q, q, q).remarks  # Triton cannot run at all here
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    explanation = raven.explain("chunk_attention", q, q, q)
    if explanation.reasons["triton"] is not None:
        pytest.skip(explanation.reasons["triton"])
    assert explanation.remarks["triton"].startswith("portable forward, not Hopper's: dtype torch.float32 is not one of")
    assert "triton    available (portable forward" in str(explanation)


def test_bad_arguments():
    layout = ChunkLayout.repacked((1, 1), 4)
    q = torch.randn(1, layout.length, 4, 32)
    cases = [
        (ValueError, r"q: got shape \(12, 4, 32\)", (q[0], q, q, layout)),
        (ValueError, r"k: got shape .* expected \[1, Lk, Hkv, 32\]", (q, q[..., :16], q, layout)),
        (ValueError, r"v: got shape", (q, q, q[:, :-1], layout)),
        (ValueError, r"q: got head dim 0", (q[..., :0], q[..., :0], q[..., :0], layout)),
        (ValueError, r"k: got 3 heads, expected a divisor of the 4 heads", (q, q[:, :, :3], q[:, :, :3], layout)),
        (TypeError, "q: got ndarray, expected a tensor", (q.numpy(), q, q, layout)),
        (TypeError, "k: got NoneType, expected a tensor", (q, None, q, layout)),
        (TypeError, r"q: got dtype int32", (q.int(), q.int(), q.int(), layout)),
        (TypeError, r"k: got dtype float64, expected float32", (q, q.double(), q.double(), layout)),
        (ValueError, r"k: got device meta, expected cpu", (q, q.to("meta"), q.to("meta"), layout)),
        (ValueError, r"layout: got 12 tokens, expected 11 like q", (q[:, :11], q, q, layout)),
        (ValueError, r"layout: got ranges that reach query 12 and key 20", (q, q, q, Spans.full(12, 20))),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            chunk_attention(*arguments)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale: got"):
            chunk_attention(q, q, q, layout, scale=scale)
    with pytest.raises(TypeError, match="layout: got list"):
        chunk_attention(q, q, q, [(0, 12)])


def test_a_named_backend_is_never_replaced():
    q = torch.randn(1, 4, 1, 48)
    raven.set_backend("triton")
    try:
        with pytest.raises(raven.BackendUnavailableError, match="head_dim 48 is not one of"):
            chunk_attention(q, q, q, Spans.full(4, 4))
    finally:
        raven.set_backend(None)
    assert chunk_attention(q, q, q, Spans.full(4, 4)).shape == q.shape


def test_whoever_watches_sees_the_op():
    """A call that needs no gradient goes straight to its backend, unless a profile or a dispatch mode is on."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    q, spans = torch.randn(1, 4, 2, 16), Spans.full(4, 4)
    plain = chunk_attention(q, q, q, spans)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = chunk_attention(q, q, q, spans)
    assert "raven::chunk_attention" in {event.key for event in profile.key_averages()}
    with Names() as names:
        watched = chunk_attention(q, q, q, spans)
    assert torch.ops.raven.chunk_attention.default in names.seen
    assert torch.equal(plain, profiled) and torch.equal(plain, watched)
