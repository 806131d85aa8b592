"""Lists of the Hopper backward: every visible pair once, tiles where the kernel expects them, turns without a gap."""

import itertools

import numpy as np
import pytest

from raven.layout import ChunkLayout
from raven.testing import KINDS, random_mask
from raven.worklist.backward import KEYS, plan_backward


def plan_of(spans, block_q, heads, together):
    arrays = (x.numpy() for x in (spans.q_ranges, spans.kv_indptr, spans.kv_ranges))
    return plan_backward(*arrays, block_q, heads, together)


def check(spans, q_len, kv_len, block_q, heads, together):
    made = plan_of(spans, block_q, heads, together)
    met = np.zeros((q_len, kv_len), dtype=int)
    turns = np.zeros((heads, len(made.q_tiles)), dtype=int)  # key tiles that have visited a query tile
    for tile, head in made.items:  # blocks take them in this order
        start, keys, run, number = made.key_tiles[tile]
        assert 1 <= keys <= KEYS
        for q_start, queries, first_tile, turn in made.visits[made.visit_indptr[run] : made.visit_indptr[run + 1]]:
            met[q_start : q_start + queries, start : start + keys] += head == 0
            for i, at in enumerate(range(0, queries, block_q)):
                assert made.q_tiles[first_tile + i].tolist() == [q_start + at, min(block_q, queries - at)]
                assert turns[head, first_tile + i] == turn + number
                turns[head, first_tile + i] += 1
    want = spans.dense_mask(q_len, kv_len).numpy()
    np.testing.assert_array_equal(met, want)
    assert made.keys_seen == want.any(0).sum()
    assert len(np.unique(made.items, axis=0)) == len(made.items) == len(made.key_tiles) * heads
    cost_of_visits = -(-made.visits[:, 1] // block_q)
    cost_of_runs = np.array([cost_of_visits[a:b].sum() for a, b in itertools.pairwise(made.visit_indptr)])
    costs = cost_of_runs[made.key_tiles[made.items[:, 0], 2]] if len(made.items) else cost_of_runs
    assert (np.diff(costs) <= 0).all(), "costliest first"


@pytest.mark.parametrize("seed", range(5 * len(KINDS)))
def test_masks(seed):
    mask = random_mask(seed, 500)
    check(mask.spans, mask.q_len, mask.kv_len, (64, 80, 128)[seed % 3], 1 + seed % 4, 1 + seed % 3)


@pytest.mark.parametrize("together", [1, 2, 6])
def test_heads_that_work_together(together):
    """All key tiles of a cost for some heads, then for the next: their queries stay in the cache meanwhile."""
    layout = ChunkLayout.repacked((3, 2, 3), 150)
    check(layout.spans, layout.length, layout.length, 80, 6, together)
    made = plan_of(layout.spans, 80, 6, together)
    first = made.items[: made.key_tiles[made.key_tiles[:, 2] == made.key_tiles[0, 2]].shape[0] * together]
    assert set(first[:, 1]) == set(range(together))


def test_thousand_segments():
    layout = ChunkLayout.repacked((1,) * 520, 1, sink=1, window=2)
    check(layout.spans, layout.length, layout.length, 80, 1, 1)
