"""Triton kernels of `gated_residual` and `modulate`: one read and one write of each tensor. Here the forward.

A program takes one token, a whole row in registers. The rows of the tables are few and come from the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from raven.kernels.quantize_rows import float8_scale, larger
from raven.segments import segment_of_tokens

# How work is cut. A tuning script may change it, and calls ``cut.cache_clear()`` after each change.
# elements: of a row that one thread holds at most, which sets the number of warps
# blocks:   of tokens at most (backward): one share each of the tables' gradients is written, and added up
# stages:   of copies into shared memory ahead of the computation, as far as they fit into so many bytes
CONFIGS = {
    "forward": {"elements": 24},
    "norm": {"elements": 40},  # forward without a branch
    "backward": {"elements": 24, "blocks": 528, "stages": 3, "bytes": 81920},
    "sums": {"columns": 16, "rows": 512, "warps": 8},  # of shares: what a program adds up at once, at most
}

# Multiplications and additions are joined where the kernel says so, not where the compiler finds it convenient: a token
# has the same bits with a gate and without, with segments of one length and of several.
ARITHMETIC = {"enable_fp_fusion": False}
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
MOST_IN_GRID = 65535  # programs along the second and third axis: CUDA C programming guide, "technical specifications"


@triton.jit
def channels(FIRST: tl.constexpr, SIZE: tl.constexpr):
    """FIRST .. FIRST + SIZE, of which a thread takes four at a time, whatever the dtype: neighbours then read whole
    lines of the float32 tables, which pass the first-level cache for each token, and no dtype needs another layout.
    """
    return FIRST + tl.max_contiguous(tl.arange(0, SIZE), 4)


@triton.jit
def load_part(ptr, C: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, POLICY: tl.constexpr):
    """Channels FIRST .. FIRST + SIZE of a row, as stored; those beyond C are zero."""
    channel = channels(FIRST, SIZE)
    if FIRST + SIZE > C:
        values = tl.load(ptr + channel, mask=channel < C, other=0.0, eviction_policy=POLICY)
    else:
        values = tl.load(ptr + channel, eviction_policy=POLICY)
    return values


@triton.jit
def store_part(ptr, values, C: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    channel = channels(FIRST, SIZE)
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
def scaled(scale, by, AFFINE: tl.constexpr):
    """``by`` times what a normalised row is multiplied by, float32."""
    scale = scale.to(tl.float32)
    if AFFINE:
        scale *= by
    else:
        scale = tl.fma(scale, by, tl.zeros_like(scale) + by)
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
def rounded(values, DTYPE: tl.constexpr):
    """In float32, as that dtype would hold them."""
    if DTYPE == tl.bfloat16 and values.shape[0] > 1:
        # Two at a time: the compiler would convert one by one, at an eighth of the rate, what is both stored and read.
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r", [values], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        values = values.to(DTYPE).to(tl.float32)
    return values


@triton.jit
def largest(a, b, A: tl.constexpr, B: tl.constexpr):
    """The largest magnitude of a row in two parts, in one exchange between threads; a NaN anywhere is the result."""
    a = tl.abs(a)
    if B > 0:
        a = larger(tl.reduce(tl.reshape(a, [A // B, B]), 0, larger), tl.abs(b))
    return tl.reduce(a, 0, larger)


@triton.jit(do_not_specialize=["tokens", "length"])
def _forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, total_ptr, y_ptr, y_scale_ptr, stats_ptr, segment_ptr,
    tokens, length,
    x_batch, x_token, branch_batch, branch_token, gate_batch, gate_segment, shift_batch, shift_segment,
    scale_batch, scale_segment, eps, C: tl.constexpr, A: tl.constexpr, B: tl.constexpr, AFFINE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Programs (token of a segment, segment, batch entry); (token of the batch) where segments are listed by token.

    x, branch [B, L, C] with any batch and token stride to packed total and y; a missing pointer leaves its part out.

    Without a branch the rows of x are normalised; without y they are only added up. With y_scale [B, L], y is rounded
    to DTYPE and quantised from there, by the rule of `quantize_rows`.
    """
    if segment_ptr is None:
        segment = tl.program_id(1)
        batch = tl.program_id(2)
        token = segment * length + tl.program_id(0)
    else:
        batch = tl.program_id(0) // tokens
        token = tl.program_id(0) % tokens
        segment = tl.load(segment_ptr + token)
    batch = batch.to(tl.int64)
    token = token.to(tl.int64)
    segment = segment.to(tl.int64)
    row = batch * tokens + token
    # No hint for what is read once: marked to leave the caches first, it comes 1 to 4 % slower.
    a, b = load_row(x_ptr + batch * x_batch + token * x_token, C, A, B, "")
    if branch_ptr is not None:
        branch = branch_ptr + batch * branch_batch + token * branch_token
        added_a, added_b = load_row(branch, C, A, B, "")
        added_a = added_a.to(tl.float32)
        added_b = added_b.to(tl.float32)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if gate_ptr is not None:
            gate_a, gate_b = load_row(gate_ptr + batch * gate_batch + segment * gate_segment, C, A, B, "evict_last")
            a = tl.fma(added_a, gate_a.to(tl.float32), a)
            b = tl.fma(added_b, gate_b.to(tl.float32), b)
        else:
            a += added_a
            b += added_b
        a = rounded(a, total_ptr.dtype.element_ty)
        b = rounded(b, total_ptr.dtype.element_ty)
        store_row(total_ptr + row * C, a, b, C, A, B)
    if y_ptr is not None:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        scale = scale_ptr + batch * scale_batch + segment * scale_segment
        shift = shift_ptr + batch * shift_batch + segment * shift_segment
        # Ahead of the sums that wait for x. Without a branch half as much of a token is on its way, and registers are
        # better spent on more tokens.
        if branch_ptr is not None:
            scale_a, scale_b = load_row(scale, C, A, B, "evict_last")
            shift_a, shift_b = load_row(shift, C, A, B, "evict_last")
        mean = tl.sum(folded(a, b, A, B)) / C
        a = without_padding(a - mean, C, 0, A)
        b = without_padding(b - mean, C, A, B) if B > 0 else a
        rstd = tl.rsqrt(tl.sum(folded(a * a, b * b, A, B)) / C + eps)
        if stats_ptr is not None:
            tl.store(stats_ptr + 2 * row, mean)
            tl.store(stats_ptr + 2 * row + 1, rstd)
        if branch_ptr is None:
            scale_a, scale_b = load_row(scale, C, A, B, "evict_last")
            shift_a, shift_b = load_row(shift, C, A, B, "evict_last")
        a = tl.fma(a, scaled(scale_a, rstd, AFFINE), shift_a.to(tl.float32))
        b = tl.fma(b, scaled(scale_b, rstd, AFFINE), shift_b.to(tl.float32))
        if y_scale_ptr is not None:
            a = rounded(a, DTYPE)
            b = rounded(b, DTYPE)
            y_scale, factor = float8_scale(largest(a, b, A, B))
            tl.store(y_scale_ptr + row, y_scale)
            a *= factor
            b *= factor
        store_row(y_ptr + row * C, a, b, C, A, B)


class Cut(NamedTuple):
    """How a row is cut into two powers of two (the second may be 0), and the warps of a program."""

    a: int
    b: int
    warps: int


@lru_cache(maxsize=128)
def cut(kind: str, channels: int) -> Cut:
    """1,536 channels as 1,024 + 512 where every thread then has four of both; else 2,048, the last masked."""
    config = CONFIGS[kind]
    warps = min(16, max(1, triton.next_power_of_2(triton.cdiv(channels, 32 * config["elements"]))))
    a = 1 << (channels.bit_length() - 1)
    b = triton.next_power_of_2(channels - a) if channels > a else 0
    if b == 0:
        return Cut(a, 0, warps)
    fewer = min(warps, b // (32 * 4))
    if b < a and fewer and channels <= 32 * fewer * config["elements"]:
        return Cut(a, b, fewer)
    return Cut(2 * a, 0, warps)


def channel_rows(x: Tensor | None) -> Tensor | None:
    """``[B, L, C]`` with packed channels: any other strides are read in place."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int]:
    """Of batch and token (or segment); a learned affine ``[C]`` is the same row for all."""
    return (0, 0) if x is None or x.ndim == 1 else (x.stride(0), x.stride(1))


def segments_of(*tables: Tensor | None) -> int:
    return next((table.shape[1] for table in tables if table is not None and table.ndim == 3), 1)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    lengths: Sequence[int] | None, eps: float, dtype: torch.dtype | None, quantize: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``(x_new, y, statistics)`` as ``raven.ops.gated_residual`` defines them, each ``None`` where it is not asked for.

    No branch: x is only normalised. No scale: no norm. ``lengths``: ``None`` for segments of one length. Statistics are
    written whether or not a backward will need them: one kernel for both gives both the same bits. ``quantize``: y of
    that dtype in float8, and its scales ``[B, L]`` in place of the statistics.
    """
    B, L, C = x.shape
    total, y, last = (None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)), None, None
    if scale is not None:
        y = torch.empty(x.shape, dtype=torch.float8_e4m3fn if quantize else dtype, device=x.device)
        last = torch.empty((B, L) if quantize else (B, L, 2), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return total, y, last
    x, branch, gate, shift, scale = map(channel_rows, (x, branch, gate, shift, scale))
    a, b, warps = cut("norm" if branch is None else "forward", C)
    affine, segments = scale is not None and scale.ndim == 1, segments_of(gate, scale)
    if lengths is None and max(segments, B) > MOST_IN_GRID:
        lengths = (L // segments,) * segments
    grid = (B * L,) if lengths is not None else (L // segments, segments, B)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, branch, gate, shift, scale, total, y, last if quantize else None, None if quantize else last,
            segment_of_tokens(lengths, x.device), L, L // segments,
            *strides(x), *strides(branch), *strides(gate), *strides(shift), *strides(scale), eps,
            C, a, b, affine, TRITON_DTYPES[dtype] if quantize else None, num_warps=warps, **ARITHMETIC,
        )  # fmt: skip
    return total, y, last


# (channels, dtype of x and y, of the branch, of the tables, whether gated, norm or not, learned affine, ragged)
AOT_SHAPES = (
    (1536, "bf16", "bf16", "fp32", True, True, False, False),
    (5120, "fp32", "bf16", "fp32", False, True, True, False),
    (1536, "bf16", "bf16", "fp32", True, False, False, False),
    (200, "fp16", "fp16", "fp16", True, True, False, True),
    (1536, "bf16", None, "fp32", False, True, False, False),
    (1, "bf16", "bf16", "fp32", True, True, False, False),
)


def aot_case(kernel, kind: str, channels: int, pointers: dict, numbers: dict, constants: dict, **options) -> tuple:
    """(kernel, signature, constants, options) of a launch; a pointer of dtype ``None`` is missing."""
    a, b, warps = cut(kind, channels)
    signature = numbers | {name: f"*{dtype}" for name, dtype in pointers.items() if dtype}
    constants = constants | {name: None for name, dtype in pointers.items() if not dtype}
    return kernel, signature, constants | {"C": channels, "A": a, "B": b}, {"num_warps": warps, **options}


def stride_names(*names: str, along: str = "token") -> list[str]:
    return [f"{name}_{stride}" for name in names for stride in ("batch", along)]


def aot_cases(capability: int) -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    numbers = dict.fromkeys(["tokens", "length", *stride_names("x", "branch")], "i32")
    numbers |= dict.fromkeys(stride_names("gate", "shift", "scale", along="segment"), "i32") | {"eps": "fp32"}
    # Below compute capability 8.9 there are no float8 instructions; the launcher is not reached there.
    float8 = "fp8e4nv" if capability >= 89 else "fp16"
    names = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    shapes = [(*shape, quantize) for quantize in (False, True) for shape in AOT_SHAPES if shape[5] or not quantize]
    for channels, dtype, branch, table, gated, norm, affine, ragged, quantize in shapes:
        pointers = {"x_ptr": dtype, "branch_ptr": branch, "total_ptr": branch and dtype, "gate_ptr": gated and table}
        pointers |= dict.fromkeys(("shift_ptr", "scale_ptr"), norm and table)
        pointers |= {"y_ptr": float8 if quantize else norm and dtype, "y_scale_ptr": quantize and "fp32"}
        pointers |= {"stats_ptr": norm and not quantize and "fp32", "segment_ptr": ragged and "i32"}
        constants = {"AFFINE": affine, "DTYPE": names[dtype] if quantize else None}
        kind = "forward" if branch else "norm"
        yield aot_case(_forward_kernel, kind, channels, pointers, numbers, constants, **ARITHMETIC)
