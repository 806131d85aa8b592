"""Rows of a cache for attention: scaled back from float8, rotated where keys are stored raw; one read, one write."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.kernels.qk_norm_rope import cos_sin, load_row, plan, rotate, store_row
from raven.rows import frequency_table


@triton.jit
def _scaled(x, scale_ptr, HEADS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Heads [ROWS, DIM] in float32, times their scales."""
    x = x.to(tl.float32)
    if scale_ptr is not None:
        head = FIRST + tl.arange(0, ROWS)[:, None]
        x *= tl.load(scale_ptr + head, mask=head < HEADS, other=0.0)
    return x


@triton.jit
def _read_kernel(
    cache_ptr, scale_ptr, out_ptr, row_ptr, position_ptr, frequency_ptr,
    cache_batch, cache_row, scale_batch, out_batch, out_row,
    HEADS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Row row[i] of the cache [B, S, H, D] to the same row of out [B, S, H, D]; a negative one is left out."""
    i = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tl.load(row_ptr + i).to(tl.int64)
    if row >= 0:
        a, b = load_row(cache_ptr + batch * cache_batch + row * cache_row, HEADS, A, B, DIM)
        if scale_ptr is not None:
            scale_ptr += batch * scale_batch + row * HEADS
        a = _scaled(a, scale_ptr, HEADS, 0, A)
        if B > 0:
            b = _scaled(b, scale_ptr, HEADS, A, B)
        if position_ptr is not None:
            cos, sin = cos_sin(position_ptr + 3 * i, tl.load(frequency_ptr + tl.arange(0, DIM // 2)), DIM)
            a = rotate(a, cos, sin, A, DIM)
            if B > 0:
                b = rotate(b, cos, sin, B, DIM)
        store_row(out_ptr + batch * out_batch + row * out_row, a, b, HEADS, A, B, DIM)


def read(
    cache: Tensor, rows: Tensor, out: Tensor, scale: Tensor | None, positions: Tensor | None, theta: float
) -> None:
    """Arguments as in ``raven.ops.read_rows``: heads of a row packed in both tensors, packed scales."""
    B, _, H, D = cache.shape
    if B * rows.shape[0] == 0:
        return
    cut = plan("append", H, H, D)
    with torch.cuda.device_of(cache):
        _read_kernel[(rows.shape[0], B)](
            cache, scale, out, rows.contiguous(), None if positions is None else positions.contiguous(),
            None if positions is None else frequency_table(D, theta, cache.device),
            cache.stride(0), cache.stride(1), 0 if scale is None else scale.stride(0), out.stride(0), out.stride(1),
            H, cut.qa, cut.qb, D, num_warps=cut.warps,
        )  # fmt: skip


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    cases = [(12, 128, "bf16", "bf16", False, True), (3, 32, "fp32", "fp16", True, True)]
    if capability >= 89:
        cases += [(12, 128, "fp8e4nv", "bf16", True, positions) for positions in (False, True)]
    for heads, dim, stored, dtype, scaled, positions in cases:
        strides = ("cache_batch", "cache_row", "scale_batch", "out_batch", "out_row")
        signature = {"cache_ptr": "*" + stored, "out_ptr": "*" + dtype, "row_ptr": "*i32"} | dict.fromkeys(
            strides, "i32"
        )
        cut = plan("append", heads, heads, dim)
        constants = {"HEADS": heads, "A": cut.qa, "B": cut.qb, "DIM": dim}
        for name, kind, given in (
            ("scale_ptr", "*fp32", scaled),
            ("position_ptr", "*i32", positions),
            ("frequency_ptr", "*i64", positions),
        ):
            (signature if given else constants).update({name: kind if given else None})
        yield _read_kernel, signature, constants, {"num_warps": cut.warps}
