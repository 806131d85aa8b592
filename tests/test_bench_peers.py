"""The peers of the attention bench do the same job: held against packages with the same surface."""

import sys
from types import ModuleType

import pytest
import torch
from bench_files import module_of

from raven.layout import ChunkLayout
from raven.spans import Spans
from raven.testing import attention_oracle


class FakeWrapper:
    """flashinfer's surface: a plan, then calls."""

    def __init__(self, workspace, order):
        assert order == "NHD" and workspace.dtype == torch.uint8

    def plan(self, q_ends, k_ends, heads, key_heads, head_dim, causal, q_data_type):
        assert not causal and q_data_type == torch.float64
        self.ends = q_ends, k_ends

    def run(self, q, k, v):
        return varlen(q, k, v, *self.ends)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k):
    """One dense attention per pair of sequences."""
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        key, value = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * q.shape[-1] ** -0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(parts)


def fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False):
    assert not causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k)


def fa4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False):
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k), "lse"


def magi(q, k, v, q_ranges, k_ranges, attn_type_map=None, deterministic=False):
    assert (attn_type_map == 0).all() and len(attn_type_map) == len(q_ranges) == len(k_ranges)
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (begin, end), (first, last) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        mask[begin:end, first:last] = True
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v), "lse"


FAKES = {
    "fa3": ("flash_attn_interface", {"flash_attn_varlen_func": fa3}),
    "fa4": ("flash_attn.cute", {"flash_attn_varlen_func": fa4}),
    "magi": ("magi_attention.functional", {"flex_flash_attn_func": magi}),
    "flashinfer": ("flashinfer", {"BatchPrefillWithRaggedKVCacheWrapper": FakeWrapper}),
}


@pytest.mark.parametrize("spans", [ChunkLayout.repacked((1, 2, 1), 3).spans, Spans.full(5, 9)], ids=["packed", "full"])
@pytest.mark.parametrize("name", FAKES)
def test_peers_do_the_same_job(name, spans, monkeypatch):
    """Against packages with the same surface: gathered keys, and gradients back at their tokens."""
    module, functions = FAKES[name]
    fake = ModuleType(module)
    fake.__dict__.update(functions)
    for parent in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, parent, fake)
    peers = module_of("peers")
    q, k, v, grad = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (spans.q_end, *[spans.kv_end] * 2, spans.q_end))
    out, _, *grads = attention_oracle(q[None], k[None], v[None], spans, grad_out=grad[None])
    peer = peers.PEERS[name](q, k, v, spans, False)
    got = peer.results(grad if peer.differentiable else None, len(q), len(k))
    assert peer.differentiable == (name != "flashinfer") and len(got) == (4 if peer.differentiable else 1)
    for a, b in zip(got, (out, *grads), strict=False):
        torch.testing.assert_close(a, b.float())


def test_peers_that_are_not_there_say_so(monkeypatch):
    peers = module_of("peers")
    x = torch.randn(3, 1, 8)
    for name, (module, _) in FAKES.items():
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
        with pytest.raises(peers.FAILURES):
            peers.PEERS[name](x, x, x, Spans.full(3, 3), False)


def test_peers_without_a_deterministic_backward_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    fake = ModuleType("flash_attn.cute")
    fake.flash_attn_varlen_func = fa4
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fake)
    x = torch.randn(3, 1, 8)
    with pytest.raises(NotImplementedError, match="no deterministic backward"):
        module_of("peers").PEERS["fa4"](x, x, x, Spans.full(3, 3), True)
