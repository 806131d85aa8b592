"""Rows in float8 with a scale each: one read of the row, which stays in registers between its maximum and its rounding.

A program takes one row. A row is cut into two parts, powers of two, so that 1536 = 1024 + 512 and 8960 = 8192 + 768
leave few lanes idle. GELU, where it is asked for, comes between the read and the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements: of a row that one thread holds at most, which sets the number of warps, at least ``warps``.
CONFIG = {"elements": 48, "warps": 1}


@triton.jit
def _larger(a, b):
    """The larger of two magnitudes; a NaN stays one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_part(row_ptr, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, GELU: tl.constexpr):
    """Channels FIRST .. FIRST + COUNT of a row in float32; channels that are not there are zero."""
    channel = FIRST + tl.arange(0, COUNT)
    if FIRST + COUNT > C:
        x = tl.load(row_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    else:
        x = tl.load(row_ptr + channel).to(tl.float32)
    if GELU:
        # x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3); the constants also hold
        # the factor -2 log2(e).
        power = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))
        x = x / (1.0 + tl.exp2(power))
    return x


@triton.jit
def store_part(row_ptr, values, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    channel = FIRST + tl.arange(0, COUNT)
    if FIRST + COUNT > C:
        tl.store(row_ptr + channel, values.to(row_ptr.dtype.element_ty), mask=channel < C)
    else:
        tl.store(row_ptr + channel, values.to(row_ptr.dtype.element_ty))


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, row_stride, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GELU: tl.constexpr
):
    """Row n of x, any stride between rows, to packed rows of out and scale[n]; as ``quantize`` of the reference."""
    n = tl.program_id(0).to(tl.int64)
    row = x_ptr + n * row_stride
    a = load_part(row, C, 0, A, GELU)
    amax = tl.reduce(tl.abs(a), 0, _larger)
    if B > 0:
        b = load_part(row, C, A, B, GELU)
        amax = _larger(amax, tl.reduce(tl.abs(b), 0, _larger))
    amax = _larger(amax, 5.421010862427522e-20)  # 2^-64
    tl.store(scale_ptr + n, tl.div_rn(amax, 448.0))
    factor = tl.div_rn(448.0, amax)
    store_part(out_ptr + n * C, a * factor, C, 0, A)
    if B > 0:
        store_part(out_ptr + n * C, b * factor, C, A, B)


@lru_cache(maxsize=128)
def plan(channels: int) -> tuple[int, int, int]:
    """Sizes of the two parts of a row, and warps."""
    first = 1 << (channels.bit_length() - 1)
    second = triton.next_power_of_2(channels - first) if channels > first else 0
    if second == first:
        first, second = 2 * first, 0
    threads = triton.cdiv(channels, CONFIG["elements"])
    warps = min(16, max(CONFIG["warps"], triton.next_power_of_2(triton.cdiv(threads, 32))))
    return first, second, warps


def quantize(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Arguments as in ``raven.ops.quantize_rows``; packed results."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, scale
    C = x.shape[-1]
    rows = x.reshape(-1, C)
    if C > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    first, second, warps = plan(C)
    with torch.cuda.device_of(x):
        _quantize_kernel[(rows.shape[0],)](rows, out, scale, rows.stride(0), C, first, second, gelu, num_warps=warps)
    return out, scale


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for channels, dtype, gelu in (
        (1536, "bf16", False),
        (8960, "bf16", True),
        (48, "fp32", False),
        (256, "fp16", True),
    ):
        first, second, warps = plan(channels)
        signature = {"x_ptr": "*" + dtype, "scale_ptr": "*fp32", "row_stride": "i32"}
        # Below compute capability 8.9 there are no float8 instructions; the launcher is not reached there.
        signature["out_ptr"] = "*fp8e4nv" if capability >= 89 else "*fp16"
        constants = {"C": channels, "A": first, "B": second, "GELU": gelu}
        yield _quantize_kernel, signature, constants, {"num_warps": warps}
