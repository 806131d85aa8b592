"""Rows in float8 with a scale each: one read of the row, which stays in registers between its maximum and its rounding.

A program takes one row, or several short ones. A row is cut into two parts, powers of two, so that 1536 = 1024 + 512
and 8960 = 8192 + 768 leave few lanes idle. GELU, where it is asked for, comes between the read and the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements: that one thread holds at most, which sets the number of warps, at least ``warps``
# together: channels of short rows that one program takes
CONFIG = {"elements": 96, "warps": 1, "together": 2048}


@triton.jit
def larger(a, b):
    """The larger of two magnitudes; a NaN stays one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def float8_scale(amax):
    """Scale of rows with these largest magnitudes, and what their numbers are multiplied by; 2^-64 is the least."""
    amax = larger(amax, 5.421010862427522e-20)
    return tl.div_rn(amax, 448.0), tl.div_rn(448.0, amax)


@triton.jit
def load_part(row_ptr, inside, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, GELU: tl.constexpr):
    """Channels FIRST .. FIRST + COUNT of rows in float32, [ROWS, COUNT]; what is not there is zero."""
    channel = FIRST + tl.arange(0, COUNT)[None, :]
    x = tl.load(row_ptr + channel, mask=inside & (channel < C), other=0.0).to(tl.float32)
    if GELU:
        # x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3); the constants also hold
        # the factor -2 log2(e).
        power = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))
        x = x / (1.0 + tl.exp2(power))
    return x


@triton.jit
def store_part(row_ptr, values, inside, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    channel = FIRST + tl.arange(0, COUNT)[None, :]
    tl.store(row_ptr + channel, values.to(row_ptr.dtype.element_ty), mask=inside & (channel < C))


@triton.jit(do_not_specialize=["rows"])
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, rows, row_stride,
    C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Rows of x, any stride between them, to packed rows of out and scale [rows]; as ``quantize`` of the reference."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if ROWS == 1:
        inside = n >= 0  # as many programs as rows
    else:
        inside = n < rows
    a = load_part(x_ptr + n * row_stride, inside, C, 0, A, GELU)
    amax = tl.reduce(tl.abs(a), 1, larger, keep_dims=True)
    if B > 0:
        b = load_part(x_ptr + n * row_stride, inside, C, A, B, GELU)
        amax = larger(amax, tl.reduce(tl.abs(b), 1, larger, keep_dims=True))
    scale, factor = float8_scale(amax)
    tl.store(scale_ptr + n, scale, mask=inside)
    store_part(out_ptr + n * C, a * factor, inside, C, 0, A)
    if B > 0:
        store_part(out_ptr + n * C, b * factor, inside, C, A, B)


class Plan(NamedTuple):
    """A program takes ``rows`` rows, each in two parts of ``first`` and ``second`` channels (0: one part)."""

    first: int
    second: int
    warps: int
    rows: int


@lru_cache(maxsize=128)
def plan(channels: int) -> Plan:
    first = 1 << (channels.bit_length() - 1)
    second = triton.next_power_of_2(channels - first) if channels > first else 0
    if second == first:
        first, second = 2 * first, 0
    rows = max(1, CONFIG["together"] // (first + second))
    threads = triton.cdiv(rows * channels, CONFIG["elements"])
    warps = min(16, max(CONFIG["warps"], triton.next_power_of_2(triton.cdiv(threads, 32))))
    return Plan(first, second, warps, 1 << (rows.bit_length() - 1))


def quantize(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Arguments as in ``raven.ops.quantize_rows``; packed results."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, scale
    C = x.shape[-1]
    flat = x.reshape(-1, C)
    if C > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    count, cut = flat.shape[0], plan(C)
    with torch.cuda.device_of(x):
        _quantize_kernel[(triton.cdiv(count, cut.rows),)](
            flat, out, scale, count, flat.stride(0), C, cut.first, cut.second, cut.rows, gelu, num_warps=cut.warps
        )
    return out, scale


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for channels, dtype, gelu in (
        (1536, "bf16", False),
        (8960, "bf16", True),
        (48, "fp32", False),
        (256, "fp16", True),
    ):
        cut = plan(channels)
        signature = {"x_ptr": "*" + dtype, "scale_ptr": "*fp32", "rows": "i32", "row_stride": "i32"}
        # Below compute capability 8.9 there are no float8 instructions; the launcher is not reached there.
        signature["out_ptr"] = "*fp8e4nv" if capability >= 89 else "*fp16"
        constants = {"C": channels, "A": cut.first, "B": cut.second, "ROWS": cut.rows, "GELU": gelu}
        yield _quantize_kernel, signature, constants, {"num_warps": cut.warps}
