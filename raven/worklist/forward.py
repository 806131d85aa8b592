"""The list of work of the Hopper attention kernels: which tile of which head a block takes next.

Made once per mask on the host. Order is that of the list: the longest first within a group of heads whose keys and
values fit the L2 cache, heads of a group side by side, so that neighbours read the same keys at about the same time.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from raven.planner import TilePlan

Array = np.ndarray

FIELDS = ("q_start", "q_length", "head", "first_step", "steps", "part", "parts", "slot")
L2_BYTES = 32 << 20  # what a group of heads may take of the cache; the rest is queries, outputs and drift
OVERHEAD = 3  # of a piece of work, in steps: loading queries, storing results, filling the pipeline
MERGE = 2  # of a part of a split tile, in steps: writing it, and its share of the merge
FEW = 8  # waves of work beyond which the last one is too small a share to be worth splitting
MIN_STEPS = 4  # of a part
PARTS = (2, 3, 4, 5, 6, 8, 11, 16, 22, 32)


@dataclass(frozen=True)
class WorkList:
    """``work [n, 8]`` of ``FIELDS``, ``steps [m, 2]`` of (first key, keys), both int32, and the parts to be merged."""

    work: Array
    steps: Array
    slots: int


def forward_work(tiles: TilePlan, block_k: int, heads: int, group: int, head_bytes: int, workers: int) -> WorkList:
    """Work of the forward kernel for one sample; every sample of a batch gets the same, so that its bits are the same.

    Args:
        tiles: plan of the ranges with the kernel's tile sizes.
        block_k: keys of a full tile in it.
        heads: query heads; ``group`` of them share a key head.
        head_bytes: bytes of the keys and values of one key head.
        workers: blocks that run side by side (multiprocessors).
    """
    indptr = tiles.full_indptr + tiles.tail_indptr
    steps = _steps(tiles, indptr, block_k)
    start, length, lists, _ = tiles.q_tiles.T
    rows = np.stack([start, length, np.zeros_like(start), indptr[lists], indptr[lists + 1] - indptr[lists]], axis=1)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]

    side_by_side = max(1, L2_BYTES // max(1, head_bytes)) * group
    order = []
    for first in range(0, heads, side_by_side):
        some = np.arange(first, min(heads, first + side_by_side))
        block = np.repeat(rows, len(some), axis=0)
        block[:, 2] = np.tile(some, len(rows))
        order.append(block)
    work = np.concatenate(order) if order else rows
    parts = _choose_parts(work[:, 4], workers)
    return WorkList(*_split(work, parts, steps))


def _steps(tiles: TilePlan, indptr: Array, block_k: int) -> Array:
    """Per key list its full tiles, then its tails."""
    steps = np.empty((int(indptr[-1]), 2), dtype=np.int32)
    for indices, values in (
        (tiles.full_indptr, np.stack([tiles.full_starts, np.full_like(tiles.full_starts, block_k)], axis=1)),
        (tiles.tail_indptr, tiles.tails),
    ):
        lists = np.repeat(np.arange(len(indices) - 1), np.diff(indices))
        behind = tiles.full_indptr[1:] if indices is tiles.tail_indptr else tiles.tail_indptr[:-1]
        steps[np.arange(len(values)) + behind[lists]] = values
    return steps


def _choose_parts(steps: Array, workers: int) -> Array:
    """Into how many parts to split each piece: of equal pieces that fill the last wave badly, those of that wave."""
    parts = np.ones(len(steps), dtype=np.int64)
    if len(steps) >= FEW * workers or len(steps) == 0:
        return parts
    best = _makespan(steps, parts, workers)
    whole = len(steps) // workers
    chosen = parts
    for kept in sorted({max(0, whole - i) * workers for i in range(3)}):
        for count in PARTS:
            trial = parts.copy()
            trial[kept:] = np.clip(steps[kept:] // MIN_STEPS, 1, count)
            span = _makespan(steps, trial, workers)
            if span < 0.98 * best:  # a split costs memory traffic that the model only guesses
                best, chosen = span, trial
    return chosen


def _makespan(steps: Array, parts: Array, workers: int) -> float:
    """When the last worker is done if each takes the next piece as soon as it is free."""
    free = [0.0] * workers
    for count, pieces in zip(steps.tolist(), parts.tolist(), strict=True):
        cost = count / pieces + OVERHEAD + (MERGE if pieces > 1 else 0)
        for _ in range(pieces):
            heapq.heapreplace(free, free[0] + cost)
    return max(free)


def _split(work: Array, parts: Array, steps: Array) -> tuple[Array, Array, int]:
    index = np.repeat(np.arange(len(work)), parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    slots = np.where(parts > 1, parts, 0)
    slot = (np.cumsum(slots) - slots)[index]
    count, total = parts[index], work[index, 4]
    begin, end = total * part // count, total * (part + 1) // count
    out = np.concatenate([work[index], np.stack([part, count, slot], axis=1)], axis=1)
    out[:, 3] += begin
    out[:, 4] = end - begin
    return np.ascontiguousarray(out, dtype=np.int32), steps, int(slots.sum())
