"""Triton backward of `chunk_attention`, without atomics.

Two kernels over tile lists: one owns tiles of queries and walks the keys that they see, the other owns tiles of keys
and walks the queries that see them. Weights are computed in both: 7 products where 5 are needed, but every gradient is
a sum in the order of a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from raven.kernels.chunk_attention import (
    LOG2E,
    Config,
    aot_case,
    aot_shapes,
    aot_tile,
    is_large,
    load_rows,
    precision,
    readable,
    tiles_of,
    use_tma,
)


@triton.jit(do_not_specialize=["L"])
def _delta(Out, Grad, GradLse, Delta, stride_gb, stride_gl, stride_gh, L, H, HAS_LSE: tl.constexpr,
           ROWS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``sum_d out * grad_out - grad_lse`` per query: what the softmax subtracts from every weight's gradient."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h, b = tl.program_id(1), tl.program_id(2)
    cols, inside = tl.arange(0, D), rows < L
    row = rows.to(tl.int64)
    at_o = ((b.to(tl.int64) * L + row) * H + h)[:, None] * D + cols[None, :]
    at_g = (b.to(tl.int64) * stride_gb + row * stride_gl + h.to(tl.int64) * stride_gh)[:, None] + cols[None, :]
    o = tl.load(Out + at_o, mask=inside[:, None], other=0.0)
    g = tl.load(Grad + at_g, mask=inside[:, None], other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    if HAS_LSE:
        delta -= tl.load(GradLse + (b.to(tl.int64) * H + h) * L + row, mask=inside, other=0.0)
    tl.store(Delta + (b.to(tl.int64) * H + h) * L + row, delta, mask=inside)


@triton.jit
def _query_step(
    dq, q, g, lse, delta, K, V, b, h, start, length, scale_log2,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    ROWS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a tile of queries."""
    k = load_rows(K, b, h, start, length, stride_kb, stride_kl, stride_kh, ROWS, D, FULL, TMA)
    v = load_rows(V, b, h, start, length, stride_vb, stride_vl, stride_vh, ROWS, D, FULL, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    dp = tl.dot(g, v.T, input_precision=PRECISION)
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if not FULL:  # keys beyond the tail were loaded as 0, whose weight exp(0 - lse) may overflow
        p = tl.where(tl.arange(0, ROWS)[None, :] < length, p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["L"])
def _backward_q(
    Q, K, V, Grad, Lse, Delta, DQ, q_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, L, H, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start = tl.load(q_tiles + 4 * tile)
    q_length = tl.load(q_tiles + 4 * tile + 1)
    index = tl.load(q_tiles + 4 * tile + 2)
    rows_q, cols = tl.arange(0, BLOCK_Q), tl.arange(0, D)
    h_k = h // GROUP
    q = load_rows(Q, b, h, q_start, q_length, stride_qb, stride_ql, stride_qh, BLOCK_Q, D, False, False)
    g = load_rows(Grad, b, h, q_start, q_length, stride_gb, stride_gl, stride_gh, BLOCK_Q, D, False, False)
    inside = rows_q < q_length
    row = q_start.to(tl.int64) + rows_q
    lse = tl.load(Lse + (b.to(tl.int64) * H + h) * L + row, mask=inside, other=float("inf")) * LOG2E
    delta = tl.load(Delta + (b.to(tl.int64) * H + h) * L + row, mask=inside, other=0.0)

    scale_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_Q, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    start = tl.load(full_starts + first)
    for t in range(first, last):
        following = tl.load(full_starts + t + 1)
        dq = _query_step(
            dq, q, g, lse, delta, K, V, b, h_k, start, BLOCK_K, scale_log2,
            stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, BLOCK_K, D, True, TMA, PRECISION,
        )  # fmt: skip
        start = following
    for t in tl.range(tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1), num_stages=1):
        dq = _query_step(
            dq, q, g, lse, delta, K, V, b, h_k, tl.load(tails + 2 * t), tl.load(tails + 2 * t + 1), scale_log2,
            stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, BLOCK_K, D, False, TMA, PRECISION,
        )  # fmt: skip
    tl.store(
        DQ + ((b.to(tl.int64) * L + row) * H + h)[:, None] * D + cols[None, :], (dq * scale).to(DQ.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip


@triton.jit
def _key_step(
    dk, dv, k, v, Q, Grad, lse_ptr, delta_ptr, b, h, start, length, scale_log2,
    stride_qb, stride_ql, stride_qh, stride_gb, stride_gl, stride_gh,
    ROWS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys and values; scores are held transposed."""
    rows = tl.arange(0, ROWS)
    q = load_rows(Q, b, h, start, length, stride_qb, stride_ql, stride_qh, ROWS, D, FULL, TMA)
    if FULL:
        lse = tl.load(lse_ptr + start + rows)
    else:  # an infinite log-sum-exp gives the queries beyond the tail a weight of exactly 0
        lse = tl.load(lse_ptr + start + rows, mask=rows < length, other=float("inf"))
    st = tl.dot(k, q.T, input_precision=PRECISION)
    pt = tl.exp2(st * scale_log2 - (lse * LOG2E)[None, :])
    g = load_rows(Grad, b, h, start, length, stride_gb, stride_gl, stride_gh, ROWS, D, FULL, TMA)
    dv = tl.dot(pt.to(g.dtype), g, dv, input_precision=PRECISION)
    if FULL:
        delta = tl.load(delta_ptr + start + rows)
    else:
        delta = tl.load(delta_ptr + start + rows, mask=rows < length, other=0.0)
    dpt = tl.dot(v, g.T, input_precision=PRECISION)
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["L", "LK"])
def _backward_k(
    Q, K, V, Grad, Lse, Delta, DK, DV, k_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh, L, H, LK, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h_k, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_start = tl.load(k_tiles + 4 * tile)
    k_length = tl.load(k_tiles + 4 * tile + 1)
    index = tl.load(k_tiles + 4 * tile + 2)
    rows_k, cols = tl.arange(0, BLOCK_K), tl.arange(0, D)
    k = load_rows(K, b, h_k, k_start, k_length, stride_kb, stride_kl, stride_kh, BLOCK_K, D, False, False)
    v = load_rows(V, b, h_k, k_start, k_length, stride_vb, stride_vl, stride_vh, BLOCK_K, D, False, False)

    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_K, D], tl.float32)
    dv = tl.zeros([BLOCK_K, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    tail_first, tail_last = tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1)
    for member in range(GROUP):  # the query heads that share this key head, in a fixed order
        h = h_k * GROUP + member
        lse_ptr = Lse + (b.to(tl.int64) * H + h) * L
        delta_ptr = Delta + (b.to(tl.int64) * H + h) * L
        start = tl.load(full_starts + first)
        for t in range(first, last):
            following = tl.load(full_starts + t + 1)
            dk, dv = _key_step(
                dk, dv, k, v, Q, Grad, lse_ptr, delta_ptr, b, h, start, BLOCK_Q, scale_log2,
                stride_qb, stride_ql, stride_qh, stride_gb, stride_gl, stride_gh, BLOCK_Q, D, True, TMA, PRECISION,
            )  # fmt: skip
            start = following
        for t in tl.range(tail_first, tail_last, num_stages=1):
            dk, dv = _key_step(
                dk, dv, k, v, Q, Grad, lse_ptr, delta_ptr, b, h, tl.load(tails + 2 * t), tl.load(tails + 2 * t + 1),
                scale_log2, stride_qb, stride_ql, stride_qh, stride_gb, stride_gl, stride_gh,
                BLOCK_Q, D, False, TMA, PRECISION,
            )  # fmt: skip
    inside = (rows_k < k_length)[:, None]
    row = k_start.to(tl.int64) + rows_k
    at = ((b.to(tl.int64) * LK + row) * tl.num_programs(1) + h_k)[:, None] * D + cols[None, :]
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=inside)


def backward_configs(head_dim: int, dtype: torch.dtype, capability: int) -> tuple[Config, Config]:
    """Tiles of the two backward kernels: the one that owns queries and the one that owns keys."""
    if dtype == torch.float32:
        if head_dim > 64:
            return Config(32, 32, 4, 1), Config(32, 32, 4, 1)
        return Config(64, 32, 4, 2), Config(32, 64, 4, 2)
    if head_dim == 256:
        return Config(64, 32, 8, 1), Config(32, 64 if is_large(capability) else 32, 8, 1)
    if head_dim == 128 and is_large(capability):
        return Config(128, 64, 8, 3), Config(64, 64, 4, 2)
    return Config(64, 64, 4, 2), Config(64, 64, 4, 2)


def aot_cases(capability: int):
    """Cases to compile without a GPU: ``(kernel, signature, constexprs, options)``."""
    for dtype, name, D, tma in aot_shapes(capability):
        grads = {x: "*fp32" for x in ("Lse", "Delta")} | {f"stride_g{axis}": "i32" for axis in "blh"}
        queries, keys = backward_configs(D, dtype, capability)
        tensors = {x: f"*{name}" for x in ("Q", "Grad", "DQ")}
        tensors |= {x: aot_tile(name, queries.block_k, D, tma) for x in "KV"} | {"q_tiles": "*i32"}
        yield aot_case(_backward_q, tensors | grads, dtype, D, tma, queries)
        tensors = {x: f"*{name}" for x in ("K", "V", "DK", "DV")} | {"k_tiles": "*i32", "LK": "i32"}
        tensors |= {x: aot_tile(name, keys.block_q, D, tma) for x in ("Q", "Grad")}
        yield aot_case(_backward_k, tensors | grads, dtype, D, tma, keys)
    strides = dict.fromkeys(("stride_gb", "stride_gl", "stride_gh", "L", "H"), "i32")
    tensors = {"Out": "*bf16", "Grad": "*bf16", "GradLse": "*fp32", "Delta": "*fp32"}
    yield _delta, tensors | strides, {"HAS_LSE": True, "ROWS": 64, "D": 128}, {"num_warps": 4, "num_stages": 2}


def backward(
    grad, grad_lse, q, k, v, out, lse, dq, dk, dv, q_tiles, k_tiles, scale: float, q_config: Config, k_config: Config
) -> None:
    """Fill dq, dk, dv (contiguous). ``k_tiles`` is the plan of the transposed ranges: key tiles and query lists."""
    B, L, H, D = q.shape
    q, k, v, grad = (readable(x) for x in (q, k, v, grad))
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
    tma = use_tma(q, k, v, grad)
    if k_tiles.num_tiles:
        queries, grads = (tiles_of(x, k_config.block_q) if tma else x for x in (q, grad))
        _backward_k[k_tiles.num_tiles, k.shape[2], B](
            queries, k, v, grads, lse, delta, dk, dv, k_tiles.q_tiles, k_tiles.full_indptr, k_tiles.full_starts,
            k_tiles.tail_indptr, k_tiles.tails, scale, *strides, L, H, k.shape[1], GROUP=H // k.shape[2],
            BLOCK_Q=k_config.block_q, BLOCK_K=k_config.block_k, D=D, TMA=tma,
            PRECISION=precision(q.dtype), num_warps=k_config.num_warps, num_stages=k_config.num_stages,
        )  # fmt: skip
    if q_tiles.num_tiles:
        keys, values = (tiles_of(x, q_config.block_k) if tma else x for x in (k, v))
        _backward_q[q_tiles.num_tiles, H, B](
            q, keys, values, grad, lse, delta, dq, q_tiles.q_tiles, q_tiles.full_indptr, q_tiles.full_starts,
            q_tiles.tail_indptr, q_tiles.tails, scale, *strides, L, H, GROUP=H // k.shape[2],
            BLOCK_Q=q_config.block_q, BLOCK_K=q_config.block_k, D=D, TMA=tma,
            PRECISION=precision(q.dtype), num_warps=q_config.num_warps, num_stages=q_config.num_stages,
        )  # fmt: skip
