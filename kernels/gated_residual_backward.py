"""Backward of `gated_residual` and `modulate`: one pass over the tokens, then the shares of the tables' gradients.

A program owns a block of consecutive tokens of one segment, takes them one after the other, and adds up their share of
the tables' gradients in registers; a second kernel adds up the shares of a segment's blocks. How tokens are cut into
blocks depends on the shapes alone, and so do the bits of those sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.kernels.gated_residual import (
    AOT_SHAPES,
    CONFIGS,
    aot_case,
    channel_rows,
    cut,
    folded,
    load_row,
    scaled,
    segments_of,
    store_row,
    stride_names,
    strides,
)
from raven.segments import cut_into_blocks


@triton.jit
def find_block(items_ptr, segments, length, blocks, rows):
    """The program's batch entry, segment, first token and number of tokens; see ``raven.segments.Blocks``."""
    pid = tl.program_id(0)
    if items_ptr is None:
        place = pid // blocks
        start = (pid % blocks) * rows
        batch = place // segments
        segment = place % segments
        first = segment * length + start
        count = tl.minimum(length - start, rows)
    else:
        batch = pid // blocks
        item = items_ptr + 3 * (pid % blocks)
        segment = tl.load(item)
        first = tl.load(item + 1)
        count = tl.load(item + 2)
    return batch.to(tl.int64), segment.to(tl.int64), first, count


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
    batch, segment, first, count = find_block(items_ptr, segments, length, blocks, rows)
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
        scale_a = scaled(scale_a, 1.0, AFFINE)
        scale_b = scaled(scale_b, 1.0, AFFINE)
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
        _launch(grad_total, grad_y, total, stats, branch, gate, scale, lengths, out)
    return [x for x in out if x is not None]


def stages(row_bytes: int) -> int:
    """Of a loop that reads so many bytes a token."""
    config = CONFIGS["backward"]
    return 1 + min(config["stages"] - 1, config["bytes"] // row_bytes)


def register_limit(width: int, warps: int, gated: bool) -> dict[str, int]:
    """Of registers: 5,120 channels without a gate take 172 a thread of 8 warps if they may, and a multiprocessor then
    holds one program. 128 are enough, and two programs hide each other's exchanges.
    """
    return {"maxnreg": 128} if warps == 8 and not gated and width <= 20 * 32 * warps else {}


def _launch(grad_total, grad_y, total, stats, branch, gate, scale, lengths, out):
    like = grad_total if grad_y is None else grad_y
    (B, L, C), device = like.shape, like.device
    grad_total, grad_y, total, branch, gate, scale = map(channel_rows, (grad_total, grad_y, total, branch, gate, scale))
    config, (a, b, warps) = CONFIGS["backward"], cut("backward", C)
    segments, affine = segments_of(gate, scale), scale is not None and scale.ndim == 1
    read = (x.element_size() for x in (grad_total, grad_y, total, branch) if x is not None)
    blocks = cut_into_blocks(B, L, segments, lengths, device, config["blocks"])
    shares = [
        None if x is None else torch.empty((blocks.total, C), dtype=torch.float32, device=device) for x in out[2:]
    ]
    with torch.cuda.device_of(like):
        _backward_kernel[(blocks.total,)](
            grad_total, grad_y, total, stats, branch, gate, scale, *out[:2], *shares, blocks.items,
            L, segments, L // segments, blocks.count, blocks.rows,
            *strides(grad_total), *strides(grad_y), *strides(total), *strides(branch), *strides(gate), *strides(scale),
            C, a, b, affine, stages(sum(read) * (a + b)), num_warps=warps,
            **register_limit(a + b, warps, gate is not None),
        )  # fmt: skip
        if any(share is not None for share in shares):
            sums = CONFIGS["sums"]
            places = 1 if affine and out[2] is None else B * segments
            rows = min(sums["rows"], triton.next_power_of_2(blocks.total if affine else blocks.longest))
            _sums_kernel[(places, triton.cdiv(C, sums["columns"]), 3)](
                *shares, *out[2:], blocks.starts, segments, blocks.count, blocks.total,
                C, affine, sums["columns"], rows, num_warps=sums["warps"],
            )  # fmt: skip


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    counts = ["tokens", "segments", "length", "blocks", "rows"]
    along_tokens = stride_names("grad_total", "grad_y", "total", "branch")
    numbers = dict.fromkeys(counts + along_tokens + stride_names("gate", "scale", along="segment"), "i32")
    for channels, dtype, branch, table, gated, norm, affine, ragged in AOT_SHAPES:
        pointers = {"grad_total_ptr": branch and dtype, "branch_ptr": gated and branch, "gate_ptr": gated and table}
        pointers |= dict.fromkeys(("grad_y_ptr", "total_ptr", "dx_ptr"), norm and dtype)
        pointers |= {"scale_ptr": norm and table, "stats_ptr": norm and "fp32", "dbranch_ptr": gated and branch}
        shares = {"gate": gated and "fp32", "shift": norm and "fp32", "scale": norm and "fp32"}
        pointers |= {f"d{name}_ptr": kind for name, kind in shares.items()} | {"items_ptr": ragged and "i32"}
        a, b, warps = cut("backward", channels)
        read = ("grad_total_ptr", "grad_y_ptr", "total_ptr", "branch_ptr")
        row_bytes = (a + b) * sum(4 if pointers[name] == "fp32" else 2 for name in read if pointers[name])
        constants = {"AFFINE": affine, "STAGES": stages(row_bytes)}
        limit = register_limit(a + b, warps, gated)
        yield aot_case(_backward_kernel, "backward", channels, pointers, numbers, constants, **limit)

        sums = CONFIGS["sums"]
        pointers = {f"{name}_share_ptr": kind for name, kind in shares.items()}
        pointers |= {f"d{name}_ptr": kind for name, kind in shares.items()} | {"starts_ptr": ragged and "i32"}
        signature = {name: "*" + kind for name, kind in pointers.items() if kind}
        signature |= dict.fromkeys(("segments", "blocks", "programs"), "i32")
        constants = {name: None for name, kind in pointers.items() if not kind}
        constants |= {"C": channels, "AFFINE": affine, "COLUMNS": sums["columns"], "ROWS": sums["rows"]}
        yield _sums_kernel, signature, constants, {"num_warps": sums["warps"]}
