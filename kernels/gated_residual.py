"""Triton kernels of `gated_residual` and `modulate`: one read and one write of each tensor, forward and backward.

A program owns a block of consecutive tokens of one segment and takes them one after the other, a whole row in
registers. The rows of the tables that it needs stay the same meanwhile, and come from the caches. In the backward a
program adds up its tokens' share of the tables' gradients in registers; a second kernel adds up the programs' shares.
How tokens are cut into blocks depends on the shapes alone, and so do the bits of those sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.graphs import held_by_graphs

# How work is cut. A tuning script may change it, and calls ``cut.cache_clear()`` after each change.
# elements: of a row that one thread holds at most, which sets the number of warps
# rows:     tokens of a block (forward)
# programs: blocks in all, about (backward): their shares of the tables' gradients are written and added up
# stages:   of copies into shared memory ahead of the computation; 1: straight into registers
# registers: of a thread at most
CONFIGS = {
    "forward": {"elements": 48, "rows": 1, "stages": 1, "registers": None},
    "backward": {"elements": 24, "programs": 528, "stages": 1, "registers": None},
    "sums": {"columns": 32, "rows": 256, "warps": 8},  # of shares: what a program adds up at once
}


@triton.jit
def load_part(ptr, C: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, POLICY: tl.constexpr):
    """Channels FIRST .. FIRST + SIZE of a row in float32; those beyond C are zero."""
    channel = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > C:
        values = tl.load(ptr + channel, mask=channel < C, other=0.0, eviction_policy=POLICY)
    else:
        values = tl.load(ptr + channel, eviction_policy=POLICY)
    return values


@triton.jit
def store_part(ptr, values, C: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    channel = FIRST + tl.arange(0, SIZE)
    if FIRST + SIZE > C:
        tl.store(ptr + channel, values.to(ptr.dtype.element_ty), mask=channel < C)
    else:
        tl.store(ptr + channel, values.to(ptr.dtype.element_ty))


@triton.jit
def load_row(ptr, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, POLICY: tl.constexpr):
    """A row in two parts of A and B channels, as stored; without a second part (B = 0) the first stands in for it."""
    a = load_part(ptr, C, 0, A, POLICY)
    if B > 0:
        b = load_part(ptr, C, A, B, POLICY)
    else:
        b = a
    return a, b


@triton.jit
def store_row(ptr, a, b, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    store_part(ptr, a, C, 0, A)
    if B > 0:
        store_part(ptr, b, C, A, B)


@triton.jit
def as_factor(scale, AFFINE: tl.constexpr):
    """What a normalised row is multiplied by, float32."""
    scale = scale.to(tl.float32)
    if not AFFINE:
        scale += 1.0
    return scale


@triton.jit
def folded(a, b, A: tl.constexpr, B: tl.constexpr):
    """The first part added onto the second inside each thread, so that threads exchange one sum and not two."""
    if B > 0:
        a = tl.sum(tl.reshape(a, [A // B, B]), axis=0) + b
    return a


@triton.jit
def without_padding(values, C: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Zero beyond C."""
    if FIRST + SIZE > C:
        values = tl.where(FIRST + tl.arange(0, SIZE) < C, values, 0.0)
    return values


@triton.jit
def find_block(items_ptr, tokens, segments, length, blocks, ROWS):
    """The program's batch entry, segment, first token and number of tokens.

    Segments of one length are cut into ``blocks`` of ROWS tokens; else ``items`` lists the ``blocks`` of a batch entry.
    """
    pid = tl.program_id(0)
    if items_ptr is None:
        place = pid // blocks
        start = (pid % blocks) * ROWS
        batch = place // segments
        segment = place % segments
        first = segment * length + start
        count = tl.minimum(length - start, ROWS)
    else:
        batch = pid // blocks
        item = items_ptr + 3 * (pid % blocks)
        segment = tl.load(item)
        first = tl.load(item + 1)
        count = tl.load(item + 2)
    return batch.to(tl.int64), segment.to(tl.int64), first, count


@triton.jit(do_not_specialize=["tokens", "segments", "length", "blocks"])
def _forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, total_ptr, y_ptr, stats_ptr, items_ptr,
    tokens, segments, length, blocks, x_batch, x_token, branch_batch, branch_token, gate_batch, gate_segment,
    shift_batch, shift_segment, scale_batch, scale_segment, eps,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x, branch [B, L, C] with any batch and token stride to packed total and y; a missing pointer leaves its part out.

    Without a branch the rows of x are normalised; without y they are only added up.
    """
    batch, segment, first, count = find_block(items_ptr, tokens, segments, length, blocks, ROWS)
    gate = gate_ptr
    if gate_ptr is not None:
        gate += batch * gate_batch + segment * gate_segment
    if y_ptr is not None:
        scale = scale_ptr + batch * scale_batch + segment * scale_segment
        shift = shift_ptr + batch * shift_batch + segment * shift_segment
    if ROWS == 1:
        count = 1  # known when compiled: no loop is left
    else:
        if gate_ptr is not None:
            gate_a, gate_b = load_row(gate, C, A, B, "evict_last")
        if y_ptr is not None:
            scale_a, scale_b = load_row(scale, C, A, B, "evict_last")
            shift_a, shift_b = load_row(shift, C, A, B, "evict_last")
    for i in tl.range(0, count, num_stages=STAGES):
        token = (first + i).to(tl.int64)
        row = batch * tokens + token
        a, b = load_row(x_ptr + batch * x_batch + token * x_token, C, A, B, "evict_first")
        if branch_ptr is not None:
            branch = branch_ptr + batch * branch_batch + token * branch_token
            added_a, added_b = load_row(branch, C, A, B, "evict_first")
            added_a = added_a.to(tl.float32)
            added_b = added_b.to(tl.float32)
            if gate_ptr is not None:
                if ROWS == 1:
                    gate_a, gate_b = load_row(gate, C, A, B, "evict_last")
                added_a *= gate_a.to(tl.float32)
                added_b *= gate_b.to(tl.float32)
            a = (a.to(tl.float32) + added_a).to(total_ptr.dtype.element_ty)
            b = (b.to(tl.float32) + added_b).to(total_ptr.dtype.element_ty)
            store_row(total_ptr + row * C, a, b, C, A, B)
        if y_ptr is not None:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
            mean = tl.sum(folded(a, b, A, B)) / C
            a = without_padding(a - mean, C, 0, A)
            b = without_padding(b - mean, C, A, B) if B > 0 else a
            rstd = tl.rsqrt(tl.sum(folded(a * a, b * b, A, B)) / C + eps)
            if stats_ptr is not None:
                tl.store(stats_ptr + 2 * row, mean)
                tl.store(stats_ptr + 2 * row + 1, rstd)
            if ROWS == 1:
                scale_a, scale_b = load_row(scale, C, A, B, "evict_last")
                shift_a, shift_b = load_row(shift, C, A, B, "evict_last")
            a = a * rstd * as_factor(scale_a, AFFINE) + shift_a.to(tl.float32)
            b = b * rstd * as_factor(scale_b, AFFINE) + shift_b.to(tl.float32)
            store_row(y_ptr + row * C, a, b, C, A, B)


@triton.jit
def add_pairs(x, y, other_x, other_y):
    return x + other_x, y + other_y


@triton.jit
def two_means(x, y, xb, yb, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Means of the rows (x, xb) and (y, yb), in one exchange between threads."""
    sum_x, sum_y = tl.reduce((folded(x, xb, A, B), folded(y, yb, A, B)), 0, add_pairs)
    return sum_x / C, sum_y / C


@triton.jit(do_not_specialize=["tokens", "segments", "length", "blocks", "rows"])
def _backward_kernel(
    grad_total_ptr, grad_y_ptr, total_ptr, stats_ptr, branch_ptr, gate_ptr, scale_ptr, dx_ptr, dbranch_ptr,
    dgate_ptr, dshift_ptr, dscale_ptr, items_ptr, tokens, segments, length, blocks, rows,
    grad_total_batch, grad_total_token, grad_y_batch, grad_y_token, total_batch, total_token,
    branch_batch, branch_token, gate_batch, gate_segment, scale_batch, scale_segment,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of a block, and its share of the tables' gradients: a row of dgate, dshift, dscale [P, C].

    A missing pointer leaves its part out.
    """
    batch, segment, first, count = find_block(items_ptr, tokens, segments, length, blocks, rows)
    gate_sum_a = tl.zeros([A], tl.float32)
    gate_sum_b = tl.zeros([B if B > 0 else A], tl.float32)
    shift_sum_a = gate_sum_a
    shift_sum_b = gate_sum_b
    scale_sum_a = gate_sum_a
    scale_sum_b = gate_sum_b
    if gate_ptr is not None:
        gate_a, gate_b = load_row(gate_ptr + batch * gate_batch + segment * gate_segment, C, A, B, "evict_last")
        gate_a = gate_a.to(tl.float32)
        gate_b = gate_b.to(tl.float32)
    if grad_y_ptr is not None:
        scale_a, scale_b = load_row(scale_ptr + batch * scale_batch + segment * scale_segment, C, A, B, "evict_last")
        scale_a = as_factor(scale_a, AFFINE)
        scale_b = as_factor(scale_b, AFFINE)
    for i in tl.range(0, count, num_stages=STAGES):
        token = (first + i).to(tl.int64)
        row = batch * tokens + token
        if grad_y_ptr is not None:
            grad_a, grad_b = load_row(grad_y_ptr + batch * grad_y_batch + token * grad_y_token, C, A, B, "evict_first")
            a, b = load_row(total_ptr + batch * total_batch + token * total_token, C, A, B, "evict_first")
            mean = tl.load(stats_ptr + 2 * row)
            rstd = tl.load(stats_ptr + 2 * row + 1)
        if grad_total_ptr is not None:
            grad_total = grad_total_ptr + batch * grad_total_batch + token * grad_total_token
            da, db = load_row(grad_total, C, A, B, "evict_first")
            da = da.to(tl.float32)
            db = db.to(tl.float32)
        if branch_ptr is not None:
            branch = branch_ptr + batch * branch_batch + token * branch_token
            branch_a, branch_b = load_row(branch, C, A, B, "evict_first")
        if grad_y_ptr is not None:
            grad_a = grad_a.to(tl.float32)
            grad_b = grad_b.to(tl.float32)
            a = (a.to(tl.float32) - mean) * rstd
            b = (b.to(tl.float32) - mean) * rstd
            if dshift_ptr is not None:
                shift_sum_a += grad_a
                shift_sum_b += grad_b
            if dscale_ptr is not None:
                scale_sum_a += grad_a * a
                scale_sum_b += grad_b * b
            grad_a *= scale_a
            grad_b *= scale_b
            mean_grad, along = two_means(grad_a, grad_a * a, grad_b, grad_b * b, C, A, B)
            grad_a = rstd * (grad_a - mean_grad - a * along)
            grad_b = rstd * (grad_b - mean_grad - b * along)
            if grad_total_ptr is not None:
                da += grad_a
                db += grad_b
            else:
                da = grad_a
                db = grad_b
        if dx_ptr is not None:
            store_row(dx_ptr + row * C, da, db, C, A, B)
        if dgate_ptr is not None:
            gate_sum_a += da * branch_a.to(tl.float32)
            gate_sum_b += db * branch_b.to(tl.float32)
        if dbranch_ptr is not None:
            if gate_ptr is not None:
                da *= gate_a
                db *= gate_b
            store_row(dbranch_ptr + row * C, da, db, C, A, B)
    share = tl.program_id(0).to(tl.int64) * C
    if dgate_ptr is not None:
        store_row(dgate_ptr + share, gate_sum_a, gate_sum_b, C, A, B)
    if dshift_ptr is not None:
        store_row(dshift_ptr + share, shift_sum_a, shift_sum_b, C, A, B)
    if dscale_ptr is not None:
        store_row(dscale_ptr + share, scale_sum_a, scale_sum_b, C, A, B)


@triton.jit
def add_shares(share_ptr, out_ptr, start, end, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The program's columns of shares [P, C], rows start .. end, added in a fixed order."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(start, end, ROWS, num_stages=1):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < C)[None, :]
        sums += tl.load(share_ptr + row.to(tl.int64) * C + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(sums, axis=0), mask=column < C)


@triton.jit(do_not_specialize=["segments", "blocks", "programs"])
def _sums_kernel(
    gate_share_ptr, shift_share_ptr, scale_share_ptr, dgate_ptr, dshift_ptr, dscale_ptr, starts_ptr,
    segments, blocks, programs, C: tl.constexpr, AFFINE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Programs (s, c, 0 .. 2) make row s of the gradients of gate, shift and scale; a learned affine has one row."""
    place = tl.program_id(0)
    if starts_ptr is None:
        start = place * blocks
        end = start + blocks
    else:
        offset = (place // segments) * blocks
        start = offset + tl.load(starts_ptr + place % segments)
        end = offset + tl.load(starts_ptr + place % segments + 1)
    out = place.to(tl.int64) * C
    if tl.program_id(2) == 0:
        if gate_share_ptr is not None:
            add_shares(gate_share_ptr, dgate_ptr + out, start, end, C, COLUMNS, ROWS)
    else:
        if AFFINE:
            start = 0
            end = tl.where(place == 0, programs, 0)
        if (not AFFINE) or (place == 0):
            if tl.program_id(2) == 1:
                if shift_share_ptr is not None:
                    add_shares(shift_share_ptr, dshift_ptr + out, start, end, C, COLUMNS, ROWS)
            else:
                if scale_share_ptr is not None:
                    add_shares(scale_share_ptr, dscale_ptr + out, start, end, C, COLUMNS, ROWS)


class Cut(NamedTuple):
    """How a row is cut into two powers of two (the second may be 0), and the warps of a program."""

    a: int
    b: int
    warps: int


@lru_cache(maxsize=128)
def cut(kind: str, channels: int) -> Cut:
    """1,536 channels as 1,024 + 512 where every thread still gets 16 bytes of both; else 2,048, the last masked."""
    threads = triton.cdiv(channels, CONFIGS[kind]["elements"])
    warps = min(16, max(1, triton.next_power_of_2(triton.cdiv(threads, 32))))
    a = 1 << (channels.bit_length() - 1)
    b = triton.next_power_of_2(channels - a) if channels > a else 0
    if b == 0 or (b < a and b >= 32 * warps * 8):
        return Cut(a, b, warps)
    return Cut(2 * a, 0, warps)


class Blocks(NamedTuple):
    """How the tokens of every batch entry are cut into blocks of at most ``rows``.

    blocks: of a segment where all have one length, else of a batch entry; programs: blocks in all; items and starts:
    see ``ragged_blocks``, ``None`` for segments of one length.
    """

    segments: int
    length: int
    rows: int
    blocks: int
    programs: int
    items: Tensor | None
    starts: Tensor | None


def blocks_of(B: int, L: int, segments: int, lengths: Sequence[int] | None, device: torch.device, rows: int) -> Blocks:
    if lengths is None:
        length = L // segments
        blocks = triton.cdiv(length, rows)
        return Blocks(segments, length, rows, blocks, B * segments * blocks, None, None)
    items, starts = held_by_graphs(ragged_blocks(tuple(lengths), rows, device))
    return Blocks(segments, 0, rows, items.shape[0], B * items.shape[0], items, starts)


@lru_cache(maxsize=64)
def ragged_blocks(lengths: tuple[int, ...], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks (segment, first token, tokens) ``[n, 3]`` and the number of the first block of each segment, int32.

    Built on first use, so a CUDA graph is captured after one call outside of it.
    """
    items, starts, first = [], [0], 0
    for segment, length in enumerate(lengths):
        items += [(segment, first + i, min(rows, length - i)) for i in range(0, length, rows)]
        starts.append(len(items))
        first += length
    with torch.inference_mode(False):
        return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (items, starts))


@lru_cache(maxsize=256)
def rows_of_blocks(batch: int, lengths: tuple[int, ...], programs: int) -> int:
    """The smallest number of rows that cuts these segments into at most ``programs`` blocks, or one block each."""
    low, high = 1, max(lengths)
    while low < high:
        rows = (low + high) // 2
        if batch * sum(triton.cdiv(length, rows) for length in lengths) <= programs:
            high = rows
        else:
            low = rows + 1
    return low


def channel_rows(x: Tensor | None) -> Tensor | None:
    """``[B, L, C]`` with packed channels: any other strides are read in place."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int]:
    """Of batch and token (or segment); a learned affine ``[C]`` is the same row for all."""
    return (0, 0) if x is None or x.ndim == 1 else (x.stride(0), x.stride(1))


def _segments(*tables: Tensor | None) -> int:
    return next((table.shape[1] for table in tables if table is not None and table.ndim == 3), 1)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int] | None, eps: float, dtype: torch.dtype | None, statistics: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``(x_new, y, statistics)`` as ``raven.ops.gated_residual`` defines them, each ``None`` where it is not asked for.

    No branch: x is only normalised. No scale: no norm. ``lengths``: ``None`` for segments of one length.
    """
    B, L, C = x.shape
    total, y, stats = (None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)), None, None
    if scale is not None:
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        stats = torch.empty((B, L, 2), dtype=torch.float32, device=x.device) if statistics else None
    if x.numel() == 0:
        return total, y, stats
    x, branch, gate, shift, scale = map(channel_rows, (x, branch, gate, shift, scale))
    config, (a, b, warps) = CONFIGS["forward"], cut("forward", C)
    work = blocks_of(B, L, _segments(gate, scale), lengths, x.device, config["rows"])
    with torch.cuda.device_of(x):
        _forward_kernel[(work.programs,)](
            x, branch, gate, shift, scale, total, y, stats, work.items, L, work.segments, work.length, work.blocks,
            *strides(x), *strides(branch), *strides(gate), *strides(shift), *strides(scale), eps,
            C, a, b, scale is not None and scale.ndim == 1, config["rows"], config["stages"], num_warps=warps,
            maxnreg=config["registers"],
        )  # fmt: skip
    return total, y, stats


def backward(
    grad_total: Tensor | None, grad_y: Tensor | None, total: Tensor | None, stats: Tensor | None,
    branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, lengths: Sequence[int] | None,
    dtypes: Sequence[torch.dtype], wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted ones of the gradients of x, branch, gate, shift and scale; those of tables in float32."""
    like = grad_total if grad_y is None else grad_y
    B, L, C = like.shape
    device = like.device
    kinds = (*dtypes, torch.float32, torch.float32, torch.float32)
    shapes = (like, like, gate, scale, scale)
    new = torch.zeros if like.numel() == 0 else torch.empty
    out = [
        new(x.shape, dtype=kind, device=device) if want else None
        for x, kind, want in zip(shapes, kinds, wanted, strict=True)
    ]
    if like.numel():
        _launch_backward(grad_total, grad_y, total, stats, branch, gate, scale, lengths, out)
    return [x for x in out if x is not None]


def _launch_backward(grad_total, grad_y, total, stats, branch, gate, scale, lengths, out):
    B, L, C = (grad_total if grad_y is None else grad_y).shape
    grad_total, grad_y, total, branch, gate, scale = map(channel_rows, (grad_total, grad_y, total, branch, gate, scale))
    device = out[0].device if out[0] is not None else next(x.device for x in out if x is not None)
    config, (a, b, warps) = CONFIGS["backward"], cut("backward", C)
    segments, affine = _segments(gate, scale), scale is not None and scale.ndim == 1
    rows = rows_of_blocks(B, tuple(lengths or (L // segments,) * segments), config["programs"])
    work = blocks_of(B, L, segments, lengths, device, rows)
    shares = [
        None if x is None else torch.empty((work.programs, C), dtype=torch.float32, device=device) for x in out[2:]
    ]
    with torch.cuda.device_of(grad_total if grad_y is None else grad_y):
        _backward_kernel[(work.programs,)](
            grad_total, grad_y, total, stats, branch, gate, scale, *out[:2], *shares, work.items,
            L, work.segments, work.length, work.blocks, rows,
            *strides(grad_total), *strides(grad_y), *strides(total), *strides(branch), *strides(gate), *strides(scale),
            C, a, b, affine, config["stages"], num_warps=warps, maxnreg=config["registers"],
        )  # fmt: skip
        if any(share is not None for share in shares):
            sums = CONFIGS["sums"]
            per_segment = not affine or out[2] is not None
            _sums_kernel[(B * segments if per_segment else 1, triton.cdiv(C, sums["columns"]), 3)](
                *shares, *out[2:], work.starts, segments, work.blocks, work.programs,
                C, affine, sums["columns"], sums["rows"], num_warps=sums["warps"],
            )  # fmt: skip


# (channels, dtype of x and y, of the branch, of the tables, whether gated, norm or not, learned affine, ragged)
AOT_SHAPES = (
    (1536, "bf16", "bf16", "fp32", True, True, False, False),
    (5120, "fp32", "bf16", "fp32", False, True, True, False),
    (1536, "bf16", "bf16", "fp32", True, False, False, False),
    (200, "fp16", "fp16", "fp16", True, True, False, True),
    (1536, "bf16", None, "fp32", False, True, False, False),
)


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    counts = ("tokens", "segments", "length", "blocks")
    for channels, dtype, branch, table, gated, norm, affine, ragged in AOT_SHAPES:
        gate, norm_table, statistics = (x if given else None for x, given in _tables(table, gated, norm))
        common = {"branch_ptr": branch, "gate_ptr": gate, "scale_ptr": norm_table, "stats_ptr": statistics}
        common["items_ptr"] = "i32" if ragged else None

        config = CONFIGS["forward"]
        pointers = {"x_ptr": dtype, "total_ptr": branch and dtype, "y_ptr": norm_table and dtype}
        strided = _strides_of("x", "branch") + _strides_of("gate", "shift", "scale", along="segment")
        yield _aot_case(
            _forward_kernel, cut("forward", channels), channels, pointers | common | {"shift_ptr": norm_table},
            dict.fromkeys((*counts, *strided), "i32") | {"eps": "fp32"},
            {"AFFINE": affine, "ROWS": config["rows"], "STAGES": config["stages"]}, {"maxnreg": config["registers"]},
        )  # fmt: skip

        config = CONFIGS["backward"]
        pointers = {"grad_total_ptr": branch and dtype, "grad_y_ptr": norm_table and dtype}
        pointers |= {"total_ptr": norm_table and dtype, "dx_ptr": norm_table and dtype, "dbranch_ptr": gate and branch}
        shares = {"dgate_ptr": gate and "fp32", "dshift_ptr": statistics, "dscale_ptr": statistics}
        strided = _strides_of("grad_total", "grad_y", "total", "branch")
        strided += _strides_of("gate", "scale", along="segment")
        yield _aot_case(
            _backward_kernel, cut("backward", channels), channels, pointers | common | shares,
            dict.fromkeys((*counts, "rows", *strided), "i32"),
            {"AFFINE": affine, "STAGES": config["stages"]}, {"maxnreg": config["registers"]},
        )  # fmt: skip

        sums = CONFIGS["sums"]
        pointers = shares | {name.replace("_", "_share_")[1:]: kind for name, kind in shares.items()}
        pointers["starts_ptr"] = common["items_ptr"]
        numbers = dict.fromkeys(("segments", "blocks", "programs"), "i32")
        signature = numbers | {name: "*" + kind for name, kind in pointers.items() if kind}
        constants = {name: None for name, kind in pointers.items() if not kind}
        constants |= {"C": channels, "AFFINE": affine, "COLUMNS": sums["columns"], "ROWS": sums["rows"]}
        yield _sums_kernel, signature, constants, {"num_warps": sums["warps"]}


def _strides_of(*names: str, along: str = "token") -> tuple[str, ...]:
    return tuple(f"{name}_{stride}" for name in names for stride in ("batch", along))


def _tables(table: str, gated: bool, norm: bool) -> tuple[tuple[str, bool], ...]:
    return (table, gated), (table, norm), ("fp32", norm)


def _aot_case(kernel, plan, channels, pointers, numbers, constants, options):
    signature = numbers | {name: "*" + kind for name, kind in pointers.items() if kind}
    constants = constants | {name: None for name, kind in pointers.items() if not kind}
    constants |= {"C": channels, "A": plan.a, "B": plan.b}
    return kernel, signature, constants, options | {"num_warps": plan.warps}
