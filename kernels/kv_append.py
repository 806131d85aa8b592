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
    load_row,
    norm_rotate,
    plan,
    store_row,
)
from raven.rows import frequency_table, packed, position_rows, token_rows


@triton.jit
def _larger(a, b):
    """The larger of two magnitudes; a NaN stays one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_heads(values, scale_ptr, HEADS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Heads [ROWS, DIM] within the range of float8 e4m3, and their scales stored; as ``quantize`` of the reference."""
    values = values.to(tl.float32)
    amax = _larger(tl.reduce(tl.abs(values), 1, _larger, keep_dims=True), 5.421010862427522e-20)  # 2^-64
    head = FIRST + tl.arange(0, ROWS)[:, None]
    tl.store(scale_ptr + head, tl.div_rn(amax, 448.0), mask=head < HEADS)
    return values * tl.div_rn(448.0, amax)


@triton.jit
def store_cached(
    cache_ptr, scale_ptr, batch, slot, cache_batch, cache_row, scale_batch, a, b,
    HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write one row of keys or values to the cache, with its scales when there are any."""
    if scale_ptr is not None:
        scales = scale_ptr + batch * scale_batch + slot * HEADS
        a = quantize_heads(a, scales, HEADS, 0, A)
        if B > 0:
            b = quantize_heads(b, scales, HEADS, A, B)
    store_row(cache_ptr + batch * cache_batch + slot * cache_row, a, b, HEADS, A, B, DIM)


@triton.jit(do_not_specialize=["total", "length", "position_batch"])
def _append_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, q_weight_ptr, k_weight_ptr,
    position_ptr, slot_ptr, frequency_ptr, total, length, q_batch, q_token, k_batch, k_token, v_batch, v_token,
    position_batch, k_cache_batch, k_cache_row, v_cache_batch, v_cache_row, scale_batch, eps,
    QH: tl.constexpr, QA: tl.constexpr, QB: tl.constexpr, KH: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    DIM: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE_KEYS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
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
        if not ROTATE_KEYS:
            cos = tl.full([DIM // 2], 1.0, tl.float32)
            sin = tl.zeros([DIM // 2], tl.float32)
        ka, kb = norm_rotate(ka, kb, k_weight_ptr, cos, sin, eps, KH, KA, KB, DIM, PER_HEAD)
        if slot >= 0:
            store_cached(v_cache_ptr, v_scale_ptr, batch, slot, v_cache_batch, v_cache_row, scale_batch, va, vb,
                         KH, KA, KB, DIM)  # fmt: skip
            store_cached(k_cache_ptr, k_scale_ptr, batch, slot, k_cache_batch, k_cache_row, scale_batch, ka, kb,
                         KH, KA, KB, DIM)  # fmt: skip


def append(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, theta: float, per_head: bool, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, rotate_keys: bool = True,
) -> Tensor:  # fmt: skip
    """Arguments as in ``raven.ops.kv_append``, the caches with the heads of a row packed; packed queries.

    Caches of float8 e4m3 come with packed scales [B, S, Hk], which need compute capability 8.9.
    """
    B, L, H, D = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if B * L == 0:
        return q_out
    q, k, v = token_rows(q), token_rows(k), token_rows(v)
    positions, position_batch = position_rows(positions)
    config, cut = CONFIGS["append"], plan("append", H, k.shape[2], D)
    with torch.cuda.device_of(q):
        _append_kernel[(triton.cdiv(B * L, config["tokens"]),)](
            q, k, v, q_out, k_cache, v_cache, k_scale, v_scale, packed(q_weight), packed(k_weight), positions,
            slots.contiguous(), frequency_table(D, theta, q.device), B * L, L, q.stride(0), q.stride(1), k.stride(0),
            k.stride(1), v.stride(0), v.stride(1), position_batch, k_cache.stride(0), k_cache.stride(1),
            v_cache.stride(0), v_cache.stride(1), 0 if k_scale is None else k_scale.stride(0), eps,
            H, cut.qa, cut.qb, k.shape[2], cut.ka, cut.kb, D, per_head, rotate_keys, config["tokens"],
            config["stages"],
            num_warps=cut.warps,
        )  # fmt: skip
    return q_out


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    caches = ("k_cache_ptr", "v_cache_ptr")
    scales = ("k_scale_ptr", "v_scale_ptr")
    for q_heads, k_heads, dim, per_head, dtype, weight in AOT_SHAPES:
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_out_ptr", *caches), "*" + dtype)
        signature |= {"position_ptr": "*i32", "slot_ptr": "*i32", "frequency_ptr": "*i64", "eps": "fp32"}
        strides = ("q_batch", "q_token", "k_batch", "k_token", "v_batch", "v_token", "position_batch")
        rows = ("k_cache_batch", "k_cache_row", "v_cache_batch", "v_cache_row", "scale_batch")
        signature |= dict.fromkeys(("total", "length", *strides, *rows), "i32")
        constants, options = aot_constants("append", q_heads, k_heads, dim, per_head)
        constants |= {"TOKENS": CONFIGS["append"]["tokens"], "STAGES": CONFIGS["append"]["stages"]}
        weights = ("q_weight_ptr", "k_weight_ptr")
        if weight:
            signature |= dict.fromkeys(weights, "*" + weight)
        else:
            constants |= dict.fromkeys(weights)
        for rotate_keys in (True, False) if dtype == "bf16" else (True,):
            constants |= {"ROTATE_KEYS": rotate_keys}
            yield _append_kernel, signature, constants | dict.fromkeys(scales), options
            if capability >= 89:
                float8 = dict.fromkeys(caches, "*fp8e4nv") | dict.fromkeys(scales, "*fp32")
                yield _append_kernel, signature | float8, constants, options
