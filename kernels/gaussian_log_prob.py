"""Triton kernels of `gaussian_log_prob`: sums of squares over rows in one launch, and the gradients in another.

A tensor is seen as ``[B, C, F, P]``, ``P`` elements a frame and channel; a chunk of frames is, in each channel, one
contiguous run, and in all channels a row. A program sums one piece of a run into its own cell; the program that
finishes a row last, by an integer counter, adds the row's cells in their order and leaves the counter zero. Piece sizes
follow from the length of a run alone, so the bits do not depend on the batch. `policy_loss` uses the same pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from raven.ops.gaussian_step import Chunks, borders, on_device, workspace

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
ROW_BLOCK = tl.constexpr(1024)
# Sizes that no address is aligned by: Triton would compile a kernel for each value of 1 and each multiple of 16.
SIZES = ["C", "F", "N", "splits", "chunk_frames"]
STRIDES = ["stride_tb", "stride_tn", "stride_sb", "stride_sn"]


@dataclass(frozen=True)
class Config:
    """A program covers ``steps`` blocks of ``block`` elements of one run."""

    block: int
    steps: int
    num_warps: int


@triton.jit
def run_of(pid, frames_ptr, C, F, P, N, splits, chunk_frames, PIECE: tl.constexpr, RAGGED: tl.constexpr):
    """Where program ``pid`` works: sample, chunk, cell of its row; first element of the run, its frames and length."""
    split = pid % splits
    row = pid // splits
    n = row % N
    row = row // N
    c = row % C
    b = row // C
    if RAGGED:
        first = tl.load(frames_ptr + n)
        frames = tl.load(frames_ptr + n + 1) - first
    else:
        first = n * chunk_frames
        frames = chunk_frames
    start = ((b.to(tl.int64) * C + c) * F + first) * P
    return b, n, c * splits + split, start, split * PIECE, frames, frames * P


@triton.jit
def level_at(level, b, n, stride_b, stride_n, TABLE: tl.constexpr):
    """A level, from its table or the number that holds everywhere."""
    if TABLE:
        return tl.load(level + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n)
    else:
        return level


@triton.jit
def valid(t, s):
    return (s > 0) & (s <= 1) & (t >= 0) & (t <= 1)


@triton.jit
def residual(v_ptr, x_t_ptr, x_s_ptr, offsets, mask, t, a):
    """``x_s - a (x_t - t v)``, rounded the same in every kernel, whatever else a compiler could fuse there."""
    v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x_t = tl.load(x_t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x_s = tl.load(x_s_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(-a, tl.fma(-t, v, x_t), x_s)


@triton.jit
def arrivals(counter_ptr):
    """How many programs were here before; what each wrote until then, this one sees."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def row_density(cells_ptr, cells, size, t, s):
    """Log-density of a row of ``size`` elements from the sums of squares in its cells."""
    acc = tl.zeros([ROW_BLOCK], tl.float32)
    for i in range(0, cells, ROW_BLOCK):
        offsets = i + tl.arange(0, ROW_BLOCK)
        acc += tl.load(cells_ptr + offsets, mask=offsets < cells, other=0.0, cache_modifier=".cg")
    log_prob = tl.fma(-size.to(tl.float32), tl.log(s) + HALF_LOG_2PI, -tl.sum(acc) / (2.0 * s * s))
    # Levels on the device cannot be refused without a synchronisation: a bad one gives NaN, never a plausible number.
    return tl.where(valid(t, s), log_prob, float("nan"))


@triton.jit(do_not_specialize=SIZES + STRIDES)
def _forward(
    v_ptr, x_t_ptr, x_s_ptr, t_ptr, s_ptr, unit_ptr, partial_ptr, counters_ptr, out_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_tb, stride_tn, stride_sb, stride_sn,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, T_TABLE: tl.constexpr, S_TABLE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    b, n, cell, start, begin, frames, length = run_of(
        tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    t = level_at(t_ptr, b, n, stride_tb, stride_tn, T_TABLE)
    s = level_at(s_ptr, b, n, stride_sb, stride_sn, S_TABLE)
    a = 1.0 - s
    factor = tl.where(valid(t, s), -(t * a) / (s * s), float("nan"))
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        e = residual(v_ptr + start, x_t_ptr + start, x_s_ptr + start, offsets, mask, t, a)
        acc = tl.fma(e, e, acc)
        if UNIT:
            tl.store(unit_ptr + start + offsets, factor * e, mask=mask)
    row = b * N + n
    cells = C * splits
    cells_ptr = partial_ptr + row.to(tl.int64) * cells
    tl.store(cells_ptr + cell, tl.sum(acc))
    if arrivals(counters_ptr + row) == cells - 1:
        tl.store(out_ptr + row, row_density(cells_ptr, cells, frames * P * C, t, s))
        tl.store(counters_ptr + row, 0)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "stride_gb", "stride_gn"])
def _gradients(
    grad_ptr, v_ptr, x_t_ptr, x_s_ptr, t_ptr, s_ptr, d_v_ptr, d_x_t_ptr, d_x_s_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_tb, stride_tn, stride_sb, stride_sn, stride_gb, stride_gn,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, T_TABLE: tl.constexpr, S_TABLE: tl.constexpr,
    NEED_V: tl.constexpr, NEED_X_T: tl.constexpr, NEED_X_S: tl.constexpr,
):  # fmt: skip
    # From the end: the backward usually follows at once, and the end is what the forward left in the L2 cache.
    b, n, _, start, begin, _, length = run_of(
        tl.num_programs(0) - 1 - tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    t = level_at(t_ptr, b, n, stride_tb, stride_tn, T_TABLE)
    s = level_at(s_ptr, b, n, stride_sb, stride_sn, S_TABLE)
    a = 1.0 - s
    grad = level_at(grad_ptr, b, n, stride_gb, stride_gn, True)
    square = tl.where(valid(t, s), s * s, float("nan"))
    # The gradient of v is rounded as if the forward had written it for a gradient of 1.
    factor = -(t * a) / square
    scale = grad / square
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        e = residual(v_ptr + start, x_t_ptr + start, x_s_ptr + start, offsets, mask, t, a)
        if NEED_V:
            tl.store(d_v_ptr + start + offsets, grad * (factor * e), mask=mask)
        if NEED_X_T:
            tl.store(d_x_t_ptr + start + offsets, a * scale * e, mask=mask)
        if NEED_X_S:
            tl.store(d_x_s_ptr + start + offsets, -scale * e, mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "stride_gb", "stride_gn"])
def _scale(
    grad_ptr, gradient_ptr, out_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_gb, stride_gn,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    b, n, _, start, begin, _, length = run_of(
        tl.num_programs(0) - 1 - tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    grad = level_at(grad_ptr, b, n, stride_gb, stride_gn, True)
    if IN_PLACE:
        # A gradient of 1, what a loss that is differentiated itself gets, costs no memory traffic.
        length = tl.where(grad == 1.0, 0, length)
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        gradient = tl.load(gradient_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + offsets, grad * gradient, mask=mask)


@dataclass(frozen=True)
class Pieces:
    """How a shape is cut. Without chunks a sample is one channel of one frame."""

    sizes: tuple[int, ...]  # C, F, P, N, pieces of a run, frames of each chunk if they are equal
    constants: tuple[int, int, bool]  # BLOCK, STEPS, RAGGED
    num_warps: int
    rows: int
    cells: int  # of all rows; one program each


@lru_cache(maxsize=256)
def pieces(shape: torch.Size, chunks: Chunks, config: Config | None = None) -> Pieces:
    elements = shape[1:].numel()
    C, F, frames = (1, 1, (1,)) if chunks is None else (shape[1], shape[2], chunks)
    P, N = elements // (C * F), len(frames)
    run = max(frames) * P
    config = config or default_config(run)
    splits = triton.cdiv(run, config.block * config.steps)
    constants = (config.block, config.steps, min(frames) != max(frames))
    return Pieces((C, F, P, N, splits, frames[0]), constants, config.num_warps, shape[0] * N, shape[0] * N * C * splits)


def default_config(run: int, wide: int = 4096) -> Config:
    """Pieces of at most 8192 elements; a function of the run's length only, which keeps the order of the sum."""
    block = min(wide, max(128, triton.next_power_of_2(run)))
    return Config(block, min(2, triton.cdiv(run, block)), max(1, min(8, block // 512)))


_launchers: dict[tuple, object] = {}


def launch(kernel, programs: int, pointers: tuple, sizes: tuple, constants: tuple, num_warps: int) -> None:
    """``kernel[programs](*pointers, *sizes, *constants)``.

    Triton's own dispatch takes some forty microseconds to find the compiled kernel; the key here holds everything that
    it looks at (types, addresses that are multiples of 16, sizes), so that later calls start what the first returned.
    """
    kinds = [(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else type(x) for x in pointers]
    key = (kernel.__name__, pointers[0].get_device(), sizes, constants, num_warps, *kinds)
    compiled = _launchers.get(key)
    grid = (programs, 1, 1)
    if compiled is not None:
        compiled[grid](*pointers, *sizes, *constants)
        return
    if len(_launchers) >= 4096:
        _launchers.clear()
    compiled = kernel[grid](*pointers, *sizes, *constants, num_warps=num_warps)
    if compiled is not None:  # the interpreter compiles nothing
        _launchers[key] = compiled


def plain(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned: alignment decides which elements a thread holds, hence the order of a sum."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def strides(x: torch.Tensor | float) -> tuple[int, int]:
    """Of a table ``[B]`` or ``[B, N]``; 0 where one number holds for all."""
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        return 0, 0
    return (x.stride(0), 0) if x.dim() == 1 else x.stride()


def tables(*levels: torch.Tensor | float) -> tuple[bool, ...]:
    return tuple(isinstance(level, torch.Tensor) for level in levels)


def forward(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor | float,
    s: torch.Tensor | float,
    chunks: Chunks,
    out: torch.Tensor,
    unit: torch.Tensor | None = None,
    keep: bool = False,
    config: Config | None = None,
) -> None:
    """Write the log-density to ``out`` ``[B]`` or ``[B, N]``, and its gradient in v to ``unit``; inputs not empty.

    t and s: numbers, or float32 ``[B]`` or ``[B, N]`` of any strides. ``keep``: see ``gaussian_step.workspace``.
    """
    cut = pieces(v.shape, chunks, config)
    partial, counters = workspace(v.device, cut.cells, cut.rows, keep)
    pointers = (
        plain(v), plain(x_t), plain(x_s), t, s, unit, partial, counters, out, _borders(cut, chunks, v.device),
    )  # fmt: skip
    constants = (*cut.constants, *tables(t, s), unit is not None)
    with on_device(v):
        launch(_forward, cut.cells, pointers, (*cut.sizes, *strides(t), *strides(s)), constants, cut.num_warps)


def backward(
    grad: torch.Tensor,
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor | float,
    s: torch.Tensor | float,
    chunks: Chunks,
    d_v: torch.Tensor | None,
    d_x_t: torch.Tensor | None,
    d_x_s: torch.Tensor | None,
    config: Config | None = None,
) -> None:
    """Write the gradients that are not ``None``, contiguous; ``grad`` ``[B]`` or ``[B, N]`` of any strides."""
    cut = pieces(v.shape, chunks, config)
    outs = (d_v, d_x_t, d_x_s)
    inputs = (x.contiguous() for x in (v, x_t, x_s))
    pointers = (grad, *inputs, t, s, *outs, _borders(cut, chunks, v.device))
    sizes = (*cut.sizes, *strides(t), *strides(s), *strides(grad))
    constants = (*cut.constants, *tables(t, s), *(x is not None for x in outs))
    with on_device(v):
        launch(_gradients, cut.cells, pointers, sizes, constants, cut.num_warps)


def scale(grad: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor, chunks: Chunks) -> None:
    """``out = grad * gradient``, ``grad`` one number, ``[B]`` or ``[B, N]``; ``out`` may be ``gradient``."""
    cut = pieces(out.shape, chunks)
    pointers = (grad, gradient, out, _borders(cut, chunks, out.device))
    constants = (*cut.constants, gradient is out)
    with on_device(out):
        launch(_scale, cut.cells, pointers, (*cut.sizes, *strides(grad)), constants, cut.num_warps)


def _borders(cut: Pieces, chunks: Chunks, device: torch.device) -> torch.Tensor | None:
    return borders(chunks, device) if cut.constants[-1] else None


def aot_cases() -> Iterator[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """What an ahead-of-time compile covers: ``(kernel, signature, constexprs, options)``."""
    config = default_config(1 << 20)
    options = {"num_warps": config.num_warps}
    ints = dict.fromkeys(["C", "F", "P", "N", "splits", "chunk_frames"], "i32")
    level_strides = dict.fromkeys(STRIDES, "i32")
    grad_strides = {"stride_gb": "i32", "stride_gn": "i32"}
    for ragged in (False, True):
        frames = {"frames_ptr": "*i32" if ragged else "constexpr"}
        loop = {"BLOCK": config.block, "STEPS": config.steps, "RAGGED": ragged}
        loop |= {} if ragged else {"frames_ptr": None}
        for dtype in ("*bf16",) if ragged else ("*fp32", "*bf16", "*fp16"):
            table = dtype == "*bf16"
            level = {"t_ptr": "*fp32" if table else "fp32", "s_ptr": "*fp32" if table else "fp32"}
            kinds = {"T_TABLE": table, "S_TABLE": table}
            inputs = {"v_ptr": dtype, "x_t_ptr": "*fp32", "x_s_ptr": "*fp32", **level}
            unit = dtype == "*fp32"
            outputs = {"unit_ptr": dtype, "partial_ptr": "*fp32", "counters_ptr": "*i32", "out_ptr": "*fp32"}
            constants = {**loop, **kinds, "UNIT": unit}
            if not unit:
                outputs["unit_ptr"], constants["unit_ptr"] = "constexpr", None
            yield _forward, {**inputs, **outputs, **frames, **ints, **level_strides}, constants, options
            outputs = {"d_v_ptr": dtype, "d_x_t_ptr": "constexpr", "d_x_s_ptr": "constexpr"}
            needs = {"NEED_V": True, "NEED_X_T": False, "NEED_X_S": False, "d_x_t_ptr": None, "d_x_s_ptr": None}
            signature = {"grad_ptr": "*fp32", **inputs, **outputs, **frames, **ints, **level_strides, **grad_strides}
            yield _gradients, signature, {**loop, **kinds, **needs}, options
            waiting = "*fp32" if dtype == "*fp16" else dtype
            pointers = {"grad_ptr": "*fp32", "gradient_ptr": waiting, "out_ptr": dtype, **frames}
            signature = {**pointers, **ints, **grad_strides}
            yield _scale, signature, {**loop, "IN_PLACE": waiting == dtype}, options
