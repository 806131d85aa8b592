"""Turn ``Spans`` into what kernels consume: query tiles, key tiles per query range, and a fair share per worker.

The same three functions exist in C++ (``raven._C``, from ``csrc/host/planner.cpp``) and here in numpy, with equal
values; the C++ ones are used when they were built. Every array is int32 and every range is ``[begin, end)``.

Terms. A *list* is the key ranges that one query range sees. A *full* tile is ``block_k`` keys, a *tail* tile is what is
left of a key range, so a kernel masks keys in tail tiles only.
"""

from __future__ import annotations

import heapq
import importlib
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

Array = np.ndarray
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Tiles of one attention problem, numpy int32.

    ``q_tiles [T, 4]``: ``(begin, length, list, cost)``, length in ``[1, block_q]``, cost in keys, costliest first.
    ``full_starts [full_indptr[n]]``: first keys of the full tiles of each list, ``full_indptr [n + 1]``.
    ``tails [tail_indptr[n], 2]``: ``(start, length)`` with length in ``[1, block_k)``, ``tail_indptr [n + 1]``.
    """

    q_tiles: Array
    full_indptr: Array
    full_starts: Array
    tail_indptr: Array
    tails: Array


def plan(q_ranges: Array, kv_indptr: Array, kv_ranges: Array, block_q: int, block_k: int) -> TilePlan:
    """Cut spans into tiles.

    Args:
        q_ranges: int32 ``[n, 2]``, sorted and disjoint.
        kv_indptr: int32 ``[n + 1]``; the keys of query range ``i`` are ``kv_ranges[kv_indptr[i]:kv_indptr[i + 1]]``.
        kv_ranges: int32 ``[m, 2]``, disjoint within one list, in any order.
        block_q: queries in a tile; tiles are anchored at the begin of each query range.
        block_k: keys in a full tile; tiles are anchored at the begin of each key range.

    Numpy arrays or CPU tensors. A query range without keys keeps its tiles (its output is zero) and has empty lists.
    Raises ``ValueError`` for spans that break the rules above, ``TypeError`` for arrays that are not of integers.
    """
    spans = _checked_spans(q_ranges, kv_indptr, kv_ranges)
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ValueError(f"{name}: got {block}, expected a positive number of rows")
    module = compiled()
    return TilePlan(*(plan_numpy if module is None else module.plan)(*spans, int(block_q), int(block_k)))


def transpose(q_ranges: Array, kv_indptr: Array, kv_ranges: Array) -> tuple[Array, Array, Array]:
    """The same pairs seen from the keys: ``(k_ranges [n', 2], q_indptr [n' + 1], q_ranges [m', 2])``.

    Keys are cut at every border of a key range; neighbours seen by the same queries are one range, touching query
    ranges merge, and keys that nobody sees are in no range. The result fits ``plan`` with the roles swapped, which
    is how the key and value gradients are computed without atomics. Arguments and errors as ``plan``.
    """
    spans = _checked_spans(q_ranges, kv_indptr, kv_ranges)
    module = compiled()
    return tuple((transpose_numpy if module is None else module.transpose)(*spans))


def balance(costs: Array, workers: int) -> tuple[Array, Array]:
    """Share tiles among persistent workers, costliest tile first, always to the least loaded worker.

    Args:
        costs: integers ``[T]``, not negative; ties keep their order, and equal loads go to the lowest worker.
        workers: how many.

    Returns ``(indptr [workers + 1], order [T])``: worker ``w`` runs tiles ``order[indptr[w]:indptr[w + 1]]``.
    Raises ``ValueError`` for a negative cost, a wrong shape or no worker, ``TypeError`` for costs not of integers.
    """
    costs = _int32("costs", costs, 1)
    if costs.size and costs.min() < 0:
        raise ValueError(f"costs: got {costs.min()}, expected no negative cost")
    if workers < 1:
        raise ValueError(f"workers: got {workers}, expected at least 1")
    module = compiled()
    return tuple((balance_numpy if module is None else module.balance)(costs, int(workers)))


@lru_cache(maxsize=1)
def compiled_or_reason() -> ModuleType | str:
    """The module ``raven._C``, or why there is none."""
    try:
        return importlib.import_module("raven._C")
    except ModuleNotFoundError:
        return "raven._C was not built (it needs a C++17 compiler at installation)"
    except ImportError as error:
        return f"raven._C does not load: {error}"


@lru_cache(maxsize=1)
def compiled() -> ModuleType | None:
    """The module ``raven._C``, or ``None``, which is said once."""
    module = compiled_or_reason()
    if isinstance(module, str):
        warnings.warn(f"{module}; planning in Python, with equal results", RuntimeWarning, stacklevel=3)
        return None
    return module


def description() -> str:
    """One line for people: which planner runs, and why not the compiled one."""
    module = compiled_or_reason()
    return f"planner in Python: {module}" if isinstance(module, str) else "planner in C++ (raven._C)"


def _int32(name: str, values: Array, ndim: int) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        if array.size:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
        array = array.astype(np.int32)
    if array.ndim != ndim or (ndim == 2 and array.shape[1] != 2):
        raise ValueError(f"{name}: got shape {array.shape}, expected {'[any, 2]' if ndim == 2 else '[any]'}")
    if array.dtype != np.int32 and array.size and (array.max() > _INT32_MAX or array.min() < -_INT32_MAX):
        raise ValueError(f"{name}: got {array.max()}, expected values that fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def _checked_spans(q_ranges: Array, kv_indptr: Array, kv_ranges: Array) -> tuple[Array, Array, Array]:
    q_ranges = _int32("q_ranges", q_ranges, 2)
    kv_indptr = _int32("kv_indptr", kv_indptr, 1)
    kv_ranges = _int32("kv_ranges", kv_ranges, 2)
    if len(kv_indptr) != len(q_ranges) + 1:
        raise ValueError(f"kv_indptr: got {len(kv_indptr)} entries, expected {len(q_ranges) + 1}")
    if kv_indptr[0] != 0 or kv_indptr[-1] != len(kv_ranges) or (np.diff(kv_indptr) < 0).any():
        got = kv_indptr.tolist() if len(kv_indptr) <= 8 else f"{kv_indptr[:8].tolist()} ..."
        raise ValueError(
            f"kv_indptr: got {got}, expected to climb from 0 to {len(kv_ranges)}, the number of key ranges"
        )
    for name, ranges in (("q_ranges", q_ranges), ("kv_ranges", kv_ranges)):
        bad = (ranges[:, 0] < 0) | (ranges[:, 1] < ranges[:, 0])
        if bad.any():
            raise ValueError(f"{name}: got {ranges[bad][0].tolist()}, expected 0 <= begin <= end")
    bad = q_ranges[1:, 0] < q_ranges[:-1, 1]
    if bad.any():
        raise ValueError(f"q_ranges: got {q_ranges[1:][bad][0].tolist()} after a later end, expected sorted, disjoint")
    _check_disjoint(kv_indptr, kv_ranges)
    return q_ranges, kv_indptr, kv_ranges


def _check_disjoint(kv_indptr: Array, kv_ranges: Array) -> None:
    """A key that is twice in one list would count twice in the softmax."""
    lists = np.repeat(np.arange(len(kv_indptr) - 1), np.diff(kv_indptr))
    keep = kv_ranges[:, 0] < kv_ranges[:, 1]
    lists, ranges = lists[keep], kv_ranges[keep]
    bad = (lists[1:] == lists[:-1]) & (ranges[1:, 0] < ranges[:-1, 1])
    if bad.any():  # overlapping, or only out of order
        order = np.lexsort((ranges[:, 0], lists))
        lists, ranges = lists[order], ranges[order]
        bad = (lists[1:] == lists[:-1]) & (ranges[1:, 0] < ranges[:-1, 1])
        if bad.any():
            raise ValueError(f"kv_ranges: got {ranges[1:][bad][0].tolist()} twice in a list, expected disjoint ranges")


def _expand(counts: Array) -> tuple[Array, Array]:
    """``counts[i]`` copies of ``i``, and the running number inside each copy."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def _indptr(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts)])


def plan_numpy(q_ranges: Array, kv_indptr: Array, kv_ranges: Array, block_q: int, block_k: int) -> tuple[Array, ...]:
    """``plan`` on checked int32 arrays, in numpy; the fields of ``TilePlan``."""
    q_begin, q_end = q_ranges.astype(np.int64).T
    k_begin, k_end = kv_ranges.astype(np.int64).T
    lengths = k_end - k_begin
    keys = np.diff(_indptr(lengths)[kv_indptr])  # per list

    index, number = _expand(-((q_begin - q_end) // block_q))
    begin = q_begin[index] + number * block_q
    q_tiles = np.stack([begin, np.minimum(q_end[index] - begin, block_q), index, keys[index]], axis=1)
    q_tiles = q_tiles[np.argsort(-q_tiles[:, 3], kind="stable")]

    full, number = _expand(lengths // block_k)
    full_indptr = _indptr(lengths // block_k)[kv_indptr]
    full_starts = k_begin[full] + number * block_k

    left = lengths % block_k
    tail_indptr = _indptr(left > 0)[kv_indptr]
    tails = np.stack([k_end - left, left], axis=1)[left > 0]
    return tuple(a.astype(np.int32) for a in (q_tiles, full_indptr, full_starts, tail_indptr, tails))


def transpose_numpy(q_ranges: Array, kv_indptr: Array, kv_ranges: Array) -> tuple[Array, Array, Array]:
    """``transpose`` on checked int32 arrays, in numpy."""
    visitor = np.repeat(np.arange(len(q_ranges)), np.diff(kv_indptr))
    keep = (kv_ranges[:, 0] < kv_ranges[:, 1]) & (q_ranges[visitor, 0] < q_ranges[visitor, 1])
    visitor, kv_ranges = visitor[keep], kv_ranges[keep]
    borders = np.unique(kv_ranges)
    first, last = np.searchsorted(borders, kv_ranges.T)

    # One entry per visit of a query range to an interval between neighbouring borders, by interval, then by query.
    entry, number = _expand(last - first)
    interval, visitor = first[entry] + number, visitor[entry]
    order = np.lexsort((visitor, interval))
    interval, visits = interval[order], q_ranges[visitor[order]]

    starts = np.ones(len(visits), dtype=bool)  # where a new merged query range begins
    starts[1:] = (interval[1:] != interval[:-1]) | (visits[1:, 0] != visits[:-1, 1])
    heads = np.flatnonzero(starts)
    ends = visits[np.append(heads[1:], len(visits)) - 1, 1] if len(heads) else visits[:, 1]
    visits, interval = np.stack([visits[heads, 0], ends], axis=1), interval[heads]

    # Neighbouring intervals with the same visits become one key range.
    used, offset, counts = np.unique(interval, return_index=True, return_counts=True)
    same = np.zeros(len(used), dtype=bool)  # as the interval before
    same[1:] = (used[1:] == used[:-1] + 1) & (counts[1:] == counts[:-1])
    index, number = _expand(counts * same)
    differ = (visits[offset[index] + number] != visits[offset[index - 1] + number]).any(axis=1)
    same[index[differ]] = False
    heads = np.flatnonzero(~same)
    tails = np.append(heads[1:], len(used))[: len(heads)] - 1

    k_ranges = np.stack([borders[used[heads]], borders[used[tails] + 1]], axis=1) if len(heads) else visits
    index, number = _expand(counts[heads])
    visits = visits[offset[heads][index] + number]
    return tuple(a.astype(np.int32) for a in (k_ranges, _indptr(counts[heads]), visits))


def balance_numpy(costs: Array, workers: int) -> tuple[Array, Array]:
    """``balance`` on checked int32 costs, in Python."""
    loads = [(0, worker) for worker in range(workers)]
    shares: list[list[int]] = [[] for _ in range(workers)]
    for tile in np.argsort(-costs.astype(np.int64), kind="stable").tolist():
        load, worker = loads[0]
        heapq.heapreplace(loads, (load + int(costs[tile]), worker))
        shares[worker].append(tile)
    indptr = _indptr(np.array([len(share) for share in shares]))
    order = np.array([tile for share in shares for tile in share])
    return indptr.astype(np.int32), order.astype(np.int32)
