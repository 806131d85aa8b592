"""The same bits a thousand times over, while memory and streams are busy with other things."""

from contextlib import nullcontext

import pytest
import torch
from attention_cases import deterministic
from jobs import JOBS, Pressure, make
from problems import Problem

from raven.layout import ChunkLayout
from raven.testing import RandomMask, assert_bitwise, relative_rms

# Attention has the queues and the turns; the others go over their rows once, in an order that is written down.
REPEATS = {"attention": 1000, "decode": 1000}
OTHERS = 250


def job(name, backend, seed=0):
    made = make(name, backend, seed)
    if isinstance(made, str):
        pytest.skip(made)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("name", JOBS)
def test_many_repeats(backend, name):
    _, run = job(name, backend)
    pressure = Pressure()
    with deterministic():
        first = run()
        wrong = torch.zeros(len(first), dtype=torch.int64, device="cuda")
        for _ in range(REPEATS.get(name, OTHERS)):
            pressure.shift()
            # Compared as numbers: no result may be NaN here, and no sign of zero is promised.
            wrong += torch.stack([(a != b).any() for a, b in zip(run(), first, strict=True)])
    assert wrong.tolist() == [0] * len(first), "how often each result differed from the first"


@pytest.mark.gpu
@pytest.mark.parametrize("name", JOBS)
def test_streams_side_by_side(backend, name):
    """Four streams with inputs of their own: nothing on the way may be shared between calls."""
    runs = [job(name, backend, seed)[1] for seed in range(4)]
    with deterministic():
        want = [run() for run in runs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in runs]
        for _ in range(15):
            got = []
            for stream, run in zip(streams, runs, strict=True):
                with torch.cuda.stream(stream):
                    got.append(run())
            torch.cuda.synchronize()
            for results, expected in zip(got, want, strict=True):
                for a, b in zip(results, expected, strict=True):
                    assert_bitwise(a, b, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", JOBS)
def test_work_runs_on_the_current_stream(backend, name):
    """Inputs that a side stream writes late, after a sleep: work on any other stream would read the old ones."""
    inputs, run = job(name, backend)
    with deterministic():
        want = run()
        stored = [x.clone() for x in inputs]
        for x in inputs:
            x.fill_(float("nan"))
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for x, value in zip(inputs, stored, strict=True):
                x.copy_(value)
            got = run()
        side.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b, name)


def wide(batch=1):
    """Clean keys that many query tiles read, and so many blocks that their order changes from run to run."""
    layout = ChunkLayout.concat([ChunkLayout.repacked((2, 2, 2, 2), 150), ChunkLayout.repacked((1,) * 9, 67, sink=1)])
    return Problem(RandomMask("wide", layout, layout.length, layout.length), torch.bfloat16, 128, 8, 8, batch=batch)


@pytest.mark.gpu
def test_deterministic_backward_repeats(backend):
    problem = wide(batch=2)
    pressure = Pressure(1)
    with deterministic():
        first = problem.run()
        for _ in range(60):
            pressure.shift()
            for name, result in problem.run().items():
                assert_bitwise(result, first[name], name)
    problem.check(dict(first))


@pytest.mark.gpu
def test_fast_backward_stays_as_accurate(backend):
    """Its sums may come in any order; run after run they are within the rule, and the forward keeps its bits."""
    problem = wide()
    want = problem.exact()
    with deterministic():
        steady = problem.run()
    for _ in range(20):
        got = problem.run()
        assert_bitwise(got["out"], steady["out"], "out")
        assert_bitwise(got["lse"], steady["lse"], "lse")
        for name in ("dq", "dk", "dv"):
            assert relative_rms(got[name], want[name]) <= 2 * relative_rms(steady[name], want[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [True, False], ids=["deterministic", "fast"])
def test_alone_and_in_a_batch(backend, ordered):
    """An entry of a batch gives the bits that it gives alone; the backward too where it is deterministic."""
    problem = wide(batch=3)
    with deterministic() if ordered else nullcontext():
        together = problem.run()
        alone = problem.run(**{name: getattr(problem, name)[1:2].contiguous() for name in ("q", "k", "v", "grad")})
    for name, result in alone.items():
        if ordered or name in ("out", "lse"):
            assert_bitwise(result, together[name][1:2], name)
