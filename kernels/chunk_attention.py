"""Triton kernels of `chunk_attention`: forward, and a backward without atomics.

A program owns one tile of a query range (or, for the key and value gradients, one tile of a key range) of one head and
walks the tile list that its range shares: first all full tiles, without any mask, then the few tails, masked. The order
is the list's, so a result does not depend on what else is in the batch. On Hopper the forward pass of half-precision
inputs is the kernel of `chunk_attention_hopper` where the installed Triton has its language.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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
def _load_rows(X, b, h, start, length, stride_b, stride_l, stride_h, ROWS: tl.constexpr, D: tl.constexpr,
               FULL: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows ``start ...`` of one head of X ``[B, L, H, D]`` as ``[ROWS, D]``; rows beyond ``length`` are 0.

    With TMA, X is a tensor descriptor: no address is held in registers, which is what lets 128-row tiles fit.
    """
    inside = tl.arange(0, ROWS)[:, None] < length
    if TMA:
        tile = X.load([b, start, h, 0]).reshape(ROWS, D)
        if not FULL:  # the rows behind the tail belong to somebody else and may hold anything, NaN included
            tile = tl.where(inside, tile, tl.zeros_like(tile))
    else:
        base = X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + start.to(tl.int64) * stride_l
        address = base + tl.arange(0, ROWS)[:, None] * stride_l + tl.arange(0, D)[None, :]
        if FULL:
            tile = tl.load(address)
        else:
            tile = tl.load(address, mask=inside, other=0.0)
    return tile


@triton.jit
def _softmax_step(
    acc, m, total, q, K, V, b, h, start, length, scale_log2,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    ROWS: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running maximum ``m``, sum ``total`` and output ``acc``."""
    k = _load_rows(K, b, h, start, length, stride_kb, stride_kl, stride_kh, ROWS, D, FULL, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if not FULL:
        s = tl.where(tl.arange(0, ROWS)[None, :] < length, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no weight yet, instead of exp2(-inf - -inf)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    correction = tl.exp2(m - shift)
    total = total * correction + tl.sum(p, 1)
    acc = acc * correction[:, None]
    v = _load_rows(V, b, h, start, length, stride_vb, stride_vl, stride_vh, ROWS, D, FULL, TMA)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m_new, total


@triton.jit(do_not_specialize=["L"])
def _forward(
    Q, K, V, Out, Lse, q_tiles, full_indptr, full_starts, tail_indptr, tails, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    L, H, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start = tl.load(q_tiles + 4 * tile)
    q_length = tl.load(q_tiles + 4 * tile + 1)
    index = tl.load(q_tiles + 4 * tile + 2)
    rows_q, cols = tl.arange(0, BLOCK_Q), tl.arange(0, D)
    h_k = h // GROUP
    q = _load_rows(Q, b, h, q_start, q_length, stride_qb, stride_ql, stride_qh, BLOCK_Q, D, False, False)

    scale_log2 = scale * LOG2E
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    first, last = tl.load(full_indptr + index), tl.load(full_indptr + index + 1)
    start = tl.load(full_starts + first)
    for t in range(first, last):
        following = tl.load(full_starts + t + 1)  # one ahead, so that no address waits for a load
        acc, m, total = _softmax_step(
            acc, m, total, q, K, V, b, h_k, start, BLOCK_K, scale_log2,
            stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, BLOCK_K, D, True, TMA, PRECISION,
        )  # fmt: skip
        start = following
    for t in tl.range(tl.load(tail_indptr + index), tl.load(tail_indptr + index + 1), num_stages=1):
        acc, m, total = _softmax_step(
            acc, m, total, q, K, V, b, h_k, tl.load(tails + 2 * t), tl.load(tails + 2 * t + 1), scale_log2,
            stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, BLOCK_K, D, False, TMA, PRECISION,
        )  # fmt: skip

    seen = total != 0  # not "> 0": a NaN among the visible keys must show
    out = acc * tl.where(seen, 1.0 / total, 0.0)[:, None]
    lse = tl.where(seen, (m + tl.log2(total)) * LN2, float("-inf"))
    inside = rows_q < q_length
    row = q_start.to(tl.int64) + rows_q
    at = ((b.to(tl.int64) * L + row) * H + h)[:, None] * D + cols[None, :]
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=inside[:, None])
    tl.store(Lse + (b.to(tl.int64) * H + h) * L + row, lse, mask=inside)


@triton.jit(do_not_specialize=["L", "slots"])
def _merge(Parts, PartsLse, Out, Lse, merges, slots, L, H, TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Join the parts of a tile of queries whose keys were shared out, in the order of the parts."""
    item, rows, cols = merges + 5 * tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    b = tl.program_id(2).to(tl.int64)
    q_start, q_length, h = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    first, last = tl.load(item + 3), tl.load(item + 3) + tl.load(item + 4)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    for part in range(first, last):
        m = tl.maximum(m, tl.load(PartsLse + (b * slots + part) * TILE + rows))
    shift = tl.where(m == float("-inf"), 0.0, m) * LOG2E
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for part in range(first, last):
        row = (b * slots + part) * TILE + rows
        weight = tl.exp2(tl.load(PartsLse + row) * LOG2E - shift)
        total += weight
        acc += weight[:, None] * tl.load(Parts + row[:, None] * D + cols[None, :])
    seen = total != 0
    out = acc * tl.where(seen, 1.0 / total, 0.0)[:, None]
    inside = rows < q_length
    row = q_start.to(tl.int64) + rows
    at = ((b * L + row) * H + h)[:, None] * D + cols[None, :]
    tl.store(Out + at, out.to(Out.dtype.element_ty), mask=inside[:, None])
    lse = tl.where(seen, (shift + tl.log2(total)) * LN2, float("-inf"))
    tl.store(Lse + (b * H + h) * L + row, lse, mask=inside)


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
    k = _load_rows(K, b, h, start, length, stride_kb, stride_kl, stride_kh, ROWS, D, FULL, TMA)
    v = _load_rows(V, b, h, start, length, stride_vb, stride_vl, stride_vh, ROWS, D, FULL, TMA)
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
    q = _load_rows(Q, b, h, q_start, q_length, stride_qb, stride_ql, stride_qh, BLOCK_Q, D, False, False)
    g = _load_rows(Grad, b, h, q_start, q_length, stride_gb, stride_gl, stride_gh, BLOCK_Q, D, False, False)
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
    q = _load_rows(Q, b, h, start, length, stride_qb, stride_ql, stride_qh, ROWS, D, FULL, TMA)
    if FULL:
        lse = tl.load(lse_ptr + start + rows)
    else:  # an infinite log-sum-exp gives the queries beyond the tail a weight of exactly 0
        lse = tl.load(lse_ptr + start + rows, mask=rows < length, other=float("inf"))
    st = tl.dot(k, q.T, input_precision=PRECISION)
    pt = tl.exp2(st * scale_log2 - (lse * LOG2E)[None, :])
    g = _load_rows(Grad, b, h, start, length, stride_gb, stride_gl, stride_gh, ROWS, D, FULL, TMA)
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
    k = _load_rows(K, b, h_k, k_start, k_length, stride_kb, stride_kl, stride_kh, BLOCK_K, D, False, False)
    v = _load_rows(V, b, h_k, k_start, k_length, stride_vb, stride_vl, stride_vh, BLOCK_K, D, False, False)

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


def readable(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernels can read it, else a copy.

    Channels must be packed, and tokens so close that the offsets within a tile, at most 128 of them, fit 32 bits.
    """
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _use_tma(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine of Hopper and later can fetch tiles: aligned rows and strides, nothing expanded."""
    return all(
        x.is_cuda
        and x.element_size() == 2
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])
        for x in tensors
    ) and torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)


def _tiles_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[-1]])


def _precision(dtype: torch.dtype) -> str:
    """float32 products in full float32: the tensor cores' tf32 keeps 10 bits."""
    return "ieee" if dtype == torch.float32 else "tf32"


def capability(x: torch.Tensor) -> int:
    """Compute capability of the tensor's GPU as 80, 90, ...; 80 for the interpreter."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def forward_config(head_dim: int, dtype: torch.dtype, capability: int) -> Config:
    """Tiles of the forward kernel."""
    if dtype == torch.float32:
        return Config(64, 64, 4, 2) if head_dim <= 64 else Config(64, 32, 4, 2)
    if head_dim == 256:
        return Config(128, 64, 8, 2) if _is_large(capability) else Config(64, 32, 4, 2)
    if head_dim == 128:
        return Config(128, 128, 8, 3) if _is_large(capability) else Config(128, 64, 8, 2)
    return Config(128, 64, 4, 3)


def backward_configs(head_dim: int, dtype: torch.dtype, capability: int) -> tuple[Config, Config]:
    """Tiles of the two backward kernels: the one that owns queries and the one that owns keys."""
    if dtype == torch.float32:
        if head_dim > 64:
            return Config(32, 32, 4, 1), Config(32, 32, 4, 1)
        return Config(64, 32, 4, 2), Config(32, 64, 4, 2)
    if head_dim == 256:
        return Config(64, 32, 8, 1), Config(32, 64 if _is_large(capability) else 32, 8, 1)
    if head_dim == 128 and _is_large(capability):
        return Config(128, 64, 8, 3), Config(64, 64, 4, 2)
    return Config(64, 64, 4, 2), Config(64, 64, 4, 2)


def _is_large(capability: int) -> bool:
    """Whether an SM has the 227 KiB of shared memory of Hopper's and Blackwell's data-centre parts."""
    return capability in (90, 100, 103)


def aot_cases(capability: int):
    """Cases to compile without a GPU: ``(kernel, signature, constexprs, options)``."""
    ranges = dict.fromkeys(("full_indptr", "full_starts", "tail_indptr", "tails"), "*i32") | {"scale": "fp32"}
    heads = dict.fromkeys([f"stride_{x}{axis}" for x in "qkv" for axis in "blh"] + ["L", "H"], "i32")
    for dtype, name, D in ((torch.bfloat16, "bf16", 128), (torch.float32, "fp32", 32)):
        tma = capability >= 90 and dtype == torch.bfloat16
        shared = {"D": D, "PRECISION": _precision(dtype), "GROUP": 1, "TMA": tma}

        def tile(rows, name=name, D=D, tma=tma):
            return f"tensordesc<{name}[1, {rows}, 1, {D}]>" if tma else f"*{name}"

        config = forward_config(D, dtype, capability)
        tensors = {x: f"*{name}" for x in ("Q", "Out")} | {x: tile(config.block_k) for x in "KV"}
        yield _case(_forward, tensors | {"Lse": "*fp32", "q_tiles": "*i32"} | ranges | heads, shared, config)

        grads = {x: "*fp32" for x in ("Lse", "Delta")} | {f"stride_g{axis}": "i32" for axis in "blh"}
        config, keys = backward_configs(D, dtype, capability)
        tensors = {x: f"*{name}" for x in ("Q", "Grad", "DQ")} | {x: tile(config.block_k) for x in "KV"}
        yield _case(_backward_q, tensors | {"q_tiles": "*i32"} | grads | ranges | heads, shared, config)
        tensors = {x: f"*{name}" for x in ("K", "V", "DK", "DV")} | {x: tile(keys.block_q) for x in ("Q", "Grad")}
        yield _case(_backward_k, tensors | {"k_tiles": "*i32", "LK": "i32"} | grads | ranges | heads, shared, keys)
    tensors = {"Out": "*bf16", "merges": "*i32"} | dict.fromkeys(("Parts", "PartsLse", "Lse"), "*fp32")
    sizes = dict.fromkeys(("slots", "L", "H"), "i32")
    yield _merge, tensors | sizes, {"TILE": 128, "ROWS": 16, "D": 128}, {"num_warps": 4, "num_stages": 2}
    strides = dict.fromkeys(("stride_gb", "stride_gl", "stride_gh", "L", "H"), "i32")
    tensors = {"Out": "*bf16", "Grad": "*bf16", "GradLse": "*fp32", "Delta": "*fp32"}
    yield _delta, tensors | strides, {"HAS_LSE": True, "ROWS": 64, "D": 128}, {"num_warps": 4, "num_stages": 2}


def _case(kernel, signature: dict, shared: dict, config: Config):
    constexprs = shared | {"BLOCK_Q": config.block_q, "BLOCK_K": config.block_k}
    return kernel, signature, constexprs, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def forward(q, k, v, out, lse, tiles, scale: float, config: Config) -> None:
    """Fill ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]`` (both contiguous) for every query of ``tiles``."""
    B, L, H, D = q.shape
    if not (tiles.num_tiles and B and H):
        return
    q, k, v = (readable(x) for x in (q, k, v))
    tma = _use_tma(k, v)
    keys, values = (_tiles_of(x, config.block_k) if tma else x for x in (k, v))
    _forward[tiles.num_tiles, H, B](
        q, keys, values, out, lse,
        tiles.q_tiles, tiles.full_indptr, tiles.full_starts, tiles.tail_indptr, tiles.tails, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], L, H, GROUP=H // k.shape[2],
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, D=D, TMA=tma, PRECISION=_precision(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def merge(parts, parts_lse, out, lse, merges) -> None:
    """Join parts of tiles of queries, each over its share of the keys, into ``out [B, Lq, H, D]`` and ``lse``.

    Args:
        parts, parts_lse: ``[B, slots, rows, D]`` and ``[B, slots, rows]`` float32: outputs and log-sum-exps.
        merges: int32 ``[n, 5]`` of (first query, queries, head, first slot, parts).
    """
    B, slots, tile, D = parts.shape
    if not (len(merges) and B):
        return
    rows = 16
    _merge[len(merges), tile // rows, B](
        parts, parts_lse, out, lse, merges, slots, out.shape[1], out.shape[2], TILE=tile, ROWS=rows, D=D
    )


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
    tma = _use_tma(q, k, v, grad)
    if k_tiles.num_tiles:
        queries, grads = (_tiles_of(x, k_config.block_q) if tma else x for x in (q, grad))
        _backward_k[k_tiles.num_tiles, k.shape[2], B](
            queries, k, v, grads, lse, delta, dk, dv, k_tiles.q_tiles, k_tiles.full_indptr, k_tiles.full_starts,
            k_tiles.tail_indptr, k_tiles.tails, scale, *strides, L, H, k.shape[1], GROUP=H // k.shape[2],
            BLOCK_Q=k_config.block_q, BLOCK_K=k_config.block_k, D=D, TMA=tma,
            PRECISION=_precision(q.dtype), num_warps=k_config.num_warps, num_stages=k_config.num_stages,
        )  # fmt: skip
    if q_tiles.num_tiles:
        keys, values = (_tiles_of(x, q_config.block_k) if tma else x for x in (k, v))
        _backward_q[q_tiles.num_tiles, H, B](
            q, keys, values, grad, lse, delta, dq, q_tiles.q_tiles, q_tiles.full_indptr, q_tiles.full_starts,
            q_tiles.tail_indptr, q_tiles.tails, scale, *strides, L, H, GROUP=H // k.shape[2],
            BLOCK_Q=q_config.block_q, BLOCK_K=q_config.block_k, D=D, TMA=tma,
            PRECISION=_precision(q.dtype), num_warps=q_config.num_warps, num_stages=q_config.num_stages,
        )  # fmt: skip
