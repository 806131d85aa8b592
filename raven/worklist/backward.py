"""Host side of the Hopper backward of `chunk_attention`: which block owns which keys, and whom they meet.

A *query tile* is ``block_q`` rows, anchored at the begin of a query range; the gradient of the queries is accumulated
per tile. A *key tile* is ``KEYS`` rows, anchored at the begin of a run of keys that the same queries see. A *visit* is
one query range that such a run meets. An *item* is a key tile of one head of one sample.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raven.planner import transpose

KEYS = 128


class BackwardPlan(NamedTuple):
    """Lists of one mask, int32."""

    q_tiles: np.ndarray  # [T, 2] first query, queries
    key_tiles: np.ndarray  # [K, 4] first key, keys, run of keys, number of the tile in its run
    visit_indptr: np.ndarray  # [runs + 1]
    visits: np.ndarray  # [V, 4] first query, queries, first query tile, key tiles of earlier runs that visit them
    items: np.ndarray  # [K * heads, 2] key tile, kv head + kv heads * sample; costliest first
    keys_seen: int  # keys in any run


def plan_backward(
    q_ranges: np.ndarray, kv_indptr: np.ndarray, kv_ranges: np.ndarray, block_q: int, heads: int, together: int
) -> BackwardPlan:
    """Cut spans into tiles and visits.

    ``heads`` counts pairs of a kv head and a sample; blocks work on ``together`` of them at the same time. Every query
    tile is visited in the order of the items, which is the same for every head.
    """
    runs, indptr, merged = (x.astype(np.int64) for x in transpose(q_ranges, kv_indptr, kv_ranges))
    q_ranges = q_ranges[q_ranges[:, 1] > q_ranges[:, 0]].astype(np.int64)
    tiles = -((q_ranges[:, 0] - q_ranges[:, 1]) // block_q)
    first_tile = np.cumsum(tiles) - tiles
    index, number = _expand(tiles)
    start = q_ranges[index, 0] + number * block_q
    q_tiles = np.stack([start, np.minimum(q_ranges[index, 1] - start, block_q)], axis=1)

    # `transpose` joins touching query ranges; a query range has one list of keys, so none is cut.
    first = np.searchsorted(q_ranges[:, 0], merged[:, 0])
    index, number = _expand(np.searchsorted(q_ranges[:, 0], merged[:, 1]) - first)
    visitor = first[index] + number
    run = np.repeat(np.arange(len(runs)), np.diff(indptr))[index]
    visit_indptr = np.searchsorted(run, np.arange(len(runs) + 1))

    # Costliest runs first; the turn of a key tile at a query range is its place among those that visit it.
    cost = np.bincount(run, weights=tiles[visitor], minlength=len(runs))
    order = np.argsort(-cost, kind="stable")
    place = np.empty(len(runs), dtype=np.int64)
    place[order] = np.arange(len(runs))
    key_tiles_of = -((runs[:, 0] - runs[:, 1]) // KEYS)
    by_query = np.lexsort((place[run], visitor))
    before = np.cumsum(key_tiles_of[run[by_query]]) - key_tiles_of[run[by_query]]
    begins = np.searchsorted(visitor[by_query], visitor[by_query])
    turn = np.empty(len(run), dtype=np.int64)
    turn[by_query] = before - before[begins] if len(run) else before
    visits = np.stack([q_ranges[visitor, 0], q_ranges[visitor, 1] - q_ranges[visitor, 0], first_tile[visitor], turn], 1)

    index, number = _expand(key_tiles_of[order])
    key_run = order[index]
    start = runs[key_run, 0] + number * KEYS
    key_tiles = np.stack([start, np.minimum(runs[key_run, 1] - start, KEYS), key_run, number], axis=1)

    tile, head = (x.reshape(-1) for x in np.meshgrid(np.arange(len(key_tiles)), np.arange(heads), indexing="ij"))
    items = np.lexsort((head, tile, head // max(together, 1), -cost[key_run[tile]]))
    items = np.stack([tile, head], axis=1)[items]
    arrays = (q_tiles, key_tiles, visit_indptr, visits, items)
    return BackwardPlan(*(x.astype(np.int32) for x in arrays), int((runs[:, 1] - runs[:, 0]).sum()))


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``counts[i]`` copies of ``i``, and the running number inside each copy."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
