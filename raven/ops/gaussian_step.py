"""What ``gaussian_log_prob`` and ``policy_loss`` share: checks, levels, the CUDA kernels' pieces and workspaces.

At four samples the GPU needs some fifty microseconds for a forward and a backward, and the host sets the time. So the
usual call is checked in a few comparisons, and goes straight to its kernel when nobody but autograd needs to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch

from raven import backends, native
from raven.errors import check_dtype, check_level, check_same_device, check_shape
from raven.graphs import held_by_graphs
from raven.schedule import Level, check_chunk_frames, compute_dtype, level_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (torch.Tensor, torch.nn.Parameter)
Chunks = tuple[int, ...] | None

# The CUDA kernels' step of a block, 256 threads of 4 elements, and the most elements of a piece.
STEP = 1024
PIECE = 10240


def direct(*tensors: torch.Tensor) -> bool:
    """Whether only autograd needs to see a call: no tracing, tensor subclass, dispatch mode or functorch transform."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:
        if type(x) not in PLAIN:
            return False
    return True


def check_states(
    v: torch.Tensor, x_t: torch.Tensor, x_s: torch.Tensor, chunk_frames: Sequence[int] | None
) -> tuple[Chunks, torch.dtype]:
    """The chunks as a tuple, and the dtype to compute in; errors as `raven.ops.gaussian_log_prob` documents."""
    usual = (
        isinstance(v, torch.Tensor)
        and isinstance(x_t, torch.Tensor)
        and isinstance(x_s, torch.Tensor)
        and v.dtype in DTYPES
        and x_t.dtype in DTYPES
        and x_s.dtype in DTYPES
        and v.device == x_t.device == x_s.device
        and v.shape == x_t.shape == x_s.shape
    )
    if not usual:
        for name, x in (("v", v), ("x_t", x_t), ("x_s", x_s)):
            check_dtype(name, x, DTYPES)
            check_same_device(name, x, "v", v)
            check_shape(name, x, v.shape)
    if v.dim() == 0:
        raise ValueError("v: got shape (), expected [B, ...]")
    chunks = None if chunk_frames is None else check_chunk_frames(chunk_frames, v)
    return chunks, compute_dtype(v, x_t, x_s)


def check_step_level(name: str, level: Level) -> None:
    """Range, and that no gradient is asked for; ``s = 0`` is a point mass and has no density."""
    check_level(name, level, exclusive=name == "s")
    if isinstance(level, torch.Tensor) and level.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires a gradient, expected a constant (try {name}.detach())")


def direct_level(name: str, level: Level, like: torch.Tensor, columns: int, dtype: torch.dtype) -> Level:
    """A checked level as the kernels take it: a number, or a ``dtype`` tensor ``[B]`` or ``[B, columns]``."""
    check_step_level(name, level)
    if not isinstance(level, torch.Tensor):
        return float(level)
    if level.dtype == dtype and level.device == like.device and level.shape == like.shape[:1]:
        return level
    if level.dim() == 0 and level.device.type == "cpu" and level.is_floating_point():
        return float(level)
    return level_table(name, level, like.shape[0], columns, like.device, dtype)


def table_levels(t: Level, s: Level, like: torch.Tensor, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Checked levels as the registered ops take them: tensors ``[B, columns]``, mostly views."""
    for name, level in (("t", t), ("s", s)):
        check_step_level(name, level)
    rows, device = like.shape[0], like.device
    return [level_table(name, level, rows, columns, device, dtype) for name, level in (("t", t), ("s", s))]


def reference_level(level: Level, chunks: Chunks) -> Level:
    """A level as the reference takes it, from either form above."""
    return level[:, 0] if chunks is None and isinstance(level, torch.Tensor) and level.dim() == 2 else level


def kernel_level(level: Level) -> tuple[torch.Tensor | None, float]:
    """A level as the compiled ops take it: a table, or a number."""
    return (level, 0.0) if isinstance(level, torch.Tensor) else (None, level)


LARGEST = 2**31 - 2**16


def huge(x: torch.Tensor) -> str | None:
    """The kernels count the elements of a sample, and those of the step behind its end, in 32 bits."""
    return f"a sample has more than {LARGEST} elements" if x.numel() > LARGEST * max(1, x.shape[0]) else None


def cuda_reason(*tensors: torch.Tensor) -> str | None:
    return huge(tensors[0]) or native.reason(*tensors)


def triton_reason(*tensors: torch.Tensor) -> str | None:
    return huge(tensors[0]) or backends.triton_reason(*tensors)


_chosen: dict[tuple, str] = {}


def choose(op: str, v: torch.Tensor, x_t: torch.Tensor, x_s: torch.Tensor) -> str:
    """``backends.select``, remembered for GPU tensors: nothing else that it looks at changes within a process."""
    if not v.is_cuda or v.numel() > LARGEST:
        return backends.select(op, v, x_t, x_s)
    key = (op, backends.get_backend(), v.device, v.dtype, x_t.dtype, x_s.dtype)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = backends.select(op, v, x_t, x_s)
    return chosen


class Plan(NamedTuple):
    """How the CUDA kernels cut a shape: a function of one sample, which keeps the order of its sums."""

    shape: tuple[int, ...]  # of the log-density
    sizes: tuple[int, int, int, int, int]  # channels, frames, chunks, elements of a piece, pieces of a run
    rows: int
    cells: int  # of all rows
    elements: int  # of a sample


@lru_cache(maxsize=256)
def plan(shape: torch.Size, chunks: Chunks) -> Plan:
    """``[B, C, F, ...]``, of which each chunk is one contiguous run per channel; without chunks a sample is one run."""
    elements = shape[1:].numel()
    if chunks is None:
        channels, frames, run, count = 1, 1, elements, 1
    else:
        channels, frames, count = shape[1], shape[2], len(chunks)
        run = max(chunks) * (elements // (channels * frames)) if elements else 0
    splits = max(1, -(-run // PIECE))
    piece = max(1, -(-run // (splits * STEP))) * STEP
    rows = shape[0] * count
    out = shape[:1] if chunks is None else (shape[0], count)
    return Plan(tuple(out), (channels, frames, count, piece, splits), rows, rows * channels * splits, elements)


def borders(chunks: Chunks, device: torch.device) -> torch.Tensor | None:
    """First frame of every chunk and the end, int32 on the device; equal chunks need none.

    Built on first use, so a CUDA graph is captured after one call outside of it.
    """
    return None if chunks is None or min(chunks) == max(chunks) else held_by_graphs(_borders(chunks, device))


@lru_cache(maxsize=256)
def _borders(chunks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor([sum(chunks[:n]) for n in range(len(chunks) + 1)], dtype=torch.int32, device=device)


_workspaces: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}


def workspace(device: torch.device, cells: int, counters: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for ``cells`` float32 sums, and ``counters`` int32 zeros, which every launch leaves zero again.

    Kept per stream with ``keep``: launches on one stream follow each other. A CUDA graph gets its own, zeroed when it
    is replayed, because it may be replayed beside other work.
    """
    if not keep or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _new_workspace(device, cells, counters)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    found = _workspaces.get(key)
    if found is None or found[0].numel() < cells or found[1].numel() < counters:
        if len(_workspaces) >= 256:  # streams come and go; what is freed goes back to the stream that used it
            _workspaces.clear()
        found = _workspaces[key] = _new_workspace(device, max(cells, 2**15), max(counters, 2**12))
    return found


def _new_workspace(device: torch.device, cells: int, counters: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        sums = torch.empty(cells, dtype=torch.float32, device=device)
        return sums, torch.zeros(counters, dtype=torch.int32, device=device)


_nothing = nullcontext()


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Makes the device of ``x`` the current one, where it is not."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device(x.device)


def scale_gradient(
    backend: str, grad: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype, chunks: Chunks
) -> torch.Tensor:
    """``grad`` (one number, ``[B]`` or ``[B, N]``) times a ``gradient`` that a GPU forward wrote, in ``dtype``.

    In place, and without touching memory where ``grad`` is 1, unless the graph is kept for another backward.
    """
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    in_place = gradient.dtype == dtype and not keep
    out = gradient if in_place else torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if gradient.numel() == 0:
        return out
    if backend == "triton":
        from raven.kernels import gaussian_log_prob as kernels

        kernels.scale(grad, gradient, out, chunks)
        return out
    with on_device(gradient):
        torch.ops.raven_cuda.gaussian_step_scale_gradient.default(
            grad, gradient, borders(chunks, gradient.device), *plan(gradient.shape, chunks).sizes, out
        )
    return out
