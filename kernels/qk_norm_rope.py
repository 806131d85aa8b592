"""RMS norm of queries and keys and 3-D rotary positions: one read and one write of each tensor.

A program takes a few tokens one after the other and holds a whole row (all heads) of q and k in registers, so the norm
needs no second pass. Channels of a head lie along the lanes, 16 bytes each, which keeps a pair in one thread.

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

from raven.rows import frequency_table, multiprocessors, packed, position_rows, token_rows

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


@triton.jit
def two_means(
    x, y, xb, yb, HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr
):
    """Means of x and of y as ``mean_over_norm``, in one exchange between warps."""
    if PER_HEAD:
        mean_x, mean_y = tl.split(tl.sum(tl.join(x, y), axis=1) / DIM)
        mean_x, mean_y = mean_x[:, None], mean_y[:, None]
        mean_xb, mean_yb = tl.split(tl.sum(tl.join(xb, yb), axis=1) / DIM)
        mean_xb, mean_yb = mean_xb[:, None], mean_yb[:, None]
    else:
        if B > 0:
            x = tl.sum(tl.reshape(x, [A // B, B, DIM]), axis=0) + xb
            y = tl.sum(tl.reshape(y, [A // B, B, DIM]), axis=0) + yb
            both = tl.sum(tl.sum(tl.join(x, y), axis=1), axis=0)
        else:
            both = tl.sum(tl.sum(tl.join(x, y), axis=1), axis=0)
        mean_x, mean_y = tl.split(both / (HEADS * DIM))
        mean_xb, mean_yb = mean_x, mean_y
    return mean_x, mean_y, mean_xb, mean_yb


@triton.jit
def heads_there(values, HEADS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Zero for heads that are not there: without an eps, the norm of a head of zeros is NaN."""
    if FIRST + ROWS > HEADS:
        values = tl.where(FIRST + tl.arange(0, ROWS)[:, None] < HEADS, values, 0.0)
    return values


@triton.jit
def _backward_rows(
    x_ptr, grad_ptr, weight_ptr, grad_x_ptr, partial_ptr, position_ptr, frequency, total, length,
    x_batch, x_token, grad_batch, grad_token, position_batch, eps,
    HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every P-th token of one tensor; the program's share of the weight's gradient is one row of partial [P, H * D]."""
    sum_a = tl.zeros([A, DIM], tl.float32)
    sum_b = tl.zeros([B if B > 0 else A, DIM], tl.float32)
    if weight_ptr is not None:
        weight_a, weight_b = load_weight(weight_ptr, HEADS, A, B, DIM, PER_HEAD)
    first = tl.program_id(0)
    for i in tl.range(0, tl.cdiv(total - first, tl.num_programs(0)), num_stages=STAGES):
        n = first + i * tl.num_programs(0)
        batch = (n // length).to(tl.int64)
        token = (n % length).to(tl.int64)
        if weight_ptr is not None:
            xa, xb = load_row(x_ptr + batch * x_batch + token * x_token, HEADS, A, B, DIM)
        grad_a, grad_b = load_row(grad_ptr + batch * grad_batch + token * grad_token, HEADS, A, B, DIM)
        cos, sin = cos_sin(position_ptr + batch * position_batch + token * 3, frequency, DIM)
        grad_a = rotate(grad_a.to(tl.float32), cos, -sin, A, DIM)
        grad_b = grad_b.to(tl.float32)
        if B > 0:
            grad_b = rotate(grad_b, cos, -sin, B, DIM)
        if weight_ptr is not None:
            xa = xa.to(tl.float32)
            xb = xb.to(tl.float32)
            # Of x^2 and of the gradient along x.
            square_a, along_a, square_b, along_b = two_means(
                xa * xa, grad_a * weight_a * xa, xb * xb, grad_b * weight_b * xb, HEADS, A, B, DIM, PER_HEAD
            )
            rstd_a = tl.rsqrt(square_a + eps)
            rstd_b = tl.rsqrt(square_b + eps)
            grad_a *= rstd_a
            grad_b *= rstd_b
            if WEIGHT_GRAD:
                sum_a += grad_a * xa
                sum_b += grad_b * xb
            grad_a = grad_a * weight_a - xa * (along_a * rstd_a * rstd_a * rstd_a)
            grad_b = grad_b * weight_b - xb * (along_b * rstd_b * rstd_b * rstd_b)
        store_row(grad_x_ptr + n.to(tl.int64) * (HEADS * DIM), grad_a, grad_b, HEADS, A, B, DIM)
    if WEIGHT_GRAD:
        if PER_HEAD:
            share = tl.sum(heads_there(sum_a, HEADS, 0, A), axis=0)
            if B > 0:
                share += tl.sum(heads_there(sum_b, HEADS, A, B), axis=0)
            tl.store(partial_ptr + tl.program_id(0) * DIM + tl.arange(0, DIM), share)
        else:
            store_row(partial_ptr + tl.program_id(0) * (HEADS * DIM), sum_a, sum_b, HEADS, A, B, DIM)


@triton.jit(do_not_specialize=["total", "length", "position_batch"])
def _backward_kernel(
    q_ptr, k_ptr, grad_q_ptr, grad_k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, q_partial_ptr, k_partial_ptr,
    position_ptr, frequency_ptr, total, length, q_batch, q_token, k_batch, k_token,
    grad_q_batch, grad_q_token, grad_k_batch, grad_k_token, position_batch, eps,
    QH: tl.constexpr, QA: tl.constexpr, QB: tl.constexpr, KH: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr,
    DIM: tl.constexpr, PER_HEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs (p, 0) take queries, programs (p, 1) keys: one tensor's accumulators are enough for the registers."""
    frequency = tl.load(frequency_ptr + tl.arange(0, DIM // 2))
    if tl.program_id(1) == 0:
        _backward_rows(
            q_ptr, grad_q_ptr, q_weight_ptr, dq_ptr, q_partial_ptr, position_ptr, frequency, total, length,
            q_batch, q_token, grad_q_batch, grad_q_token, position_batch, eps, QH, QA, QB, DIM, PER_HEAD,
            q_partial_ptr is not None, STAGES,
        )  # fmt: skip
    else:
        _backward_rows(
            k_ptr, grad_k_ptr, k_weight_ptr, dk_ptr, k_partial_ptr, position_ptr, frequency, total, length,
            k_batch, k_token, grad_k_batch, grad_k_token, position_batch, eps, KH, KA, KB, DIM, PER_HEAD,
            k_partial_ptr is not None, STAGES,
        )  # fmt: skip


@triton.jit
def _column_sums(partial_ptr, out_ptr, rows, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The columns [32] of partial [rows, width] that are this program's, added in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, rows, ROWS, num_stages=1):
        row = start + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partial_ptr + row * width + column, mask=(row < rows) & (column < width), other=0.0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out_ptr + column, tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def _weight_grad_kernel(
    q_partial_ptr, k_partial_ptr, q_out_ptr, k_out_ptr, rows, q_width, k_width,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Programs (c, 0) add up the programs' shares of the queries' weight, programs (c, 1) of the keys'."""
    if tl.program_id(1) == 0:
        if q_partial_ptr is not None:
            _column_sums(q_partial_ptr, q_out_ptr, rows, q_width, COLUMNS, ROWS)
    else:
        if k_partial_ptr is not None:
            _column_sums(k_partial_ptr, k_out_ptr, rows, k_width, COLUMNS, ROWS)


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


def backward_registers(q_heads: int, k_heads: int, dim: int) -> int | None:
    """Most registers of a thread of the backward, so that twice as many fit; ``None`` where it holds too much."""
    return 128 if max(q_heads, k_heads) * dim <= 24 * 32 * plan("backward", q_heads, k_heads, dim).warps else None


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


def backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    positions: Tensor, eps: float, theta: float, per_head: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and, when asked for, of the weights in their dtypes (empty where there is none)."""
    B, L, H, D = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    config, cut = CONFIGS["backward"], plan("backward", H, k.shape[2], D)
    registers = backward_registers(H, k.shape[2], D)
    threads = config["threads"] if registers else config["threads"] // 2
    programs = min(max(1, threads // (64 * cut.warps)) * multiprocessors(q.device), B * L)
    if programs:  # as few as finish in the same number of rounds: their shares of the weights' gradients are added up
        programs = triton.cdiv(B * L, triton.cdiv(B * L, programs))
    shares: list[Tensor | None] = [None, None]
    dweights: list[Tensor | None] = [None, None]
    for i, weight in enumerate((q_weight, k_weight)):
        if weight_grad and weight is not None:
            shares[i] = torch.empty((programs, weight.numel()), dtype=torch.float32, device=q.device)
            dweights[i] = (torch.empty if programs else torch.zeros)(weight.shape, dtype=weight.dtype, device=q.device)
    if programs:
        q, k, grad_q, grad_k = token_rows(q), token_rows(k), token_rows(grad_q), token_rows(grad_k)
        positions, position_batch = position_rows(positions)
        with torch.cuda.device_of(q):
            _backward_kernel[(programs, 2)](
                q, k, grad_q, grad_k, packed(q_weight), packed(k_weight), dq, dk, *shares, positions,
                frequency_table(D, theta, q.device), B * L, L, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
                grad_q.stride(0), grad_q.stride(1), grad_k.stride(0), grad_k.stride(1), position_batch, eps,
                H, cut.qa, cut.qb, k.shape[2], cut.ka, cut.kb, D, per_head, config["stages"],
                num_warps=cut.warps, maxnreg=registers,
            )  # fmt: skip
            widths = [0 if x is None else x.numel() for x in dweights]
            if max(widths):
                columns, rows, warps = CONFIGS["weight_grad"].values()
                _weight_grad_kernel[(triton.cdiv(max(widths), columns), 2)](
                    *shares, *dweights, programs, *widths, columns, rows, num_warps=warps
                )
    dq_weight, dk_weight = (torch.empty(0, dtype=torch.float32, device=q.device) if x is None else x for x in dweights)
    return dq, dk, dq_weight, dk_weight


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
    for q_heads, k_heads, dim, per_head, dtype, weight in AOT_SHAPES:
        absent = {} if weight else {"q_weight_ptr": None, "k_weight_ptr": None}
        common = {"q_ptr": dtype, "k_ptr": dtype, "position_ptr": "i32", "frequency_ptr": "i64"}
        common |= {"q_weight_ptr": weight, "k_weight_ptr": weight} if weight else {}
        strides = ("q_batch", "q_token", "k_batch", "k_token", "position_batch")
        scalars = dict.fromkeys(("total", "length", *strides), "i32") | {"eps": "fp32"}

        constants, options = aot_constants("forward", q_heads, k_heads, dim, per_head)
        pointers = common | {"q_out_ptr": dtype, "k_out_ptr": dtype}
        constants |= absent | {"TOKENS": CONFIGS["forward"]["tokens"], "STAGES": CONFIGS["forward"]["stages"]}
        yield _forward_kernel, scalars | {name: "*" + kind for name, kind in pointers.items()}, constants, options

        constants, options = aot_constants("backward", q_heads, k_heads, dim, per_head)
        pointers = common | dict.fromkeys(("grad_q_ptr", "grad_k_ptr", "dq_ptr", "dk_ptr"), dtype)
        shares = ("q_partial_ptr", "k_partial_ptr")
        pointers |= dict.fromkeys(shares, "fp32") if weight else {}
        constants |= absent | ({} if weight else dict.fromkeys(shares))
        constants |= {"STAGES": CONFIGS["backward"]["stages"]}
        strides = ("grad_q_batch", "grad_q_token", "grad_k_batch", "grad_k_token")
        signature = scalars | dict.fromkeys(strides, "i32") | {name: "*" + kind for name, kind in pointers.items()}
        yield _backward_kernel, signature, constants, options | {"maxnreg": backward_registers(q_heads, k_heads, dim)}

    signature = dict.fromkeys(("q_partial_ptr", "k_partial_ptr", "q_out_ptr", "k_out_ptr"), "*fp32")
    signature |= dict.fromkeys(("rows", "q_width", "k_width"), "i32")
    config = CONFIGS["weight_grad"]
    yield (
        _weight_grad_kernel,
        signature,
        {"COLUMNS": config["columns"], "ROWS": config["rows"]},
        {"num_warps": config["warps"]},
    )
