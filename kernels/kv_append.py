"""Norm and rotary of queries and keys, and the write of keys and values into the cache, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.kernels.qk_norm_rope import (
    AOT_SHAPES,
    CONFIGS,
    aot_constants,
    cos_sin,
    frequency_table,
    load_row,
    norm_rotate,
    packed,
    plan,
    position_rows,
    store_row,
    token_rows,
)


@triton.jit(do_not_specialize=["total", "length", "position_batch"])
def _append_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, q_weight_ptr, k_weight_ptr, position_ptr, slot_ptr,
    frequency_ptr, total, length, q_batch, q_token, k_batch, k_token, v_batch, v_token, position_batch,
    k_cache_batch, k_cache_row, v_cache_batch, v_cache_row, eps,
    QH: tl.constexpr, QA: tl.constexpr, QB: tl.constexpr, KH: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    DIM: tl.constexpr, PER_HEAD: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As the forward kernel of qk_norm_rope; keys and values go to row slot[token] of the caches [B, S, H, D]."""
    first = tl.program_id(0) * TOKENS
    frequency = tl.load(frequency_ptr + tl.arange(0, DIM // 2))
    if TOKENS == 1:
        count = 1  # known when compiled: no loop is left
    else:
        count = tl.minimum(TOKENS, total - first)
    for i in tl.range(0, count, num_stages=STAGES):
        n = first + i
        batch = (n // length).to(tl.int64)
        token = (n % length).to(tl.int64)
        slot = tl.load(slot_ptr + token).to(tl.int64)
        qa, qb = load_row(q_ptr + batch * q_batch + token * q_token, QH, QA, QB, DIM)
        ka, kb = load_row(k_ptr + batch * k_batch + token * k_token, KH, KA, KB, DIM)
        va, vb = load_row(v_ptr + batch * v_batch + token * v_token, KH, KA, KB, DIM)
        cos, sin = cos_sin(position_ptr + batch * position_batch + token * 3, frequency, DIM)
        qa, qb = norm_rotate(qa, qb, q_weight_ptr, cos, sin, eps, QH, QA, QB, DIM, PER_HEAD)
        store_row(q_out_ptr + n.to(tl.int64) * (QH * DIM), qa, qb, QH, QA, QB, DIM)
        ka, kb = norm_rotate(ka, kb, k_weight_ptr, cos, sin, eps, KH, KA, KB, DIM, PER_HEAD)
        if slot >= 0:
            store_row(v_cache_ptr + batch * v_cache_batch + slot * v_cache_row, va, vb, KH, KA, KB, DIM)
            store_row(k_cache_ptr + batch * k_cache_batch + slot * k_cache_row, ka, kb, KH, KA, KB, DIM)


def append(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, theta: float, per_head: bool,
) -> Tensor:  # fmt: skip
    """Arguments as in ``raven.ops.kv_append``, the caches with the heads of a row packed; packed queries."""
    B, L, H, D = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if B * L == 0:
        return q_out
    q, k, v = token_rows(q), token_rows(k), token_rows(v)
    positions, position_batch = position_rows(positions)
    config, cut = CONFIGS["append"], plan("append", H, k.shape[2], D)
    with torch.cuda.device_of(q):
        _append_kernel[(triton.cdiv(B * L, config["tokens"]),)](
            q, k, v, q_out, k_cache, v_cache, packed(q_weight), packed(k_weight), positions, slots.contiguous(),
            frequency_table(D, theta, q.device), B * L, L, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), position_batch, k_cache.stride(0), k_cache.stride(1),
            v_cache.stride(0), v_cache.stride(1), eps,
            H, cut.qa, cut.qb, k.shape[2], cut.ka, cut.kb, D, per_head, config["tokens"], config["stages"],
            num_warps=cut.warps,
        )  # fmt: skip
    return q_out


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for q_heads, k_heads, dim, per_head, dtype, weight in AOT_SHAPES:
        tensors = ("q_ptr", "k_ptr", "v_ptr", "q_out_ptr", "k_cache_ptr", "v_cache_ptr")
        signature = dict.fromkeys(tensors, "*" + dtype)
        signature |= {"position_ptr": "*i32", "slot_ptr": "*i32", "frequency_ptr": "*i64", "eps": "fp32"}
        strides = ("q_batch", "q_token", "k_batch", "k_token", "v_batch", "v_token", "position_batch")
        rows = ("k_cache_batch", "k_cache_row", "v_cache_batch", "v_cache_row")
        signature |= dict.fromkeys(("total", "length", *strides, *rows), "i32")
        constants, options = aot_constants("append", q_heads, k_heads, dim, per_head)
        constants |= {"TOKENS": CONFIGS["append"]["tokens"], "STAGES": CONFIGS["append"]["stages"]}
        weights = ("q_weight_ptr", "k_weight_ptr")
        if weight:
            signature |= dict.fromkeys(weights, "*" + weight)
        else:
            constants |= dict.fromkeys(weights)
        yield _append_kernel, signature, constants, options
