"""The planner: C++ and Python give equal values, and both cover every visible pair exactly once."""

import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raven import planner

SIZE = 40


@st.composite
def ranges(draw, most):
    """Sorted, disjoint ranges below SIZE; some are empty, some touch."""
    cuts = draw(st.lists(st.integers(0, SIZE), max_size=2 * most).map(sorted))
    return [cuts[i : i + 2] for i in range(0, len(cuts) - 1, 2)]


@st.composite
def spans(draw):
    q_ranges = draw(ranges(6))
    lists = [draw(ranges(4).flatmap(st.permutations)) for _ in q_ranges]
    kv_indptr = np.cumsum([0, *map(len, lists)])
    kv_ranges = [r for keys in lists for r in keys]
    return (
        np.array(q_ranges, np.int32).reshape(-1, 2),
        kv_indptr.astype(np.int32),
        np.array(kv_ranges, np.int32).reshape(-1, 2),
    )


def dense_of_spans(q_ranges, kv_indptr, kv_ranges):
    """How often each (query, key) pair appears: int [SIZE, SIZE]."""
    count = np.zeros((SIZE, SIZE), dtype=int)
    for i, (begin, end) in enumerate(q_ranges):
        for first, last in kv_ranges[kv_indptr[i] : kv_indptr[i + 1]]:
            count[begin:end, first:last] += 1
    return count


def dense_of_plan(plan, block_q, block_k):
    count = np.zeros((SIZE, SIZE), dtype=int)
    for begin, length, index, _ in plan.q_tiles:
        assert 1 <= length <= block_q
        for start in plan.full_starts[plan.full_indptr[index] : plan.full_indptr[index + 1]]:
            count[begin : begin + length, start : start + block_k] += 1
        for start, left in plan.tails[plan.tail_indptr[index] : plan.tail_indptr[index + 1]]:
            assert 1 <= left < block_k
            count[begin : begin + length, start : start + left] += 1
    return count


def windowed_spans(chunks, tokens, sink=1, window=8):
    """Noisy and clean chunks by turns, each of which sees the sink, the last clean chunks, and itself."""
    q_ranges, kv_indptr, kv_ranges = [], [0], []
    for chunk in range(chunks):
        seen = [j for j in range(chunk) if j < sink or chunk - j <= window]
        for role in range(2):
            begin = (2 * chunk + role) * tokens
            q_ranges.append((begin, begin + tokens))
            kv_ranges += [((2 * j + 1) * tokens, (2 * j + 2) * tokens) for j in seen] + [(begin, begin + tokens)]
            kv_indptr.append(len(kv_ranges))
    return np.array(q_ranges, np.int32), np.array(kv_indptr, np.int32), np.array(kv_ranges, np.int32)


@pytest.fixture(params=["python", "c++"])
def path(request, monkeypatch):
    """Both implementations behind the public functions."""
    module = planner.compiled_or_reason()
    if request.param == "c++" and isinstance(module, str):
        pytest.skip(module)
    monkeypatch.setattr(planner, "compiled", lambda: module if request.param == "c++" else None)
    return request.param


def assert_equal_arrays(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == np.int32
        assert a.shape == b.shape
        assert (a == b).all()


@settings(max_examples=150, deadline=None)
@given(spans(), st.integers(1, 9), st.integers(1, 9))
def test_python_covers_each_visible_pair_once(spans, block_q, block_k):
    dense = dense_of_spans(*spans)
    plan = planner.TilePlan(*planner.plan_numpy(*spans, block_q, block_k))
    assert (dense_of_plan(plan, block_q, block_k) == dense).all()
    # Rows of queries: each once, also those that see nothing.
    rows = np.zeros(SIZE, dtype=int)
    for begin, length, index, cost in plan.q_tiles:
        rows[begin : begin + length] += 1
        assert spans[0][index][0] <= begin < spans[0][index][1]
        assert (begin - spans[0][index][0]) % block_q == 0
        assert cost == dense[begin].sum()
    asked = np.zeros(SIZE, dtype=int)
    for begin, end in spans[0]:
        asked[begin:end] += 1
    assert (rows == asked).all()
    assert (np.diff(plan.q_tiles[:, 3]) <= 0).all()

    turned = planner.transpose_numpy(*spans)
    assert (dense_of_spans(*turned) == dense.T).all()
    plan = planner.TilePlan(*planner.plan_numpy(*turned, block_q, block_k))
    assert (dense_of_plan(plan, block_q, block_k) == dense.T).all()


@settings(max_examples=150, deadline=None)
@given(spans(), st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 20), max_size=30), st.integers(1, 7))
def test_cpp_equals_python(spans, block_q, block_k, costs, workers):
    module = planner.compiled_or_reason()
    if isinstance(module, str):
        pytest.skip(module)
    assert_equal_arrays(module.plan(*spans, block_q, block_k), planner.plan_numpy(*spans, block_q, block_k))
    assert_equal_arrays(module.transpose(*spans), planner.transpose_numpy(*spans))
    costs = np.array(costs, np.int32)
    assert_equal_arrays(module.balance(costs, workers), planner.balance_numpy(costs, workers))


def test_ties_keep_their_order(path):
    q_ranges = [[0, 6], [6, 12], [12, 15]]
    plan = planner.plan(q_ranges, [0, 1, 2, 3], [[0, 5], [0, 7], [0, 5]], 4, 4)
    assert plan.q_tiles.tolist() == [[6, 4, 1, 7], [10, 2, 1, 7], [0, 4, 0, 5], [4, 2, 0, 5], [12, 3, 2, 5]]
    assert plan.full_starts.tolist() == [0, 0, 0]
    assert plan.tails.tolist() == [[4, 1], [4, 3], [4, 1]]


def test_transpose_merges_neighbours(path):
    turned = planner.transpose([[0, 4], [4, 8]], [0, 1, 4], [[0, 10], [0, 10], [10, 15], [15, 20]])
    assert [a.tolist() for a in turned] == [[[0, 10], [10, 20]], [0, 1, 2], [[0, 8], [4, 8]]]


def test_transposed_ring_skips_unseen_keys(path):
    turned = planner.transpose([[0, 4]], [0, 3], [[20, 24], [0, 4], [8, 10]])
    assert [a.tolist() for a in turned] == [[[0, 4], [8, 10], [20, 24]], [0, 1, 2, 3], [[0, 4]] * 3]


def test_nothing_to_plan(path):
    empty = np.zeros((0, 2), np.int32)
    plan = planner.plan(empty, [0], empty, 64, 64)
    assert plan.q_tiles.shape == (0, 4) and plan.tails.shape == (0, 2) and plan.full_starts.shape == (0,)
    assert plan.full_indptr.tolist() == plan.tail_indptr.tolist() == [0]
    k_ranges, q_indptr, q_ranges = planner.transpose(empty, [0], empty)
    assert k_ranges.shape == q_ranges.shape == (0, 2) and q_indptr.tolist() == [0]
    indptr, order = planner.balance([], 2)
    assert indptr.tolist() == [0, 0, 0] and order.shape == (0,)


def test_queries_without_keys_keep_their_tiles(path):
    plan = planner.plan([[3, 9]], [0, 0], np.zeros((0, 2), np.int32), 4, 4)
    assert plan.q_tiles.tolist() == [[3, 4, 0, 0], [7, 2, 0, 0]]
    assert plan.full_indptr.tolist() == plan.tail_indptr.tolist() == [0, 0]


def test_takes_tensors_of_any_layout(path):
    kv_ranges = torch.tensor([[0, 8], [7, 9]], dtype=torch.int32).T  # not contiguous
    assert kv_ranges.tolist() == [[0, 7], [8, 9]] and not kv_ranges.is_contiguous()
    plan = planner.plan(torch.tensor([[0, 2]]), torch.tensor([0, 2]), kv_ranges, 2, 4)
    assert plan.full_starts.tolist() == [0] and plan.tails.tolist() == [[4, 3], [8, 1]]


def test_balance_is_longest_first_to_the_least_loaded(path):
    indptr, order = planner.balance([3, 1, 4, 1, 5, 9, 2, 6], 3)
    assert indptr.tolist() == [0, 2, 5, 8]
    assert order.tolist() == [5, 6, 7, 0, 1, 4, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_balance_bound(costs, workers):
    """Whatever the costs, a greedy share ends within one longest tile of the mean load."""
    indptr, order = planner.balance_numpy(np.array(costs, np.int32), workers)
    assert sorted(order.tolist()) == list(range(len(costs)))
    loads = [sum(costs[t] for t in order[indptr[w] : indptr[w + 1]]) for w in range(workers)]
    assert max(loads) <= sum(costs) / workers + (1 - 1 / workers) * max(costs) + 1e-9


def test_many_segments_plan_fast(path):
    spans = windowed_spans(chunks=1024, tokens=4680)
    planner.plan(*spans, 128, 128)
    start = time.process_time()
    plan = planner.plan(*spans, 128, 128)
    planner.plan(*planner.transpose(*spans), 128, 128)
    elapsed = time.process_time() - start
    assert len(plan.q_tiles) == 2048 * 37
    # About 50 ms in C++ and 150 ms in Python on one slow core, for 2,048 ranges and 75,776 tiles.
    assert elapsed < (0.3 if path == "c++" else 2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0, 4]], [0, 1], [[0, 4]], 0, 4), ValueError, "block_q: got 0"),
        (([[0, 4]], [0, 1], [[0, 4]], 4, -1), ValueError, "block_k: got -1"),
        (([[0, 4, 5]], [0, 1], [[0, 4]], 4, 4), ValueError, r"q_ranges: got shape \(1, 3\)"),
        (([[0, 4]], [0], [[0, 4]], 4, 4), ValueError, "kv_indptr: got 1 entries, expected 2"),
        (([[0, 4]], [0, 2], [[0, 4]], 4, 4), ValueError, r"kv_indptr: got \[0, 2\], expected to climb from 0 to 1"),
        (([[0, 4], [4, 8]], [0, 2, 1], [[0, 4]], 4, 4), ValueError, r"kv_indptr: got \[0, 2, 1\], expected to climb"),
        (([[4, 0]], [0, 1], [[0, 4]], 4, 4), ValueError, r"q_ranges: got \[4, 0\]"),
        (([[0, 4]], [0, 1], [[-1, 4]], 4, 4), ValueError, r"kv_ranges: got \[-1, 4\]"),
        (([[4, 8], [0, 4]], [0, 1, 1], [[0, 4]], 4, 4), ValueError, "q_ranges: got .* expected sorted"),
        (([[0, 4]], [0, 2], [[6, 9], [0, 7]], 4, 4), ValueError, "kv_ranges: got .* twice in a list"),
        (([[0.0, 4.0]], [0, 1], [[0, 4]], 4, 4), TypeError, "q_ranges: got dtype float64, expected int32"),
        (([[0, 2**31]], [0, 1], [[0, 4]], 4, 4), ValueError, "q_ranges: got 2147483648, expected values that fit"),
    ],
)
def test_bad_spans(path, arguments, error, message):
    with pytest.raises(error, match=message):
        planner.plan(*arguments)


def test_bad_shares(path):
    with pytest.raises(ValueError, match="workers: got 0"):
        planner.balance([1], 0)
    with pytest.raises(ValueError, match="costs: got -1"):
        planner.balance([-1], 1)
    with pytest.raises(TypeError, match="costs: got dtype float64"):
        planner.balance([0.5], 1)


def test_missing_module_is_said_once(monkeypatch):
    monkeypatch.setattr(planner, "compiled_or_reason", lambda: "raven._C was not built")
    planner.compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="raven._C was not built; planning in Python"):
            planner.balance([1], 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planner.balance([1], 1)
        assert planner.description() == "planner in Python: raven._C was not built"
    finally:
        planner.compiled.cache_clear()
