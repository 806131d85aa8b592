"""Launch of the compiled Hopper backward of ``chunk_attention``."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from raven.graphs import held_by_graphs
from raven.ops._chunk_attention_cuda import copyable
from raven.rows import multiprocessors
from raven.worklist.backward import plan_backward

ROWS = {64: 128, 128: 80}  # query rows of a tile, by head_dim
L2_BYTES = 40 << 20  # what the queries and gradients that blocks read at the same time may fill


class DeviceLists:
    """A ``BackwardPlan`` on the device."""

    def __init__(self, ranges: tuple[bytes, bytes, bytes], rows: int, heads: int, together: int, device: torch.device):
        q, indptr, k = (np.frombuffer(x, dtype=np.int32) for x in ranges)
        plan = plan_backward(q.reshape(-1, 2), indptr, k.reshape(-1, 2), rows, heads, together)
        names = ("q_tiles", "items", "key_tiles", "visit_indptr", "visits")
        self.lists = [torch.from_numpy(getattr(plan, name)).to(device) for name in names]
        self.tiles = len(plan.q_tiles)
        self.queries = int(plan.q_tiles[:, 1].sum())  # that are in a range
        self.keys = plan.keys_seen


@lru_cache(maxsize=1024)
def _device_lists(
    ranges: tuple[bytes, bytes, bytes], rows: int, heads: int, together: int, device: torch.device
) -> DeviceLists:
    return DeviceLists(ranges, rows, heads, together, device)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spans: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv. The parts of dq are added in float32 in whatever order blocks finish, or in the order of the work
    list under ``torch.use_deterministic_algorithms(True)``; dk and dv repeat bit for bit in any case.

    A float32 copy of dq lives on the device meanwhile, with query ranges padded to whole tiles.
    """
    op, deterministic = torch.ops.raven_cuda.chunk_attention_backward, torch.are_deterministic_algorithms_enabled()
    return launch(op, grad_out, grad_lse, q, k, v, out, lse, spans, scale, ROWS[q.shape[-1]], deterministic)


def launch(op, grad_out, grad_lse, q, k, v, out, lse, spans, scale, rows, deterministic):
    """``backward`` with a given op, tile and mode."""
    B, L, H, D = q.shape
    Hkv = k.shape[2]
    together = max(1, L2_BYTES // max(1, 2 * L * (H // Hkv) * D * q.element_size()))
    ranges = tuple(x.numpy().tobytes() for x in spans)
    lists = held_by_graphs(_device_lists(ranges, rows, B * Hkv, together, q.device))
    dq = (torch.empty if lists.queries == L else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    tiles = B * H * lists.tiles
    make = torch.empty if tiles and lists.keys == k.shape[1] else torch.zeros
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    if not tiles:
        return dq, dk, dv
    grad_out, q, k, v = (copyable(x) for x in (grad_out, q, k, v))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    statistics = torch.empty(tiles * 2 * rows, dtype=torch.float32, device=q.device)
    accumulator = torch.empty(tiles * rows * D, dtype=torch.float32, device=q.device)
    next_item = torch.empty(1, dtype=torch.int32, device=q.device)
    turns = torch.empty(2 * tiles, dtype=torch.int32, device=q.device) if deterministic else None
    op(
        grad_out, grad_lse, q, k, v, out.contiguous(), lse.contiguous(), dq, dk, dv, *lists.lists, statistics,
        accumulator, next_item, turns, scale, multiprocessors(q.device),
    )  # fmt: skip
    return dq, dk, dv
