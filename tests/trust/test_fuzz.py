"""Hundreds of seeded masks against float64, held to the design's rule, forward and backward."""

from contextlib import nullcontext

import pytest
import torch
from attention_cases import deterministic
from problems import Problem

import raven
from raven.layout import ChunkLayout, Document, Segment
from raven.ops import chunk_attention
from raven.testing import KINDS, RandomMask, random_mask

PER_TEST = 22
SEEDS = 264


def masks_of(seeds):
    return [random_mask(seed) for seed in seeds]


def test_the_fuzz_has_every_corner():
    masks = masks_of(range(6 * len(KINDS)))
    spans = [m.spans for m in masks]
    assert {m.kind for m in masks} == set(KINDS)
    assert max(len(m.layout.segments) for m in masks if m.kind == "many_segments") > 1024
    assert any((s.q_ranges[:, 0] == s.q_ranges[:, 1]).any() for s in spans), "empty query ranges"
    assert any((s.kv_ranges[:, 0] == s.kv_ranges[:, 1]).any() for s in spans), "empty key ranges"
    assert any((s.kv_indptr.diff() == 0).any() for s in spans), "queries without keys"
    assert any((s.q_ranges.diff() == 1).all() and len(s.q_ranges) > 1 for s in spans), "one-token segments alone"
    assert any(m.kind == "blockwise" and m.layout.documents[0].local_frames for m in masks), "ranges that cut chunks"
    lengths = torch.cat([s.kv_ranges.diff().flatten() for s in spans])
    assert all((lengths % tile != 0).any() for tile in (16, 64, 128))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_repeat_and_fit(kind):
    seed = KINDS.index(kind) + 3 * len(KINDS)
    a, b = random_mask(seed, 200), random_mask(seed, 200)
    assert a.kind == kind and a.spans == b.spans and (a.q_len, a.kv_len) == (b.q_len, b.kv_len)
    if kind != "many_segments":
        assert max(a.q_len, a.kv_len) <= 200
    mask = a.dense()
    assert mask.shape == (a.q_len, a.kv_len) and int(mask.sum()) == a.spans.pairs


@pytest.mark.parametrize("first", range(0, 4 * len(KINDS), len(KINDS)))
def test_reference(first):
    for seed in range(first, first + len(KINDS)):
        torch.manual_seed(seed)
        problem = Problem(random_mask(seed, 150), torch.float32, 32, 4, 2, device="cpu")
        got, want, noise = problem.run(), problem.exact(), problem.noise()
        for name, result in got.items():
            blind = torch.isinf(want[name])
            assert (result[blind] == want[name][blind]).all()
            error = float((result[~blind] - want[name][~blind]).norm())
            assert error <= 2e-5 * float(want[name][~blind].norm()) + noise[name], f"seed {seed}, {name}: {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_against_float64(backend, first):
    for seed in range(first, first + PER_TEST):
        problem = Problem.of(seed, batch=1 + (seed % 7 == 0))
        if seed % 4 == 0:
            problem.grad_lse = torch.randn(problem.q.shape[0], problem.q.shape[2], problem.mask.q_len, device="cuda")
        with deterministic() if seed % 3 == 0 else nullcontext():
            got = problem.run()
        try:
            problem.check(got)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {problem.mask.kind}, {problem.dtype}: {error}") from error


# Larger than a tile in every direction, and of lengths that no tile divides.
LAYOUTS = {
    "interleaved": lambda: ChunkLayout.repacked((3, 2, 3), 123),
    "clean_first": lambda: ChunkLayout.repacked((3, 2, 3), 123, order="clean_first"),
    "sink_window": lambda: ChunkLayout.repacked((1, 2, 2, 2, 2), 99, sink=1, window=1),
    "teacher_forcing": lambda: ChunkLayout.teacher_forcing((2, 3, 2), 131),
    "prefill": lambda: ChunkLayout.prefill((2, 3, 2), 151, sink=1, window=1),
    "blockwise": lambda: ChunkLayout.blockwise((2, 2, 2), 237),
    "cut_chunks": lambda: ChunkLayout.blockwise((3, 3, 3), 111, local_frames=4),
    "bidirectional": lambda: ChunkLayout.bidirectional(3, 443),
    "documents": lambda: ChunkLayout.concat([ChunkLayout.repacked((1, 1), 229), ChunkLayout.repacked((2, 1), 117)]),
    "whole_tiles": lambda: ChunkLayout.repacked((1, 1, 1), 384),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_every_layout(backend, name):
    """Against autograd of the reference in float64, with a gradient of the log-sum-exp."""
    layout = LAYOUTS[name]()
    mask = RandomMask(name, layout, layout.length, layout.length)
    problem = Problem(mask, torch.bfloat16, 128, 4, 2, batch=2)
    problem.grad_lse = torch.randn(2, 4, layout.length, device="cuda")
    got = problem.run()
    problem.check(got)
    leaves = [x.double().requires_grad_() for x in problem.inputs]
    raven.set_backend("reference")
    outputs = chunk_attention(*leaves, layout, return_lse=True)
    want = torch.autograd.grad(outputs, leaves, (problem.grad.double(), problem.grad_lse.double()))
    for grad, result in zip(want, (got["dq"], got["dk"], got["dv"]), strict=True):
        assert float((result - grad).norm()) <= 1e-2 * float(grad.norm())


def test_documents_inside_each_other():
    """Segments of two videos that take turns: nobody builds it so, but nothing forbids it."""
    segments = tuple(
        Segment(start=4 * i, length=4, role="clean", chunk=i // 2, frame=i // 2, frames=1, document=i % 2)
        for i in range(6)
    )
    layout = ChunkLayout(segments, tuple(Document(4 * d, 12, 4, (1, 1, 1)) for d in range(2)))
    assert torch.equal(layout.spans.dense_mask(24, 24), layout.dense_mask())
    assert layout.spans.rows()[4] == ((16, 20), ((0, 4), (8, 12), (16, 20)))


@pytest.mark.parametrize("order", ["interleaved", "clean_first"])
def test_thousands_of_segments(order):
    """z_i and x_i of one token each see i earlier chunks and themselves: n^2 pairs in all."""
    layout = ChunkLayout.repacked((1,) * 1500, 1, order=order)
    assert len(layout.segments) == 2999 and layout.spans.pairs == 1500**2
    assert len(layout.spans.q_ranges) == 2999
    if order == "clean_first":
        assert len(layout.spans.kv_ranges) <= 2 * 2999, "touching keys are one range"
