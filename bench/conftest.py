"""Fixtures of the benches: ``bench.row(...)`` measures one row; the rows of a session go into one JSON file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Recorder

recorder_key = pytest.StashKey[Recorder]()
saved_key = pytest.StashKey[Path]()


def pytest_addoption(parser):
    parser.addoption(
        "--raven-json",
        metavar="FILE",
        help="where the rows go (default: a new file in bench/results on a GPU, nowhere without one)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped without one)")
    config.stash[recorder_key] = Recorder()


def pytest_collect_file(file_path, parent):
    """``pytest bench/`` finds bench_*.py; one named on the command line pytest takes by itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


class Bench:
    """The recorder, and pytest-benchmark's own statistics beside it."""

    def __init__(self, recorder: Recorder, benchmark) -> None:
        self.recorder, self.benchmark = recorder, benchmark

    def row(self, **arguments):
        """One row; see ``harness.Recorder.row``."""
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
    return Bench(request.config.stash[recorder_key], benchmark)


def pytest_sessionfinish(session):
    recorder = session.config.stash[recorder_key]
    path = session.config.getoption("--raven-json")
    if recorder.rows and (path or recorder.device == "cuda"):
        session.config.stash[saved_key] = recorder.save(Path(path) if path else None)


def pytest_terminal_summary(terminalreporter, config):
    recorder = config.stash[recorder_key]
    if recorder.rows:
        terminalreporter.section("rows")
        terminalreporter.write_line(recorder.table())
    path = config.stash.get(saved_key, None)
    if path is not None:
        terminalreporter.write_line(f"written to {path}")
