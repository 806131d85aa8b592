"""Launches of the compiled Hopper kernels of ``chunk_attention``."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from raven import native
from raven.graphs import held_by_graphs
from raven.planner import plan
from raven.rows import multiprocessors
from raven.worklist.forward import WorkList, forward_work

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
ROWS = 128  # query rows of a tile, as in the kernels
KEYS = 128  # keys of a step, as in the kernels


def reason(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the compiled kernels cannot run on these tensors, or ``None``."""
    return tile_reason(q) or native.reason(q, k, v)


def tile_reason(q: torch.Tensor) -> str | None:
    """Why no Hopper kernel, compiled or Gluon, has tiles for such tensors, or ``None``."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of bfloat16, float16"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]} is not one of {HEAD_DIMS}"
    return None


def copyable(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the copy engine can fetch its rows (16-byte steps, nothing expanded), else a copy."""
    batch, token, head, channel = x.stride()
    if channel == 1 and x.data_ptr() % 16 == 0:
        if not (batch | token | head) & 7 and batch > 0 and token > 0 and head > 0:
            return x
        steps = zip(x.shape, (batch, token, head), strict=False)
        if all(size == 1 or (step > 0 and step % 8 == 0) for size, step in steps):
            return x
    return x.clone(memory_format=torch.contiguous_format)


class DeviceWork:
    """A ``WorkList`` on the device."""

    def __init__(self, work: np.ndarray, steps: np.ndarray, slots: int, device: torch.device):
        self.work, self.steps = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (work, steps))
        self.slots = slots


def planned(
    ranges: tuple[bytes, bytes, bytes], heads: int, group: int, head_bytes: int, device: torch.device
) -> WorkList:
    """The work of both Hopper forwards, this one and Triton's; arguments as of `forward_work`."""
    q_ranges, kv_indptr, kv_ranges = (np.frombuffer(x, dtype=np.int32) for x in ranges)
    tiles = plan(q_ranges.reshape(-1, 2), kv_indptr, kv_ranges.reshape(-1, 2), ROWS, KEYS)
    return forward_work(tiles, KEYS, heads, group, head_bytes, multiprocessors(device))


@lru_cache(maxsize=1024)
def _forward_work(
    ranges: tuple[bytes, bytes, bytes], heads: int, group: int, head_bytes: int, device: torch.device
) -> DeviceWork:
    made = planned(ranges, heads, group, head_bytes, device)
    return DeviceWork(made.work, made.steps, made.slots, device)


def forward(q, k, v, out, lse, ranges: tuple[bytes, bytes, bytes], scale: float) -> None:
    """Fill ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]`` (contiguous) for the queries of the ranges (a span's
    lists); nothing is empty."""
    B, _, H, D = q.shape
    group = H // k.shape[2]
    head_bytes = 2 * k.shape[1] * D * q.element_size()
    device_work = held_by_graphs(_forward_work(ranges, H, group, head_bytes, q.device))
    if not len(device_work.work):
        return
    q, k, v = (copyable(x) for x in (q, k, v))
    slots = device_work.slots
    counters = torch.zeros(1 + 2 * slots * B, dtype=torch.int32, device=q.device)
    workspace = torch.empty(B * slots * 2 * (D // 2 + 4) * 128, dtype=torch.float32, device=q.device)
    torch.ops.raven_cuda.chunk_attention_forward.default(
        q, k, v, out, lse, device_work.work, device_work.steps, slots, counters, workspace, scale,
        multiprocessors(q.device),
    )  # fmt: skip
