"""Launches of the Gluon forward kernel of ``chunk_attention``, which the Triton backend runs on Hopper."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module

import numpy as np
import torch

from raven import backends, native
from raven.graphs import held_by_graphs
from raven.ops._chunk_attention_cuda import KEYS, ROWS, copyable, planned, tile_reason

CHECKED = ((3, 6),)  # releases of Triton whose Gluon ran this kernel's tests on a GPU


def reason(q: torch.Tensor) -> str | None:
    """Why the Triton backend runs its portable forward kernel on such queries, or ``None`` if it runs Hopper's."""
    if missing := tile_reason(q):
        return missing
    if not q.is_cuda:
        return f"the tensors are on {q.device.type}"
    if backends.interpreting():
        return "Triton's interpreter does not run Gluon"
    if (capability := backends.capability(q.device.index)) != native.CAPABILITY:
        return f"compute capability {capability} is not {native.CAPABILITY}"
    return compiler_reason()


@lru_cache(maxsize=1)
def compiler_reason() -> str | None:
    """Why the installed Triton does not compile the kernel, or ``None``."""
    version = backends.triton_version()
    if version is None:
        return "triton is not installed"
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) not in CHECKED:
        names = ", ".join(".".join(map(str, release)) for release in CHECKED)
        return f"Gluon differs between releases of Triton: checked with {names}, got {version}"
    try:
        import_module("raven.kernels.chunk_attention_hopper")
    except (ImportError, AttributeError) as error:
        return f"the Gluon of triton {version} lacks something: {error}"
    return None


class DeviceWork:
    """Work and steps of one sample on the device, and the split tiles whose parts are to be merged."""

    def __init__(self, work: np.ndarray, steps: np.ndarray, slots: int, device: torch.device):
        q_start, q_length, head, first, count, part, parts, slot = work.T
        whole = np.concatenate([[0], np.cumsum(steps[:, 1] == KEYS)])
        full = whole[first + count] - whole[first]
        zero = np.zeros_like(slot)
        rows = [q_start, q_length, head, first, full, count - full, np.where(parts > 1, slot + part, -1), zero]
        split = (parts > 1) & (part == 0)
        merges = np.stack([q_start, q_length, head, slot, parts], axis=1)[split]
        steps = np.concatenate([steps, np.zeros((1, 2), dtype=np.int32)])  # kernels read one ahead
        lists = (np.stack(rows, axis=1), steps, merges)
        self.work, self.steps, self.merges = (
            torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device) for x in lists
        )
        self.slots = slots


@lru_cache(maxsize=1024)
def _device_work(
    ranges: tuple[bytes, bytes, bytes], heads: int, group: int, head_bytes: int, device: torch.device
) -> DeviceWork:
    made = planned(ranges, heads, group, head_bytes, device)
    return DeviceWork(made.work, made.steps, made.slots, device)


def forward(q, k, v, out, lse, ranges: tuple[bytes, bytes, bytes], scale: float) -> None:
    """Fill ``out [B, Lq, H, D]`` and ``lse [B, H, Lq]`` (contiguous) for the queries of the ranges (a span's
    lists); nothing is empty."""
    from raven.kernels import chunk_attention as portable
    from raven.kernels import chunk_attention_hopper as hopper

    B, _, H, D = q.shape
    head_bytes = 2 * k.shape[1] * D * k.element_size()
    device_work = held_by_graphs(_device_work(ranges, H, H // k.shape[2], head_bytes, q.device))
    if not len(device_work.work):
        return
    q, k, v = (copyable(x) for x in (q, k, v))
    parts = torch.empty((B, device_work.slots, ROWS, D), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((B, device_work.slots, ROWS), dtype=torch.float32, device=q.device)
    hopper.forward(q, k, v, out, lse, parts, parts_lse, device_work.work, device_work.steps, scale)
    portable.merge(parts, parts_lse, out, lse, device_work.merges)
