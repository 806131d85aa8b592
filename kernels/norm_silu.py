"""RMS norm and SiLU of rows, or only the sum before them: one read of everything, one write.

A program takes whole rows, several of them where they are short, as those of a video decoder's widest layers are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.reference.norm_silu import EPS

# together: channels that one program takes; elements: that one thread holds
CONFIG = {"together": 4096, "elements": 32}


@triton.jit(do_not_specialize=["rows"])
def _norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, rows,
    C: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """out = silu(s / rms(s) * weight) with s = x + bias + residual, or s; packed rows [rows, C], vectors [C].

    Rows of out are WIDE channels; those beyond C become zero.
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    present = channel < C
    inside = (n < rows) & present
    at = n * C + channel
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + channel, mask=present, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        root = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + EPSILON)
        value = value * root * tl.load(weight_ptr + channel, mask=present, other=0.0).to(tl.float32)
        value = value / (1.0 + tl.exp(-value))
    if WIDE > C:
        value = tl.where(present, value, 0.0)
    tl.store(out_ptr + n * WIDE + channel, value.to(out_ptr.dtype.element_ty), mask=(n < rows) & (channel < WIDE))


def plan(channels: int) -> tuple[int, int, int]:
    """(width of a row in registers, rows of a program, warps)."""
    width = triton.next_power_of_2(channels)
    rows = max(1, CONFIG["together"] // width)
    return width, rows, min(16, max(1, width * rows // (32 * CONFIG["elements"])))


def forward(x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    """Arguments as in ``raven.ops.norm_silu``; rows are packed."""
    if x.numel() == 0:
        return
    channels, wide = x.shape[-1], out.shape[-1]
    count = x.numel() // channels
    width, rows, warps = plan(wide)
    with torch.cuda.device_of(x):
        _norm_silu_kernel[(triton.cdiv(count, rows),)](
            x, weight, bias, residual, out, count, channels, wide, width, rows, EPS, num_warps=warps
        )


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for channels, wide, dtype, given in (
        (96, 128, "bf16", ("weight_ptr",)),
        (384, 384, "bf16", ("weight_ptr", "bias_ptr")),
        (192, 192, "fp16", ("bias_ptr", "residual_ptr")),
        (48, 48, "fp32", ("weight_ptr", "bias_ptr", "residual_ptr")),
    ):
        width, rows, warps = plan(wide)
        signature = {"x_ptr": "*" + dtype, "out_ptr": "*" + dtype, "rows": "i32"}
        constants = {"C": channels, "WIDE": wide, "WIDTH": width, "ROWS": rows, "EPSILON": EPS}
        for name in ("weight_ptr", "bias_ptr", "residual_ptr"):
            (signature if name in given else constants).update({name: "*" + dtype if name in given else None})
        yield _norm_silu_kernel, signature, constants, {"num_warps": warps}
