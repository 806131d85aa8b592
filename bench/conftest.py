"""Fixtures of the benches: ``bench.row(...)`` measures one row; the rows of a session go into one JSON file."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from harness import DEVICE, Recorder, first_line

import raven
from raven.backends import get_backend

COMPILED = ("cuda", "triton")
recorder_key = pytest.StashKey[Recorder]()
saved_key = pytest.StashKey[Path]()


def pytest_addoption(parser):
    parser.addoption(
        "--raven-json",
        metavar="FILE",
        help="where the rows go (default: a new file in bench/results on a GPU, nowhere without one)",
    )
    parser.addoption(
        "--raven-peers", action="store_true", help="measure other public kernels too, where they are importable"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped without one)")
    config.stash[recorder_key] = Recorder()


def pytest_collect_file(file_path, parent):
    """``pytest bench/`` finds bench_*.py; one named on the command line pytest takes by itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(trylast=True)  # so that backends alternate on inputs that stay
def pytest_generate_tests(metafunc):
    """Every row once per compiled backend, or with the one asked for by name."""
    if "bench" in metafunc.fixturenames:
        forced = get_backend()
        backends = (forced,) if forced else COMPILED if DEVICE == "cuda" else (None,)
        metafunc.parametrize("bench", backends, indirect=True, ids=lambda name: name or "automatic")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "smoke" in item.name and torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="is there for machines without a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A backend that an op does not have here leaves rows out, and says why; it is no failure."""
    try:
        return (yield)
    except raven.BackendUnavailableError as error:
        recorder = pyfuncitem.config.stash[recorder_key]
        name = pyfuncitem.callspec.params.get("bench") if hasattr(pyfuncitem, "callspec") else None
        op = str(error).split(":", 1)[0]
        reasons = [
            line.split("not used: ", 1)[1] for line in str(error).splitlines() if line.strip().startswith(f"{name} ")
        ]
        recorder.leave_out(f"{name}, {op}", reasons[0] if reasons else first_line(error))
        pytest.skip(str(error))


@pytest.fixture
def freed():
    """Whatever a case held is gone before the next one: models of full size do not fit beside each other."""
    yield
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Bench:
    """The recorder, and pytest-benchmark's own statistics beside it."""

    def __init__(self, recorder: Recorder, benchmark, peers: bool, capture) -> None:
        self.recorder, self.benchmark, self.peers, self._capture = recorder, benchmark, peers, capture

    def progress(self, text: str) -> None:
        """A line on stderr while a long bench runs."""
        with self._capture.global_and_fixture_disabled():
            print(text, file=sys.stderr, flush=True)

    def row(self, **arguments):
        """One row; see ``harness.Recorder.row``."""
        if measure := arguments.get("measure"):  # takes seconds: pytest-benchmark looks on and repeats nothing
            once = dict(rounds=1, iterations=1)
            row = self.recorder.row(**arguments | {"measure": lambda: self.benchmark.pedantic(measure, **once)})
            self.benchmark.extra_info.update({k: v for k, v in row.items() if isinstance(v, (str, int, float))})
            return row
        row = self.recorder.row(**arguments)
        run = arguments["run"]
        first = run if callable(run) else run[0]

        def synchronized():
            first()
            if self.recorder.device == "cuda":
                torch.cuda.synchronize()

        # pytest-benchmark shows wall time, launch and synchronisation included; the row is what counts.
        self.benchmark.extra_info.update({k: v for k, v in row.items() if isinstance(v, (str, int, float))})
        self.benchmark.pedantic(synchronized, rounds=3, iterations=1)
        return row


@pytest.fixture
def bench(request, benchmark):
    torch.manual_seed(0)
    previous = get_backend()
    raven.set_backend(request.param)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    yield Bench(request.config.stash[recorder_key], benchmark, request.config.getoption("--raven-peers"), capture)
    raven.set_backend(previous)


def pytest_sessionfinish(session):
    recorder = session.config.stash[recorder_key]
    path = session.config.getoption("--raven-json")
    if (recorder.rows or recorder.left_out) and (path or recorder.device == "cuda"):
        session.config.stash[saved_key] = recorder.save(Path(path) if path else None)


def pytest_terminal_summary(terminalreporter, config):
    recorder = config.stash[recorder_key]
    if recorder.rows:
        terminalreporter.section("rows")
        terminalreporter.write_line(recorder.table())
    path = config.stash.get(saved_key, None)
    if path is not None:
        terminalreporter.write_line(f"written to {path}")
