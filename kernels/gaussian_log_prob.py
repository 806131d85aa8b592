"""Triton kernels of `gaussian_log_prob`: sums of squares in two launches without atomics, and the gradients in one.

A tensor is seen as ``[B, C, F, P]``, ``P`` elements a frame and channel; a chunk of frames is, in each channel, one
contiguous run. A program sums one piece of a run into its own cell, and a second kernel adds the cells of a row in a
fixed order. Piece sizes follow from the length of a run alone, so the bits do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
FINISH_BLOCK = 1024


@dataclass(frozen=True)
class Config:
    """A program covers ``steps`` blocks of ``block`` elements of one run."""

    block: int
    steps: int
    num_warps: int


@triton.jit
def _run(pid, frames_ptr, C, F, P, N, splits, chunk_frames, PIECE: tl.constexpr, RAGGED: tl.constexpr):
    """Where program ``pid`` works: sample, channel, chunk, split; first element of the run, and the run's length."""
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
    return b, c, n, split, start, split * PIECE, frames * P


@triton.jit
def _valid(t, s):
    return (s > 0) & (s <= 1) & (t >= 0) & (t <= 1)


@triton.jit
def _energy(
    v_ptr, x_t_ptr, x_s_ptr, t_ptr, s_ptr, partial_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_tb, stride_tn, stride_sb, stride_sn,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    b, c, n, split, start, begin, length = _run(
        tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    t = tl.load(t_ptr + b * stride_tb + n * stride_tn)
    a = 1.0 - tl.load(s_ptr + b * stride_sb + n * stride_sn)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        v = tl.load(v_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_t = tl.load(x_t_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_s = tl.load(x_s_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        e = x_s - a * (x_t - t * v)
        acc += e * e
    tl.store(partial_ptr + ((b.to(tl.int64) * N + n) * C + c) * splits + split, tl.sum(acc))


@triton.jit
def _finish(
    partial_ptr, t_ptr, s_ptr, out_ptr, frames_ptr,
    C, P, N, splits, chunk_frames, stride_tb, stride_tn, stride_sb, stride_sn,
    BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, n = row // N, row % N
    cells = C * splits
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(0, cells, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + row.to(tl.int64) * cells + offsets, mask=offsets < cells, other=0.0)
    if RAGGED:
        frames = tl.load(frames_ptr + n + 1) - tl.load(frames_ptr + n)
    else:
        frames = chunk_frames
    size = (frames * P).to(tl.float32) * C
    t = tl.load(t_ptr + b * stride_tb + n * stride_tn)
    s = tl.load(s_ptr + b * stride_sb + n * stride_sn)
    log_prob = -tl.sum(acc) / (2.0 * s * s) - size * (tl.log(s) + HALF_LOG_2PI)
    # Levels on the device cannot be refused without a synchronisation: a bad one gives NaN, never a plausible number.
    tl.store(out_ptr + row, tl.where(_valid(t, s), log_prob, float("nan")))


@triton.jit
def _gradients(
    grad_ptr, v_ptr, x_t_ptr, x_s_ptr, t_ptr, s_ptr, d_v_ptr, d_x_t_ptr, d_x_s_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_gb, stride_gn, stride_tb, stride_tn, stride_sb, stride_sn,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr,
    NEED_V: tl.constexpr, NEED_X_T: tl.constexpr, NEED_X_S: tl.constexpr,
):  # fmt: skip
    # From the end: the backward usually follows at once, and the end is what the forward left in the L2 cache.
    b, _, n, _, start, begin, length = _run(
        tl.num_programs(0) - 1 - tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    t = tl.load(t_ptr + b * stride_tb + n * stride_tn)
    s = tl.load(s_ptr + b * stride_sb + n * stride_sn)
    a = 1.0 - s
    scale = tl.load(grad_ptr + b * stride_gb + n * stride_gn) / (s * s)
    scale = tl.where(_valid(t, s), scale, float("nan"))
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        v = tl.load(v_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_t = tl.load(x_t_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        x_s = tl.load(x_s_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        scaled = (x_s - a * (x_t - t * v)) * scale
        if NEED_V:
            tl.store(d_v_ptr + start + offsets, -(t * a) * scaled, mask=mask)
        if NEED_X_T:
            tl.store(d_x_t_ptr + start + offsets, a * scaled, mask=mask)
        if NEED_X_S:
            tl.store(d_x_s_ptr + start + offsets, -scaled, mask=mask)


@dataclass(frozen=True)
class Geometry:
    """``[B, C, F, P]`` and the chunks along F; without chunks a sample is one channel of one frame."""

    B: int
    C: int
    F: int
    P: int
    chunks: tuple[int, ...]

    @classmethod
    def of(cls, x: torch.Tensor, chunk_frames: Sequence[int] | None) -> Geometry:
        B = x.shape[0]
        if chunk_frames is None:
            return cls(B, 1, 1, x.numel() // B if B else 0, (1,))
        C, F = x.shape[1], x.shape[2]
        return cls(B, C, F, x.numel() // (B * C * F) if x.numel() else 0, tuple(chunk_frames))

    @property
    def ragged(self) -> bool:
        return min(self.chunks) != max(self.chunks)

    @property
    def run(self) -> int:
        """Elements of the longest run."""
        return max(self.chunks) * self.P

    def borders(self, device: torch.device) -> torch.Tensor | None:
        """First frame of every chunk and the end, on the device; equal chunks need none."""
        return _borders(self.chunks, device) if self.ragged else None


@lru_cache(maxsize=256)
def _borders(chunks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    borders = [sum(chunks[:n]) for n in range(len(chunks) + 1)]
    return torch.tensor(borders, dtype=torch.int32, device=device)


def default_config(run: int, wide: int = 4096) -> Config:
    """Pieces of at most 8192 elements; a function of the run's length only, which keeps the order of the sum."""
    block = min(wide, max(128, triton.next_power_of_2(run)))
    return Config(block, min(2, triton.cdiv(run, block)), max(1, min(8, block // 512)))


def _device(x: torch.Tensor):
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _plain(x: torch.Tensor) -> torch.Tensor:
    """Contiguous and 16-byte aligned: alignment decides which elements a thread holds, hence the order of a sum."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _column_strides(x: torch.Tensor) -> tuple[int, int]:
    return (x.stride(0), 0) if x.dim() == 1 else (x.stride(0), x.stride(1))


def forward(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    chunk_frames: Sequence[int] | None,
    config: Config | None = None,
) -> torch.Tensor:
    """``[B]``, or ``[B, N]`` with ``chunk_frames``; t and s ``[B, N]`` float32 of any strides."""
    g = Geometry.of(x_t, chunk_frames)
    N = len(g.chunks)
    shape = (g.B,) if chunk_frames is None else (g.B, N)
    if x_t.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x_t.device)
    v, x_t, x_s = _plain(v), _plain(x_t), _plain(x_s)
    config = config or default_config(g.run)
    splits = triton.cdiv(g.run, config.block * config.steps)
    borders = g.borders(x_t.device)
    out = torch.empty(shape, dtype=torch.float32, device=x_t.device)
    partial = torch.empty(g.B * N * g.C * splits, dtype=torch.float32, device=x_t.device)
    strides = (*t.stride(), *s.stride())
    with _device(x_t):
        _energy[(partial.numel(),)](
            v, x_t, x_s, t, s, partial, borders, g.C, g.F, g.P, N, splits, g.chunks[0], *strides,
            BLOCK=config.block, STEPS=config.steps, RAGGED=g.ragged, num_warps=config.num_warps,
        )  # fmt: skip
        _finish[(g.B * N,)](
            partial, t, s, out, borders, g.C, g.P, N, splits, g.chunks[0], *strides,
            BLOCK=FINISH_BLOCK, RAGGED=g.ragged, num_warps=4,
        )  # fmt: skip
    return out


def backward(
    grad: torch.Tensor,
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    chunk_frames: Sequence[int] | None,
    need_v: bool,
    need_x_t: bool,
    need_x_s: bool,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """The wanted gradients, contiguous, each in its input's dtype; ``grad`` ``[B]`` or ``[B, N]`` of any strides."""
    needs = (need_v, need_x_t, need_x_s)
    inputs = (v, x_t, x_s)
    outs = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    wanted = [x for x in outs if x is not None]
    if not wanted or x_t.numel() == 0:
        return wanted
    g = Geometry.of(x_t, chunk_frames)
    N = len(g.chunks)
    v, x_t, x_s = (x.contiguous() for x in inputs)
    config = config or default_config(g.run)
    splits = triton.cdiv(g.run, config.block * config.steps)
    with _device(x_t):
        _gradients[(g.B * N * g.C * splits,)](
            grad, v, x_t, x_s, t, s, *outs, g.borders(x_t.device), g.C, g.F, g.P, N, splits, g.chunks[0],
            *_column_strides(grad), *t.stride(), *s.stride(),
            BLOCK=config.block, STEPS=config.steps, RAGGED=g.ragged,
            NEED_V=need_v, NEED_X_T=need_x_t, NEED_X_S=need_x_s, num_warps=config.num_warps,
        )  # fmt: skip
    return wanted


def aot_cases() -> Iterator[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """What an ahead-of-time compile covers: ``(kernel, signature, constexprs, options)``."""
    config = default_config(1 << 20)
    sizes = {
        "forward": ("C", "F", "P", "N", "splits", "chunk_frames"),
        "finish": ("C", "P", "N", "splits", "chunk_frames"),
        "level": ("stride_tb", "stride_tn", "stride_sb", "stride_sn"),
    }
    loop = {"BLOCK": config.block, "STEPS": config.steps}
    for ragged in (False, True):
        frames = {"frames_ptr": "*i32" if ragged else "constexpr"}
        constant = {"RAGGED": ragged} | ({} if ragged else {"frames_ptr": None})
        levels = {"t_ptr": "*fp32", "s_ptr": "*fp32"}
        ints = dict.fromkeys(sizes["forward"] + sizes["level"], "i32")
        for dtype in ("*bf16",) if ragged else ("*fp32", "*bf16", "*fp16"):
            inputs = {"v_ptr": dtype, "x_t_ptr": "*fp32", "x_s_ptr": "*fp32"}
            signature = {**inputs, **levels, "partial_ptr": "*fp32", **frames, **ints}
            yield _energy, signature, {**loop, **constant}, {"num_warps": config.num_warps}
            outs = {"d_v_ptr": dtype, "d_x_t_ptr": "constexpr", "d_x_s_ptr": "constexpr"}
            needs = {"NEED_V": True, "NEED_X_T": False, "NEED_X_S": False, "d_x_t_ptr": None, "d_x_s_ptr": None}
            grads = {"grad_ptr": "*fp32", **inputs, **levels, **outs, **frames}
            strides = {"stride_gb": "i32", "stride_gn": "i32"}
            yield (
                _gradients,
                {**grads, **ints, **strides},
                {**loop, **constant, **needs},
                {"num_warps": config.num_warps},
            )
        ints = dict.fromkeys(sizes["finish"] + sizes["level"], "i32")
        signature = {"partial_ptr": "*fp32", **levels, "out_ptr": "*fp32", **frames, **ints}
        yield _finish, signature, {"BLOCK": FINISH_BLOCK, **constant}, {"num_warps": 4}
