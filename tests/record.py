"""``pytest --record FILE``: what ran, where, and how it ended, as JSON. For runs on GPUs, which CI cannot repeat."""

from collections import Counter
from pathlib import Path

import torch

from raven.bench import write_results
from raven.testing import describe_machine

ENDS = ("passed", "failed", "error", "skipped")


def summary(stats):
    """Counts of all tests and of each file, names of those that failed, and why others were left out.

    ``stats``: reports by their end, as pytest's terminal reporter has them.
    """
    files, failed, left_out = {}, [], Counter()
    for end in ENDS:
        for report in stats.get(end, ()):
            files.setdefault(report.nodeid.split("::")[0], Counter())[end] += 1
            if end in ("failed", "error"):
                failed.append(report.nodeid)
            elif end == "skipped":
                left_out[report.longrepr[2].removeprefix("Skipped: ")] += 1
    total = sum(files.values(), Counter())
    return {
        **{end: total[end] for end in ENDS},
        "failures": sorted(failed),
        "left_out": dict(sorted(left_out.items())),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write the outcome, the GPU and the versions to FILE, as JSON")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--record", None)  # unknown where this folder was not named on the command line
    if path:
        machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        write_results({**machine, **summary(terminalreporter.stats)}, Path(path))
        terminalreporter.write_line(f"{path} written")
