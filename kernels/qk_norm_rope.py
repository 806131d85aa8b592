"""RMS norm of queries and keys and 3-D rotary positions: one read and one write of each tensor.

A program takes a few tokens one after the other and holds a whole row (all heads) of q and k in registers, so the norm
needs no second pass. Channels of a head lie along the lanes, 16 bytes each, which keeps a pair in one thread. The
backward is in `qk_norm_rope_backward`.

Angles are exact at any int32 position without a table of positions: a frequency is stored in turns as a 64-bit fixed
point fraction, and an integer product that wraps around is exactly the angle modulo one turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.rows import frequency_table, packed, position_rows, token_rows

# How work is cut. A tuning script may change it, and calls ``plan.cache_clear()`` after each change.
# elements: of a row that one thread holds at most, which sets the number of warps
# tokens:   that a program takes one after the other (forward)
# warps:    of a program at least
# threads:  per multiprocessor (backward: programs stay, each with its share of the weight's gradient) at 128 registers
#           each; half as many where a thread holds more than 24 elements, and needs more registers
# stages:   of copies into shared memory ahead of the computation; 1: straight into registers
CONFIGS = {
    "forward": {"elements": 48, "warps": 1, "tokens": 1, "stages": 1},
    "append": {"elements": 48, "warps": 1, "tokens": 1, "stages": 1},
    "backward": {"elements": 48, "warps": 2, "threads": 512, "stages": 2},
    "weight_grad": {"columns": 32, "rows": 256, "warps": 8},  # of shares: what a program adds up at once
}


@triton.jit
def load_heads(row_ptr, HEADS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Heads FIRST .. FIRST + ROWS of one token row, [ROWS, DIM]; heads that are not there are zero."""
    head = FIRST + tl.arange(0, ROWS)[:, None]
    pointers = row_ptr + head * DIM + tl.arange(0, DIM)[None, :]
    if FIRST + ROWS > HEADS:
        values = tl.load(pointers, mask=head < HEADS, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def store_heads(row_ptr, values, HEADS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr):
    head = FIRST + tl.arange(0, ROWS)[:, None]
    pointers = row_ptr + head * DIM + tl.arange(0, DIM)[None, :]
    if FIRST + ROWS > HEADS:
        tl.store(pointers, values.to(row_ptr.dtype.element_ty), mask=head < HEADS)
    else:
        tl.store(pointers, values.to(row_ptr.dtype.element_ty))


@triton.jit
def load_row(row_ptr, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr):
    """One token row in two parts of A and B heads; without a second part (B = 0) the first stands in for it."""
    a = load_heads(row_ptr, HEADS, 0, A, DIM)
    if B > 0:
        b = load_heads(row_ptr, HEADS, A, B, DIM)
    else:
        b = a
    return a, b


@triton.jit
def store_row(row_ptr, a, b, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr):
    store_heads(row_ptr, a, HEADS, 0, A, DIM)
    if B > 0:
        store_heads(row_ptr, b, HEADS, A, B, DIM)


@triton.jit
def load_weight(
    weight_ptr, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr
):
    """The weight in the two parts of ``load_row``, float32; per head one row [1, DIM] serves all heads."""
    if PER_HEAD:
        a = load_heads(weight_ptr, 1, 0, 1, DIM)
        b = a
    else:
        a, b = load_row(weight_ptr, HEADS, A, B, DIM)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def cos_sin(position_ptr, frequency, DIM: tl.constexpr):
    """Cosine and sine [DIM / 2] of a token's angles; frequency is int64, in turns times 2^64."""
    COLUMN: tl.constexpr = DIM // 2 // 3
    pair = tl.arange(0, DIM // 2)
    frame = tl.load(position_ptr)
    row = tl.load(position_ptr + 1)
    column = tl.load(position_ptr + 2)
    position = tl.where(pair < DIM // 2 - 2 * COLUMN, frame, tl.where(pair < DIM // 2 - COLUMN, row, column))
    turns = ((position.to(tl.int64) * frequency) >> 32).to(tl.int32)  # in 2^-32 turns, whole turns wrapped away
    quarter = (turns + 536870912) >> 30  # the nearest quarter turn, which may wrap to -2
    angle = (turns - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32: within pi / 4
    square = angle * angle
    # Taylor series; the next terms are below 3e-8 of the result at pi / 4.
    s = 2.7557319223985893e-06 * square - 1.984126984126984e-04
    s = (s * square + 8.333333333333333e-03) * square - 0.16666666666666666
    s = s * square * angle + angle
    c = 2.48015873015873e-05 * square - 1.388888888888889e-03
    c = (c * square + 4.1666666666666664e-02) * square - 0.5
    c = c * square + 1.0
    odd = (quarter & 1) != 0
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, DIM: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
    cos = cos[None, :]
    sin = sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, DIM])


@triton.jit
def mean_over_norm(
    a, b, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr
):
    """Means that broadcast over the two parts: per head [A, 1] and [B, 1], else one number for both."""
    if PER_HEAD:
        mean_a = tl.sum(a, axis=1, keep_dims=True) / DIM
        mean_b = tl.sum(b, axis=1, keep_dims=True) / DIM
    else:
        if B > 0:
            # Fold the first part onto the second inside each thread, so that lanes exchange one sum and not two.
            mean_a = tl.sum(tl.sum(tl.reshape(a, [A // B, B, DIM]), axis=0) + b) / (HEADS * DIM)
        else:
            mean_a = tl.sum(a) / (HEADS * DIM)
        mean_b = mean_a
    return mean_a, mean_b


@triton.jit
def norm_rotate(
    a, b, weight_ptr, cos, sin, eps, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """One loaded row, normalised (when there is a weight) and rotated, in float32."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if weight_ptr is not None:
        mean_a, mean_b = mean_over_norm(a * a, b * b, HEADS, A, B, DIM, PER_HEAD)
        weight_a, weight_b = load_weight(weight_ptr, HEADS, A, B, DIM, PER_HEAD)
        a *= weight_a
        b *= weight_b
        if PER_HEAD:
            a *= tl.rsqrt(mean_a + eps)
            b *= tl.rsqrt(mean_b + eps)
        else:
            # One factor for the whole row: scaling the few cosines is cheaper than scaling the row.
            cos *= tl.rsqrt(mean_a + eps)
            sin *= tl.rsqrt(mean_a + eps)
    a = rotate(a, cos, sin, A, DIM)
    if B > 0:
        b = rotate(b, cos, sin, B, DIM)
    return a, b


@triton.jit(do_not_specialize=["total", "length", "position_batch"])
def _forward_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, position_ptr, frequency_ptr, total, length,
    q_batch, q_token, k_batch, k_token, position_batch, eps,
    QH: tl.constexpr, QA: tl.constexpr, QB: tl.constexpr, KH: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    DIM: tl.constexpr, PER_HEAD: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens n of all batch entries in one row: q, k [B, L, H, D] with any batch and token stride to packed outputs."""
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
        qa, qb = load_row(q_ptr + batch * q_batch + token * q_token, QH, QA, QB, DIM)
        ka, kb = load_row(k_ptr + batch * k_batch + token * k_token, KH, KA, KB, DIM)
        cos, sin = cos_sin(position_ptr + batch * position_batch + token * 3, frequency, DIM)
        qa, qb = norm_rotate(qa, qb, q_weight_ptr, cos, sin, eps, QH, QA, QB, DIM, PER_HEAD)
        store_row(q_out_ptr + n.to(tl.int64) * (QH * DIM), qa, qb, QH, QA, QB, DIM)
        ka, kb = norm_rotate(ka, kb, k_weight_ptr, cos, sin, eps, KH, KA, KB, DIM, PER_HEAD)
        store_row(k_out_ptr + n.to(tl.int64) * (KH * DIM), ka, kb, KH, KA, KB, DIM)


class Plan(NamedTuple):
    """How the heads of q (qa + qb) and k (ka + kb) are cut into two powers of two, and the warps of a program."""

    qa: int
    qb: int
    ka: int
    kb: int
    warps: int


def _parts(heads: int, dim: int, warps: int) -> tuple[int, int]:
    """12 heads as 8 + 4, where every thread still gets 16 bytes of both parts; else 16, the last four masked."""
    first = 1 << (heads.bit_length() - 1)
    second = triton.next_power_of_2(heads - first) if heads > first else 0
    if second == 0 or (second < first and second * dim >= 32 * warps * 8):
        return first, second
    return 2 * first, 0


@lru_cache(maxsize=128)
def plan(kind: str, q_heads: int, k_heads: int, dim: int) -> Plan:
    config = CONFIGS[kind]
    threads = triton.cdiv(max(q_heads, k_heads) * dim, config["elements"])
    warps = min(16, max(config["warps"], triton.next_power_of_2(triton.cdiv(threads, 32))))
    return Plan(*_parts(q_heads, dim, warps), *_parts(k_heads, dim, warps), warps)


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, positions: Tensor,
    eps: float, theta: float, per_head: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as in ``raven.ops.qk_norm_rope``; packed outputs."""
    B, L, H, D = q.shape
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if B * L == 0:
        return q_out, k_out
    q, k = token_rows(q), token_rows(k)
    positions, position_batch = position_rows(positions)
    config, cut = CONFIGS["forward"], plan("forward", H, k.shape[2], D)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(B * L, config["tokens"]),)](
            q, k, q_out, k_out, packed(q_weight), packed(k_weight), positions,
            frequency_table(D, theta, q.device), B * L, L,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), position_batch, eps,
            H, cut.qa, cut.qb, k.shape[2], cut.ka, cut.kb, D, per_head, config["tokens"], config["stages"],
            num_warps=cut.warps,
        )  # fmt: skip
    return q_out, k_out


def aot_constants(kind: str, q_heads: int, k_heads: int, dim: int, per_head: bool) -> tuple[dict, dict]:
    """Constants and options that a launch of ``kind`` passes."""
    cut = plan(kind, q_heads, k_heads, dim)
    constants = {"QH": q_heads, "QA": cut.qa, "QB": cut.qb, "KH": k_heads, "KA": cut.ka, "KB": cut.kb, "DIM": dim}
    return {**constants, "PER_HEAD": per_head}, {"num_warps": cut.warps}


# (heads of q, heads of k, head dim, per-head norm, dtype of q and k, dtype of the weights or None)
AOT_SHAPES = (
    (12, 12, 128, False, "bf16", "fp32"),
    (6, 2, 64, True, "fp16", "fp32"),
    (3, 3, 32, False, "fp32", None),
)


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for shape in AOT_SHAPES:
        pointers, scalars, absent = aot_arguments(shape)
        constants, options = aot_constants("forward", *shape[:4])
        pointers |= {"q_out_ptr": "*" + shape[4], "k_out_ptr": "*" + shape[4]}
        constants |= absent | {"TOKENS": CONFIGS["forward"]["tokens"], "STAGES": CONFIGS["forward"]["stages"]}
        yield _forward_kernel, scalars | pointers, constants, options


def aot_arguments(shape: tuple) -> tuple[dict, dict, dict]:
    """Pointers and numbers that forward and backward take, and the pointers that are absent."""
    dtype, weight = shape[4:]
    weights = ("q_weight_ptr", "k_weight_ptr")
    pointers = {"q_ptr": "*" + dtype, "k_ptr": "*" + dtype, "position_ptr": "*i32", "frequency_ptr": "*i64"}
    pointers |= dict.fromkeys(weights, "*" + weight) if weight else {}
    strides = ("q_batch", "q_token", "k_batch", "k_token", "position_batch")
    scalars = dict.fromkeys(("total", "length", *strides), "i32") | {"eps": "fp32"}
    return pointers, scalars, {} if weight else dict.fromkeys(weights)
