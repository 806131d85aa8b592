"""Layouts, random spans and arguments of chunk_attention, and its results held against a dense mask in float64."""

import random
from contextlib import contextmanager

import torch

from raven.layout import ChunkLayout
from raven.ops import chunk_attention
from raven.reference.chunk_attention import dense_attention
from raven.spans import Spans
from raven.testing import (
    Tolerance,
    assert_as_accurate,
    poisoned_memory,
    relative_rms,
    tolerance,
)

LAYOUTS = {
    "interleaved": ChunkLayout.repacked((3, 2, 3), 23),
    "clean_first": ChunkLayout.repacked((3, 2, 3), 23, order="clean_first"),
    "sink_window": ChunkLayout.repacked((1, 2, 2, 2, 2), 19, sink=1, window=1),
    "teacher_forcing": ChunkLayout.teacher_forcing((2, 3), 31),
    "blockwise": ChunkLayout.blockwise((2, 2, 2), 37),
    "cut_chunks": ChunkLayout.blockwise((3, 3, 3), 11, local_frames=4),
    "bidirectional": ChunkLayout.bidirectional(3, 43),
    "documents": ChunkLayout.concat([ChunkLayout.repacked((1, 1), 29), ChunkLayout.repacked((2, 1), 17)]),
    "one_token": ChunkLayout.repacked((1,) * 5, 1),
}
# Two tiles of queries and of keys, the second ones with five rows: for what holds whatever the mask is.
SHORT = ChunkLayout.repacked((1, 3), 23, order="clean_first")


def make(layout, dtype, head_dim=32, heads=2, key_heads=2, batch=2, device="cpu"):
    L = layout.length
    shapes = ((heads, L), (key_heads, L), (key_heads, L), (heads, L))
    q, k, v, grad = (torch.randn(batch, n, h, head_dim, device=device).to(dtype) for h, n in shapes)
    return [x.requires_grad_() for x in (q, k, v)], grad


def want_of(inputs, grad, mask, scale, grad_lse=None):
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = dense_attention(*inputs, mask.to(grad.device), scale)
    outputs = (out,) if grad_lse is None else (out, lse)
    grads = torch.autograd.grad(outputs, inputs, (grad.double(), grad_lse)[: len(outputs)])
    return out, lse, grads


def check(layout, dtype, device="cpu", scale=None, **shape):
    inputs, grad = make(layout, dtype, device=device, **shape)
    grad_lse = torch.randn(grad.shape[0], grad.shape[2], grad.shape[1], dtype=torch.float64, device=device)
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    out64, lse64, grads64 = want_of(inputs, grad, layout.dense_mask(), factor, grad_lse)
    with poisoned_memory():
        out, lse = chunk_attention(*inputs, layout, scale=scale, return_lse=True)
        grads = torch.autograd.grad((out, lse), inputs, (grad, grad_lse.to(lse.dtype)))
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_accurate(out, out64, None, tolerance(dtype), "out")
    assert_as_accurate(
        lse, lse64, None, Tolerance(1e-12 if dtype == torch.float64 else tolerance(torch.float32).rms), "lse"
    )
    for name, got, want in zip("qkv", grads, grads64, strict=True):
        assert_as_accurate(got, want, None, tolerance(dtype, "backward"), f"d{name}")


def random_spans(rng, q_len, kv_len):
    """Query ranges with gaps, each with unsorted disjoint key ranges that ignore every tile border."""
    rows, at = [], 0
    while at < q_len:
        at += rng.choice([0, 0, 1, 7])
        end = min(q_len, at + rng.choice([1, 2, 63, 64, 65, 127, 129, 300]))
        if at >= end:
            break
        cuts = sorted(rng.sample(range(kv_len + 1), rng.choice([0, 2, 4, 8])))
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        rng.shuffle(ranges)
        rows.append(((at, end), ranges))
        at = end
    keys = [r for _, ranges in rows for r in ranges]
    indptr = [0]
    for _, ranges in rows:
        indptr.append(indptr[-1] + len(ranges))
    return Spans(torch.tensor([q for q, _ in rows]), torch.tensor(indptr), torch.tensor(keys).reshape(-1, 2))


def check_spans(seed, dtype, device, q_len, kv_len, head_dim=32):
    spans = random_spans(random.Random(seed), q_len, kv_len)
    q, k, v, grad = (torch.randn(1, n, 2, head_dim, device=device).to(dtype) for n in (q_len, kv_len, kv_len, q_len))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = spans.dense_mask(q_len, kv_len)
    out64, lse64, grads64 = want_of(inputs, grad, mask, head_dim**-0.5)
    with poisoned_memory():
        out, lse = chunk_attention(*inputs, spans, return_lse=True)
        grads = torch.autograd.grad(out, inputs, grad)
    blind = ~mask.any(1)
    assert (out[:, blind] == 0).all() and (lse[:, :, blind] == float("-inf")).all()
    assert (grads[0][:, blind] == 0).all() and (grads[1][:, ~mask.any(0)] == 0).all()
    assert relative_rms(out, out64) <= tolerance(dtype).rms
    assert relative_rms(lse[:, :, ~blind], lse64[:, :, ~blind]) <= 1e-6
    for got, want in zip(grads, grads64, strict=True):
        assert relative_rms(got, want) <= tolerance(dtype, "backward").rms


def check_nan_outside(device, dtype):
    """Keys that nobody sees, and the rows right behind a tail, may hold anything."""
    spans = Spans.build([((0, 40), [(3, 50), (90, 91)]), ((41, 77), [(51, 89)])])
    inputs = [torch.randn(1, 100, 2, 64, device=device).to(dtype) for _ in range(3)]
    seen = spans.dense_mask(100, 100)
    inputs[0][:, ~seen.any(1)] = float("nan")
    for x in inputs[1:]:
        x[:, ~seen.any(0)] = float("nan")
    inputs = [x.requires_grad_() for x in inputs]
    out, lse = chunk_attention(*inputs, spans, return_lse=True)
    # The gradient of queries outside the ranges may hold anything as well.
    grad = torch.where(seen.any(1, keepdim=True)[None, :, :, None].to(device), torch.randn_like(out), float("nan"))
    for x in (out, *torch.autograd.grad(out, inputs, grad)):
        assert x.isfinite().all()
    poisoned = inputs[1].detach().clone()
    poisoned[:, 60] = float("nan")
    out = chunk_attention(inputs[0].detach(), poisoned, inputs[2].detach(), spans)
    assert out[:, 41:77].isnan().all() and out[:, :41].isfinite().all(), "a visible NaN shows, and only there"


def check_strided(device, dtype, same, layout):
    """Queries, keys and values are often views of one fused projection, or of a head-major tensor."""
    fused = torch.randn(2, layout.length, 3, 2, 64, device=device).to(dtype).unbind(2)
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused]
    last_strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in fused]
    want = chunk_attention(*(x.contiguous() for x in fused), layout)
    assert want.any()
    for inputs in (fused, head_major, last_strided):
        same(chunk_attention(*inputs, layout), want)


@contextmanager
def deterministic():
    """PyTorch's deterministic algorithms, as a training script asks for them."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
