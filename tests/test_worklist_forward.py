"""The work list of the Hopper kernels: every key of every query tile exactly once, whatever the splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raven.layout import ChunkLayout
from raven.planner import plan
from raven.spans import Spans
from raven.worklist.forward import FEW, FIELDS, MIN_STEPS, _makespan, forward_work

BLOCK = 128
WORKERS = 132
COLUMN = {name: i for i, name in enumerate(FIELDS)}


def work_of(spans, heads=12, group=1, head_bytes=1 << 20, workers=WORKERS):
    tiles = plan(spans.q_ranges.numpy(), spans.kv_indptr.numpy(), spans.kv_ranges.numpy(), BLOCK, BLOCK)
    return tiles, forward_work(tiles, BLOCK, heads, group, head_bytes, workers)


def keys_seen(made):
    """Per (first query, head) the keys in the order of the parts."""
    seen = {}
    for row in made.work.tolist():
        fields = dict(zip(FIELDS, row, strict=True))
        run = made.steps[fields["first_step"] : fields["first_step"] + fields["steps"]]
        seen.setdefault((fields["q_start"], fields["head"]), []).append((fields["part"], fields, run))
    return seen


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    tokens=st.integers(1, 400),
    heads=st.sampled_from([1, 3, 12]),
    workers=st.sampled_from([1, 7, 132]),
)
def test_every_key_of_every_tile_once(chunks, tokens, heads, workers):
    spans = ChunkLayout.repacked(tuple(chunks), tokens).spans
    tiles, made = work_of(spans, heads=heads, workers=workers)
    assert len(made.work) >= len(tiles.q_tiles) * heads
    slots = []
    seen = keys_seen(made)
    assert len(seen) == len(tiles.q_tiles) * heads
    for start, _, index, cost in tiles.q_tiles.tolist():
        expected = np.concatenate(
            [np.arange(a, b) for a, b in spans.kv_ranges[spans.kv_indptr[index] : spans.kv_indptr[index + 1]].tolist()]
        )
        for head in range(heads):
            parts = sorted(seen[start, head], key=lambda x: x[0])
            assert [part for part, _, _ in parts] == list(range(parts[0][1]["parts"]))
            keys = np.concatenate([np.arange(a, a + n) for _, _, run in parts for a, n in run.tolist()])
            assert len(keys) == cost
            assert np.array_equal(np.sort(keys), np.sort(expected))
            if len(parts) > 1:
                assert all(fields["steps"] >= MIN_STEPS for _, fields, _ in parts)
                assert len({fields["slot"] for _, fields, _ in parts}) == 1
                slots.append((parts[0][1]["slot"], len(parts)))
    slots.sort()
    assert [first for first, _ in slots] == np.cumsum([0] + [count for _, count in slots])[:-1].tolist()
    assert made.slots == sum(count for _, count in slots)


def test_a_decode_that_fills_the_last_wave_badly_is_split():
    tiles, made = work_of(Spans.full(4680, 32760), head_bytes=2 * 32760 * 256)
    whole = np.full(12 * 37, 256)
    before = _makespan(whole, np.ones(len(whole), dtype=int), WORKERS)
    parts = made.work[:, COLUMN["steps"]]
    after = _makespan(parts, np.ones(len(parts), dtype=int), WORKERS)
    assert made.slots > 0
    assert after < 0.9 * before
    assert after < 1.06 * parts.sum() / WORKERS


def test_a_long_list_is_not_split():
    spans = ChunkLayout.repacked((3,) * 7, 1560).spans
    tiles, made = work_of(spans)
    assert len(made.work) == 12 * len(tiles.q_tiles) > FEW * WORKERS
    assert made.slots == 0


@pytest.mark.parametrize("head_bytes, expected", [(1 << 20, 4), (16 << 20, 4), (32 << 20, 2), (1 << 30, 2)])
def test_heads_whose_keys_fit_the_cache_run_side_by_side(head_bytes, expected):
    _, made = work_of(Spans.full(40 * BLOCK * 100, 64), heads=4, group=2, head_bytes=head_bytes)
    heads = made.work[:, COLUMN["head"]]
    first = np.flatnonzero(heads != np.resize(np.arange(expected), len(heads)))
    if expected == 4:
        assert len(first) == 0
    else:
        assert first[0] == expected * 4000
    assert set(heads.tolist()) == {0, 1, 2, 3}


def test_queries_without_keys_keep_their_work():
    spans = Spans([[0, 5], [5, 9]], [0, 0, 1], [[0, 3]])
    _, made = work_of(spans, heads=1)
    assert sorted(made.work[:, COLUMN["steps"]].tolist()) == [0, 1]
