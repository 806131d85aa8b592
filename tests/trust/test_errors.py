"""Every documented error on the GPU, raised before any launch: the device works on afterwards."""

import pytest
import torch

import raven
from raven.cache import KVCache
from raven.layout import ChunkLayout
from raven.ops import chunk_attention, consistency_step, gaussian_log_prob, kv_append, policy_loss, qk_norm_rope
from raven.spans import Spans
from raven.testing import assert_bitwise


@pytest.mark.gpu
def test_attention_errors(backend):
    layout = ChunkLayout.repacked((1, 1), 4)
    q = torch.randn(1, layout.length, 4, 64, device="cuda", dtype=torch.bfloat16)
    before = chunk_attention(q, q, q, layout)
    cases = [
        (ValueError, r"q: got shape", (q[0], q, q, layout)),
        (ValueError, r"k: got shape .* expected \[1, Lk, Hkv, 64\]", (q, q[..., :16], q, layout)),
        (ValueError, r"v: got shape", (q, q, q[:, :-1], layout)),
        (ValueError, r"q: got head dim 0", (q[..., :0], q[..., :0], q[..., :0], layout)),
        (ValueError, r"k: got 3 heads, expected a divisor of the 4", (q, q[:, :, :3], q[:, :, :3], layout)),
        (TypeError, r"q: got dtype int32", (q.int(), q.int(), q.int(), layout)),
        (TypeError, r"k: got dtype float16, expected bfloat16", (q, q.half(), q.half(), layout)),
        (ValueError, r"k: got device cpu, expected cuda", (q, q.cpu(), q.cpu(), layout)),
        (ValueError, r"layout: got 12 tokens, expected 11", (q[:, :11], q, q, layout)),
        (ValueError, r"layout: got ranges that reach query 12 and key 20", (q, q, q, Spans.full(12, 20))),
        (TypeError, r"layout: got list", (q, q, q, [(0, 12)])),
        (ValueError, r"scale: got 0", (q, q, q, layout, 0.0)),
        (ValueError, r"scale: got nan", (q, q, q, layout, float("nan"))),
        (raven.BackendUnavailableError, "float64", (q.double(), q.double(), q.double(), layout)),
        (raven.BackendUnavailableError, "head_dim", (q[..., :48], q[..., :48], q[..., :48], layout)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            chunk_attention(*arguments)
    torch.cuda.synchronize()
    assert_bitwise(chunk_attention(q, q, q, layout), before)


@pytest.mark.gpu
def test_errors_of_the_other_ops(backend):
    q = torch.randn(1, 6, 2, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(128, device="cuda")
    positions = torch.zeros(6, 3, dtype=torch.int32, device="cuda")
    cache = KVCache(1, 1, 2, 64, 6, max_chunks=1, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(2, 3, 4, 5, 6, device="cuda")
    asking = x.clone().requires_grad_()
    cases = [
        (ValueError, "k: got shape", lambda: qk_norm_rope(q, q[:, :5], weight, weight, positions)),
        (ValueError, "q_weight: got shape", lambda: qk_norm_rope(q, q, weight[:5], weight, positions)),
        (TypeError, "k: got dtype float16", lambda: qk_norm_rope(q, q.half(), weight, weight, positions)),
        (ValueError, "positions: got device cpu", lambda: qk_norm_rope(q, q, weight, weight, positions.cpu())),
        (ValueError, "eps: got", lambda: qk_norm_rope(q, q, weight, weight, positions, eps=-1.0)),
        (RuntimeError, "no chunk is open", lambda: kv_append(q, q, q, weight, weight, positions, cache, 0)),
        (ValueError, "layer: got 1", lambda: kv_append(q, q, q, weight, weight, positions, cache, 1)),
        (ValueError, "x_t: got shape", lambda: gaussian_log_prob(x, x[:1], x, 0.8, 0.4)),
        (ValueError, "x_s: got device cpu", lambda: gaussian_log_prob(x, x, x.cpu(), 0.8, 0.4)),
        (TypeError, "v: got dtype int32", lambda: gaussian_log_prob(x.int(), x, x, 0.8, 0.4)),
        (ValueError, "s: got", lambda: gaussian_log_prob(x, x, x, 0.8, 0.0)),
        (ValueError, "x_t: got shape", lambda: consistency_step(x, x[:1], 0.8, 0.4, x)),
        (ValueError, "advantages: got shape", lambda: policy_loss(x, x, x, 0.8, 0.4, weight[:1])),
        (ValueError, "x_t: got a tensor that requires", lambda: policy_loss(x, asking, x, 0.8, 0.4, weight[:2])),
        (ValueError, "scale: got inf", lambda: policy_loss(x, x, x, 0.8, 0.4, weight[:2], scale=float("inf"))),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.gpu
def test_a_named_backend_is_never_replaced():
    """Each compiled backend, asked for by name, runs or says why not; the reference is never taken in its place."""
    q = torch.randn(1, 4, 1, 48, device="cuda")
    for name in ("cuda", "triton"):
        raven.set_backend(name)
        try:
            with pytest.raises(raven.BackendUnavailableError, match=f"{name} +not used: "):
                chunk_attention(q, q, q, Spans.full(4, 4))
        finally:
            raven.set_backend(None)
    assert raven.explain("chunk_attention", q, q, q).chosen == "reference"
