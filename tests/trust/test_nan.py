"""NaN where a query does not look changes no bit of its result, forward and backward."""

import random

import pytest
import torch
from attention_cases import deterministic
from problems import GRADS, Problem

from raven.testing import KINDS, assert_bitwise

NAN = float("nan")
PER_TEST = 11


def poisoned(x, rows):
    """A copy with NaN in these tokens."""
    x = x.detach().clone()
    x[:, rows] = NAN
    return x


def run(problem, **changes):
    with deterministic():  # bits can be compared
        return problem.run(**changes)


def same_where(got, want, keep, dim, name):
    index = keep.nonzero().flatten()
    assert_bitwise(got.index_select(dim, index), want.index_select(dim, index), name)


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 5 * PER_TEST, PER_TEST))
def test_nan_that_nobody_sees(backend, first):
    """Keys outside all ranges, queries without keys, and the gradients of those."""
    for seed in range(first, first + PER_TEST):
        problem = Problem.of(1000 + seed, 500)
        blind, unseen = ~problem.dense.any(1), ~problem.dense.any(0)
        q, grad = (poisoned(x, blind) for x in (problem.q, problem.grad))
        k, v = (poisoned(x, unseen) for x in (problem.k, problem.v))
        want, got = run(problem), run(problem, q=q, k=k, v=v, grad=grad)
        for name, result in got.items():
            assert_bitwise(result, want[name], f"seed {seed}, {problem.mask.kind}, {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 5 * PER_TEST, PER_TEST))
def test_nan_in_some_keys(backend, first):
    """Queries that do not see them keep their results; so do the gradients of keys that only such queries see."""
    for seed in range(first, first + PER_TEST):
        problem = Problem.of(2000 + seed, 500)
        rng = random.Random(seed)
        begin = rng.randrange(problem.mask.kv_len)
        end = min(problem.mask.kv_len, begin + rng.choice([1, 3, 16, 64, 100]))
        k, v = (poisoned(x, slice(begin, end)) for x in (problem.k, problem.v))
        hit = problem.dense[:, begin:end].any(1)
        reached = problem.dense[hit].any(0)
        want, got = run(problem), run(problem, k=k, v=v)
        label = f"seed {seed}, {problem.mask.kind}, NaN in keys {begin} to {end}"
        same_where(got["out"], want["out"], ~hit, 1, f"{label}: out")
        same_where(got["lse"], want["lse"], ~hit, 2, f"{label}: lse")
        same_where(got["dq"], want["dq"], ~hit, 1, f"{label}: dq")
        for name in ("dk", "dv"):
            same_where(got[name], want[name], ~reached, 1, f"{label}: {name}")
        assert got["out"][:, hit].isnan().all(), f"{label}: a visible NaN must show"


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 3 * PER_TEST, PER_TEST))
def test_nan_in_some_queries(backend, first):
    """Other queries keep their results, and keys that those do not see keep their gradients."""
    for seed in range(first, first + PER_TEST):
        problem = Problem.of(3000 + seed, 500)
        rng = random.Random(seed)
        rows = [row for row, keys in problem.mask.spans.rows() if row[0] < row[1]]
        if not rows:
            continue
        begin, end = rng.choice(rows)
        q, grad = (poisoned(x, slice(begin, end)) for x in (problem.q, problem.grad))
        others = torch.ones(problem.mask.q_len, dtype=torch.bool, device="cuda")
        others[begin:end] = False
        reached = problem.dense[begin:end].any(0)
        want, got = run(problem), run(problem, q=q, grad=grad)
        label = f"seed {seed}, {problem.mask.kind}, NaN in queries {begin} to {end}"
        for name, dim in (("out", 1), ("lse", 2), ("dq", 1)):
            same_where(got[name], want[name], others, dim, f"{label}: {name}")
        for name in ("dk", "dv"):
            same_where(got[name], want[name], ~reached, 1, f"{label}: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_that_nobody_sees(backend, kind):
    """Infinity in unseen places: its product with a weight of zero would be NaN."""
    problem = Problem.of(KINDS.index(kind), 500)
    unseen = ~problem.dense.any(0)
    k, v = problem.k.clone(), problem.v.clone()
    k[:, unseen] = v[:, unseen] = float("inf")
    want, got = run(problem), run(problem, k=k, v=v)
    for name in ("out", "lse", *GRADS):
        assert_bitwise(got[name], want[name], name)
