"""Inputs of whole numbers for which every sum is exact in float32: results are equal, not close."""

import pytest
import torch
from problems import COMBINATIONS

from raven.ops import chunk_attention
from raven.spans import Spans
from raven.testing import KINDS, poison_freed_memory, random_mask


def whole_numbers(*shape, dtype):
    return torch.randint(-8, 9, shape, device="cuda").to(dtype)


def same(got, want, name):
    different = int((got != want).sum())
    assert different == 0, f"{name}: {different} of {got.numel()} elements differ"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_one_key_takes_all(backend, kind):
    """Keys of +-1 in random order, and queries that repeat one of them: every other weight is below 2^-149.

    Then the result is that key's value, dv the sum of the gradients of the queries that chose it, dq = dk = 0.
    """
    for seed in range(KINDS.index(kind), 4 * len(KINDS), len(KINDS)):
        torch.manual_seed(seed)
        mask = random_mask(seed, 500)
        dtype, head_dim = COMBINATIONS[seed // len(KINDS) % 2][:2]
        dense = mask.dense("cuda")
        seeing = dense.any(1)
        choice = torch.rand(dense.shape, device="cuda").masked_fill(~dense, -1.0).argmax(1)
        k = (torch.randint(0, 2, (1, mask.kv_len, 2, head_dim), device="cuda") * 2 - 1).to(dtype)
        q = k[:, choice]
        v, grad = (whole_numbers(1, n, 2, head_dim, dtype=dtype) for n in (mask.kv_len, mask.q_len))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        poison_freed_memory(leaves)
        out, lse = chunk_attention(*leaves, mask.layout, scale=512 / head_dim, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        label = f"seed {seed}, {kind}, {dtype}"
        same(out, torch.where(seeing[:, None, None], v[:, choice], 0.0), f"{label}: out")
        assert ((lse - 512.0).abs()[:, :, seeing] <= 1e-3).all(), label
        want = torch.zeros(v.shape, dtype=torch.float64, device="cuda")
        want.index_add_(1, choice[seeing], grad[:, seeing].double())
        same(dv, want.to(dtype), f"{label}: dv")
        same(dq, torch.zeros_like(dq), f"{label}: dq")
        same(dk, torch.zeros_like(dk), f"{label}: dk")


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 2, 8, 64, 128, 256, 1024])
def test_equal_weights(backend, keys):
    """Queries of zero see 2^n keys in two ranges that fit no tile: out and dv are means, rounded once."""
    begin, end = 5, 138
    first = keys // 3
    spans = Spans.build([((begin, end), [(3, 3 + first), (600, 600 + keys - first)])])
    q = torch.zeros(1, 150, 2, 128, device="cuda", dtype=torch.bfloat16)
    k, v, grad = (whole_numbers(1, n, 2, 128, dtype=torch.bfloat16) for n in (2000, 2000, 150))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    poison_freed_memory(leaves)
    out = chunk_attention(*leaves, spans)
    _, _, dv = torch.autograd.grad(out, leaves, grad)
    seen = spans.dense_mask(150, 2000)[begin].cuda()
    want = torch.zeros_like(out)
    want[:, begin:end] = v[:, seen].double().sum(1, keepdim=True).div(keys).to(out.dtype)
    same(out, want, "out")
    want = torch.zeros_like(dv)
    want[:, seen] = grad[:, begin:end].double().sum(1, keepdim=True).div(keys).to(dv.dtype)
    same(dv, want, "dv")
