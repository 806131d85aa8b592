"""Triton forward of `chunk_attention`; the backward is in `chunk_attention_backward`.

A program owns one tile of a query range of one head and walks the tile list that its range shares: first all full
tiles, without any mask, then the few tails, masked. The order is the list's, so a result does not depend on what else
is in the batch. On Hopper the forward pass of half-precision inputs is the kernel of `chunk_attention_hopper` where the
installed Triton has its language.
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
def load_rows(X, b, h, start, length, stride_b, stride_l, stride_h, ROWS: tl.constexpr, D: tl.constexpr,
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
    k = load_rows(K, b, h, start, length, stride_kb, stride_kl, stride_kh, ROWS, D, FULL, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if not FULL:
        s = tl.where(tl.arange(0, ROWS)[None, :] < length, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no weight yet, instead of exp2(-inf - -inf)
    p = tl.exp2(s * scale_log2 - shift[:, None])
    correction = tl.exp2(m - shift)
    total = total * correction + tl.sum(p, 1)
    acc = acc * correction[:, None]
    v = load_rows(V, b, h, start, length, stride_vb, stride_vl, stride_vh, ROWS, D, FULL, TMA)
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
    q = load_rows(Q, b, h, q_start, q_length, stride_qb, stride_ql, stride_qh, BLOCK_Q, D, False, False)

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


def readable(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernels can read it, else a copy.

    Channels must be packed, and tokens so close that the offsets within a tile, at most 128 of them, fit 32 bits.
    """
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def use_tma(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine of Hopper and later can fetch tiles: aligned rows and strides, nothing expanded."""
    return all(
        x.is_cuda
        and x.element_size() == 2
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])
        for x in tensors
    ) and torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)


def tiles_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, x.shape[-1]])


def precision(dtype: torch.dtype) -> str:
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
        return Config(128, 64, 8, 2) if is_large(capability) else Config(64, 32, 4, 2)
    if head_dim == 128:
        return Config(128, 128, 8, 3) if is_large(capability) else Config(128, 64, 8, 2)
    return Config(128, 64, 4, 3)


def is_large(capability: int) -> bool:
    """Whether an SM has the 227 KiB of shared memory of Hopper's and Blackwell's data-centre parts."""
    return capability in (90, 100, 103)


def aot_cases(capability: int):
    """Cases to compile without a GPU: ``(kernel, signature, constexprs, options)``."""
    for dtype, name, D, tma in aot_shapes(capability):
        config = forward_config(D, dtype, capability)
        tensors = {x: f"*{name}" for x in ("Q", "Out")} | {x: aot_tile(name, config.block_k, D, tma) for x in "KV"}
        yield aot_case(_forward, tensors | {"Lse": "*fp32", "q_tiles": "*i32"}, dtype, D, tma, config)
    tensors = {"Out": "*bf16", "merges": "*i32"} | dict.fromkeys(("Parts", "PartsLse", "Lse"), "*fp32")
    sizes = dict.fromkeys(("slots", "L", "H"), "i32")
    yield _merge, tensors | sizes, {"TILE": 128, "ROWS": 16, "D": 128}, {"num_warps": 4, "num_stages": 2}


def aot_shapes(capability: int):
    """Dtype, its name in Triton, head dim, and whether tiles come by the copy engine."""
    yield torch.bfloat16, "bf16", 128, capability >= 90
    yield torch.float32, "fp32", 32, False


def aot_tile(name: str, rows: int, D: int, tma: bool) -> str:
    """Type of an argument that tiles are read from."""
    return f"tensordesc<{name}[1, {rows}, 1, {D}]>" if tma else f"*{name}"


def aot_case(kernel, signature: dict, dtype: torch.dtype, D: int, tma: bool, config: Config):
    """A case, with the arguments that all kernels over ranges have."""
    ranges = dict.fromkeys(("full_indptr", "full_starts", "tail_indptr", "tails"), "*i32") | {"scale": "fp32"}
    heads = dict.fromkeys([f"stride_{x}{axis}" for x in "qkv" for axis in "blh"] + ["L", "H"], "i32")
    constexprs = {"D": D, "PRECISION": precision(dtype), "GROUP": 1, "TMA": tma}
    constexprs |= {"BLOCK_Q": config.block_q, "BLOCK_K": config.block_k}
    return (
        kernel,
        signature | ranges | heads,
        constexprs,
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def forward(q, k, v, out, lse, tiles, scale: float, config: Config) -> None:
    """Fill ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]`` (both contiguous) for every query of ``tiles``."""
    B, L, H, D = q.shape
    if not (tiles.num_tiles and B and H):
        return
    q, k, v = (readable(x) for x in (q, k, v))
    tma = use_tma(k, v)
    keys, values = (tiles_of(x, config.block_k) if tma else x for x in (k, v))
    _forward[tiles.num_tiles, H, B](
        q, keys, values, out, lse,
        tiles.q_tiles, tiles.full_indptr, tiles.full_starts, tiles.tail_indptr, tiles.tails, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], L, H, GROUP=H // k.shape[2],
        BLOCK_Q=config.block_q, BLOCK_K=config.block_k, D=D, TMA=tma, PRECISION=precision(q.dtype),
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
