"""Triton kernels of `chunk_attention`: forward, and a backward without atomics.

A program owns one tile of a query range (or, for the key and value gradients, one tile of a key range) of one head and
walks the tile list that its range shares: first all full tiles, without any mask, then the few tails, masked. The order
is the list's, so a result does not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_rows(ptr, start, stride, rows, cols, length, FULL: tl.constexpr):
    """Rows ``start + rows`` of a matrix, ``[len(rows), len(cols)]``; rows beyond ``length`` are 0."""
    tile = ptr + start.to(tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if FULL:
        return tl.load(tile)
    return tl.load(tile, mask=rows[:, None] < length, other=0.0)


@triton.jit
def _softmax_step(
    acc, m, l, q, k_ptr, v_ptr, stride_k, stride_v, start, length, scale_log2, rows, cols,
    FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running maximum ``m``, sum ``l`` and output ``acc``."""
    k = _load_rows(k_ptr, start, stride_k, rows, cols, length, FULL)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if not FULL:
        s = tl.where(rows[None, :] < length, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    correction = tl.exp2(m - m_new)
    l = l * correction + tl.sum(p, 1)
    acc = acc * correction[:, None]
    v = _load_rows(v_ptr, start, stride_v, rows, cols, length, FULL)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def _forward(
    Q, K, V, Out, Lse, q_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    L, H, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_start = tl.load(q_tiles + 4 * tile)
    q_length = tl.load(q_tiles + 4 * tile + 1)
    index = tl.load(q_tiles + 4 * tile + 2)
    rows_q, rows_k, cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, D)
    h_k = h // GROUP
    k_ptr = K + b * stride_kb + h_k.to(tl.int64) * stride_kh
    v_ptr = V + b * stride_vb + h_k.to(tl.int64) * stride_vh
    q = _load_rows(Q + b * stride_qb + h.to(tl.int64) * stride_qh, q_start, stride_ql, rows_q, cols, q_length, False)

    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    start = tl.load(full_starts + first)
    for t in range(first, last):
        following = tl.load(full_starts + t + 1)  # one ahead, so that no address waits for a load
        acc, m, l = _softmax_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kl, stride_vl, start, BLOCK_K, scale_log2, rows_k, cols,
            True, PRECISION,
        )  # fmt: skip
        start = following
    for t in range(tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1)):
        acc, m, l = _softmax_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kl, stride_vl, tl.load(tails + 2 * t), tl.load(tails + 2 * t + 1),
            scale_log2, rows_k, cols, False, PRECISION,
        )  # fmt: skip

    seen = l > 0
    out = acc * tl.where(seen, 1.0 / l, 0.0)[:, None]
    lse = tl.where(seen, (m + tl.log2(l)) * LN2, float("-inf"))
    inside = rows_q < q_length
    row = q_start.to(tl.int64) + rows_q
    tl.store(
        Out + ((b * L + row) * H + h)[:, None] * D + cols[None, :], out.to(Out.dtype.element_ty), mask=inside[:, None]
    )
    tl.store(Lse + (b * H + h) * L + row, lse, mask=inside)


@triton.jit
def _delta(Out, Grad, GradLse, Delta, stride_gb, stride_gl, stride_gh, L, H, HAS_LSE: tl.constexpr,
           ROWS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``sum_d out * grad_out - grad_lse`` per query: what the softmax subtracts from every weight's gradient."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, inside = tl.arange(0, D), rows < L
    row = rows.to(tl.int64)
    o = tl.load(Out + ((b * L + row) * H + h)[:, None] * D + cols[None, :], mask=inside[:, None], other=0.0)
    g = tl.load(
        Grad + (b * stride_gb + row * stride_gl + h.to(tl.int64) * stride_gh)[:, None] + cols[None, :],
        mask=inside[:, None], other=0.0,
    )  # fmt: skip
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_LSE:
        delta -= tl.load(GradLse + (b * H + h) * L + row, mask=inside, other=0.0)
    tl.store(Delta + (b * H + h) * L + row, delta, mask=inside)


@triton.jit
def _query_step(
    dq, q, g, lse, delta, k_ptr, v_ptr, stride_k, stride_v, start, length, scale_log2, rows, cols,
    FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load_rows(k_ptr, start, stride_k, rows, cols, length, FULL)
    v = _load_rows(v_ptr, start, stride_v, rows, cols, length, FULL)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    dp = tl.dot(g, v.T, input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if not FULL:  # keys beyond the tail were loaded as 0, whose weight exp(0 - lse) may overflow
        p = tl.where(rows[None, :] < length, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _backward_q(
    Q, K, V, Grad, Lse, Delta, DQ, q_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, L, H, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_start = tl.load(q_tiles + 4 * tile)
    q_length = tl.load(q_tiles + 4 * tile + 1)
    index = tl.load(q_tiles + 4 * tile + 2)
    rows_q, rows_k, cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, D)
    h_k = h // GROUP
    k_ptr = K + b * stride_kb + h_k.to(tl.int64) * stride_kh
    v_ptr = V + b * stride_vb + h_k.to(tl.int64) * stride_vh
    q = _load_rows(Q + b * stride_qb + h.to(tl.int64) * stride_qh, q_start, stride_ql, rows_q, cols, q_length, False)
    g = _load_rows(Grad + b * stride_gb + h.to(tl.int64) * stride_gh, q_start, stride_gl, rows_q, cols, q_length, False)
    inside = rows_q < q_length
    row = q_start.to(tl.int64) + rows_q
    lse = tl.load(Lse + (b * H + h) * L + row, mask=inside, other=float("inf")) * LOG2E
    delta = tl.load(Delta + (b * H + h) * L + row, mask=inside, other=0.0)

    scale_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_Q, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    start = tl.load(full_starts + first)
    for t in range(first, last):
        following = tl.load(full_starts + t + 1)
        dq = _query_step(
            dq, q, g, lse, delta, k_ptr, v_ptr, stride_kl, stride_vl, start, BLOCK_K, scale_log2, rows_k, cols,
            True, PRECISION,
        )  # fmt: skip
        start = following
    for t in range(tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1)):
        dq = _query_step(
            dq, q, g, lse, delta, k_ptr, v_ptr, stride_kl, stride_vl, tl.load(tails + 2 * t),
            tl.load(tails + 2 * t + 1), scale_log2, rows_k, cols, False, PRECISION,
        )  # fmt: skip
    tl.store(
        DQ + ((b * L + row) * H + h)[:, None] * D + cols[None, :], (dq * scale).to(DQ.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip


@triton.jit
def _key_step(
    dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_q, stride_g, start, length, scale_log2, rows, cols,
    FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q = _load_rows(q_ptr, start, stride_q, rows, cols, length, FULL)
    if FULL:
        lse = tl.load(lse_ptr + start + rows)
    else:  # an infinite log-sum-exp gives the queries beyond the tail a weight of exactly 0
        lse = tl.load(lse_ptr + start + rows, mask=rows < length, other=float("inf"))
    st = tl.dot(k, q.T, input_precision=PRECISION)
    pt = tl.exp2(st * scale_log2 - (lse * LOG2E)[None, :])
    g = _load_rows(g_ptr, start, stride_g, rows, cols, length, FULL)
    dv = tl.dot(pt.to(g.dtype), g, dv, input_precision=PRECISION)
    if FULL:
        delta = tl.load(delta_ptr + start + rows)
    else:
        delta = tl.load(delta_ptr + start + rows, mask=rows < length, other=0.0)
    dpt = tl.dot(v, g.T, input_precision=PRECISION)
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_k(
    Q, K, V, Grad, Lse, Delta, DK, DV, k_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, L, H, LK, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h_k, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    k_start = tl.load(k_tiles + 4 * tile)
    k_length = tl.load(k_tiles + 4 * tile + 1)
    index = tl.load(k_tiles + 4 * tile + 2)
    rows_q, rows_k, cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, D)
    k = _load_rows(K + b * stride_kb + h_k.to(tl.int64) * stride_kh, k_start, stride_kl, rows_k, cols, k_length, False)
    v = _load_rows(V + b * stride_vb + h_k.to(tl.int64) * stride_vh, k_start, stride_vl, rows_k, cols, k_length, False)

    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_K, D], tl.float32)
    dv = tl.zeros([BLOCK_K, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    tail_first, tail_last = tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1)
    for member in range(GROUP):  # the query heads that share this key head, in a fixed order
        h = h_k * GROUP + member
        q_ptr = Q + b * stride_qb + h.to(tl.int64) * stride_qh
        g_ptr = Grad + b * stride_gb + h.to(tl.int64) * stride_gh
        lse_ptr = Lse + (b * H + h) * L
        delta_ptr = Delta + (b * H + h) * L
        start = tl.load(full_starts + first)
        for t in range(first, last):
            following = tl.load(full_starts + t + 1)
            dk, dv = _key_step(
                dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_ql, stride_gl, start, BLOCK_Q, scale_log2,
                rows_q, cols, True, PRECISION,
            )  # fmt: skip
            start = following
        for t in range(tail_first, tail_last):
            dk, dv = _key_step(
                dk, dv, k, v, q_ptr, g_ptr, lse_ptr, delta_ptr, stride_ql, stride_gl, tl.load(tails + 2 * t),
                tl.load(tails + 2 * t + 1), scale_log2, rows_q, cols, False, PRECISION,
            )  # fmt: skip
    inside = (rows_k < k_length)[:, None]
    row = k_start.to(tl.int64) + rows_k
    at = ((b * LK + row) * tl.num_programs(1) + h_k)[:, None] * D + cols[None, :]
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)


def _inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride but that of the last dimension; a copy is made only when it is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """float32 products in full float32: the tensor cores' tf32 keeps 10 bits."""
    return "ieee" if dtype == torch.float32 else "tf32"


def forward_config(q: torch.Tensor) -> Config:
    """Tiles of the forward kernel for this head size, dtype and GPU."""
    D = q.shape[-1]
    if q.dtype == torch.float32:
        return Config(64, 32, 4, 1 if D == 256 else 2) if D > 64 else Config(64, 64, 4, 2)
    if D == 256:
        return Config(128, 64, 8, 2) if _is_large(q) else Config(64, 32, 4, 2)
    return Config(128, 128, 8, 3) if _is_large(q) and D == 128 else Config(128, 64, 4 if D < 128 else 8, 3 if D < 128 else 2)


def backward_configs(q: torch.Tensor) -> tuple[Config, Config]:
    """Tiles of the two backward kernels: the one that owns queries and the one that owns keys."""
    D = q.shape[-1]
    if q.dtype == torch.float32:
        return (Config(32, 32, 4, 1), Config(32, 32, 4, 1)) if D > 64 else (Config(64, 32, 4, 2), Config(32, 64, 4, 2))
    if D == 256:
        return Config(64, 32, 8, 1), Config(32, 64, 8, 1)
    if _is_large(q) and D == 128:
        return Config(128, 64, 8, 3), Config(64, 128, 8, 3)
    return Config(64, 64, 4, 2), Config(64, 64, 4, 2)


def _is_large(q: torch.Tensor) -> bool:
    """Whether an SM has the shared memory of the data-centre parts (A100 has 163 KiB, H100 and B200 227 KiB)."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10)


def forward(q, k, v, out, lse, tiles, scale: float, config: Config) -> None:
    """Fill ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]`` (both contiguous) for every query of ``tiles``."""
    B, L, H, D = q.shape
    if not (tiles.num_tiles and B and H):
        return
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    _forward[tiles.num_tiles, H, B](
        q, k, v, out, lse, tiles.q_tiles, tiles.full_indptr, tiles.full_starts, tiles.tail_indptr, tiles.tails, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], L, H, GROUP=H // k.shape[2],
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, D=D, PRECISION=_precision(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def backward(
    grad, grad_lse, q, k, v, out, lse, dq, dk, dv, q_tiles, k_tiles, scale: float, q_config: Config, k_config: Config
) -> None:
    """Fill dq, dk, dv (contiguous). ``k_tiles`` is the plan of the transposed ranges: key tiles and query lists."""
    B, L, H, D = q.shape
    q, k, v, grad = (_inner_contiguous(x) for x in (q, k, v, grad))
    if not (B and H):
        return
    delta = torch.empty_like(lse)
    rows = 64
    if L:
        _delta[triton.cdiv(L, rows), H, B](
            out, grad, grad_lse if grad_lse is None else grad_lse.contiguous(), delta, *grad.stride()[:3], L, H,
            HAS_LSE=grad_lse is not None, ROWS=rows, D=D,
        )  # fmt: skip
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    if k_tiles.num_tiles:
        _backward_k[k_tiles.num_tiles, k.shape[2], B](
            q, k, v, grad, lse, delta, dk, dv, k_tiles.q_tiles, k_tiles.full_indptr, k_tiles.full_starts,
            k_tiles.tail_indptr, k_tiles.tails, scale, *strides, L, H, k.shape[1], GROUP=H // k.shape[2],
            BLOCK_Q=k_config.block_q, BLOCK_K=k_config.block_k, D=D, PRECISION=_precision(q.dtype),
            num_warps=k_config.num_warps, num_stages=k_config.num_stages,
        )  # fmt: skip
    if q_tiles.num_tiles:
        _backward_q[q_tiles.num_tiles, H, B](
            q, k, v, grad, lse, delta, dq, q_tiles.q_tiles, q_tiles.full_indptr, q_tiles.full_starts,
            q_tiles.tail_indptr, q_tiles.tails, scale, *strides, L, H, GROUP=H // k.shape[2],
            BLOCK_Q=q_config.block_q, BLOCK_K=q_config.block_k, D=D, PRECISION=_precision(q.dtype),
            num_warps=q_config.num_warps, num_stages=q_config.num_stages,
        )  # fmt: skip
