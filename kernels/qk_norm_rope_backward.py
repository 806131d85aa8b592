"""Backward of `qk_norm_rope`: one pass over the tokens, then the shares of the weights' gradients.

Programs stay for the whole launch and take every P-th token of one tensor, with their share of its weight's gradient in
registers; a second kernel adds up the shares in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.kernels.qk_norm_rope import (
    AOT_SHAPES,
    CONFIGS,
    aot_arguments,
    aot_constants,
    cos_sin,
    load_row,
    load_weight,
    plan,
    rotate,
    store_row,
)
from raven.rows import frequency_table, multiprocessors, packed, position_rows, token_rows


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


def backward_registers(q_heads: int, k_heads: int, dim: int) -> int | None:
    """Most registers of a thread of the backward, so that twice as many fit; ``None`` where it holds too much."""
    return 128 if max(q_heads, k_heads) * dim <= 24 * 32 * plan("backward", q_heads, k_heads, dim).warps else None


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


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for shape in AOT_SHAPES:
        pointers, scalars, absent = aot_arguments(shape)
        q_heads, k_heads, dim, per_head, dtype, weight = shape
        constants, options = aot_constants("backward", q_heads, k_heads, dim, per_head)
        pointers |= dict.fromkeys(("grad_q_ptr", "grad_k_ptr", "dq_ptr", "dk_ptr"), "*" + dtype)
        shares = ("q_partial_ptr", "k_partial_ptr")
        pointers |= dict.fromkeys(shares, "*fp32") if weight else {}
        constants |= absent | ({} if weight else dict.fromkeys(shares)) | {"STAGES": CONFIGS["backward"]["stages"]}
        scalars |= dict.fromkeys(("grad_q_batch", "grad_q_token", "grad_k_batch", "grad_k_token"), "i32")
        options |= {"maxnreg": backward_registers(q_heads, k_heads, dim)}
        yield _backward_kernel, scalars | pointers, constants, options

    signature = dict.fromkeys(("q_partial_ptr", "k_partial_ptr", "q_out_ptr", "k_out_ptr"), "*fp32")
    signature |= dict.fromkeys(("rows", "q_width", "k_width"), "i32")
    config = CONFIGS["weight_grad"]
    yield (
        _weight_grad_kernel,
        signature,
        {"COLUMNS": config["columns"], "ROWS": config["rows"]},
        {"num_warps": config["warps"]},
    )
