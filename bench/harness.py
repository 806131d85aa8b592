"""What the benches share: a row is measured only after its correctness check passed in the same process.

A bench file holds pytest functions that take the ``bench`` fixture of `conftest.py`, one row each:

    @pytest.mark.gpu
    def test_add(bench):
        a, b = (torch.randn(1 << 28, device="cuda") for _ in range(2))
        bench.row(
            op="add", case="large", direction="forward", backend="torch",
            check=lambda: assert_bitwise(a + b, b + a),
            run=lambda: a + b, work=3 * a.nbytes, unit="TB/s",
            peers={"compiled": lambda: compiled(a, b)},
        )

On a GPU the fixture runs each function once per compiled backend, that backend chosen for every op meanwhile. Peers are
measured once, at the first of those rows, and count for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from raven.bench import format_table, write_results
from raven.testing import copy_rate, describe_machine, matmul_rate, time_ms

Run = Callable[[], object]
Runs = Run | Sequence[Run]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = ("TB/s", "TFLOP/s")
DIRECTIONS = ("forward", "backward", "backward-deterministic", "forward+backward", "update")
RESULTS = Path(__file__).parent / "results"
# Enough copies of a small job's memory that one round of them does not fit into any GPU's L2 cache.
CACHE_BYTES = 256 * 2**20
# A GPU settles at the clock that its power allows within this; shorter runs flatter whoever comes first.
WARMUP_MS = 100.0
# What a missing, broken or unsuitable package may raise. Everything else is our own mistake.
FAILURES = (ImportError, AttributeError, AssertionError, OSError, RuntimeError, TypeError, ValueError)


def failures() -> tuple[type[Exception], ...]:
    """``FAILURES`` and, where CuTe's compiler is loaded, what it raises: its own kind of exception."""
    compiler = sys.modules.get("cutlass.base_dsl.common")
    return FAILURES if compiler is None else (*FAILURES, compiler.DSLBaseError)


def rounds_beyond_cache(bytes_per_call: int) -> int:
    """How many separate sets of inputs must take turns for each call to find its own out of the cache."""
    return max(1, min(64, -(-CACHE_BYTES // max(bytes_per_call, 1))))


class Recorder:
    """Rows of one run, and the ceilings they are held against, each measured once and only when a row needs it."""

    def __init__(self, device: str = DEVICE) -> None:
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self._peers: dict[tuple[str, str, str], dict[str, tuple[float, float | None]]] = {}

    @cached_property
    def copy_tb_per_s(self) -> float:
        return copy_rate(self.device)

    @cached_property
    def matmul_tflop_per_s(self) -> float:
        return matmul_rate(self.device)

    def roof(self, unit: str) -> float:
        """The measured ceiling in ``unit``: device copy (bytes read and written), or a bfloat16 8192-cubed product."""
        if unit not in UNITS:
            raise ValueError(f"unit: got {unit!r}, expected one of {', '.join(UNITS)}")
        return self.copy_tb_per_s if unit == "TB/s" else self.matmul_tflop_per_s

    def leave_out(self, who: str, reason: str) -> None:
        """Note that ``who`` has no figure and why; the first reason stays."""
        self.left_out.setdefault(who, reason)

    def uses(self, *packages: str) -> None:
        """Note the versions of packages that a peer comes from; one that was not installed as a package has none."""
        for package in packages:
            with suppress(metadata.PackageNotFoundError):
                self.versions[package] = metadata.version(package)

    def row(
        self,
        *,
        op: str,
        case: str,
        direction: str,
        backend: str,
        check: Callable[[], Mapping[str, float] | float | None],
        work: float,
        unit: str,
        run: Runs | None = None,
        measure: Callable[[], float] | None = None,
        peers: Mapping[str, Runs] | Callable[[], Mapping[str, Runs]] | None = None,
        peer_check: Callable[[str], float] | None = None,
        graph: bool = False,
        extra: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Check, then measure ``run`` and the peers, and keep the row; a failed check raises and leaves no row.

        Args:
            op, case, direction, backend: the row's name; directions are those of ``DIRECTIONS``.
            check: asserts that ``run``'s results are right; may return measured errors, which the row keeps.
            run: one call, or several on separate memory that take turns (see ``rounds_beyond_cache``).
            measure: for jobs of seconds, instead of ``run``: takes the measurement and returns its milliseconds.
            work: useful floating point operations, or bytes that must be moved, of one call.
            unit: "TFLOP/s" or "TB/s".
            peers: the same job by others, timed in the same way right after; or a function that makes them, called
                only when they were not measured for another backend before.
            peer_check: asserts that a peer's result is right and returns its error. One that is not right, or does not
                run, is left out with its reason.
            graph: time replays of a CUDA graph: device time without the host's.
            extra: further entries of the row, or a function that gives them after the measurement.
        """
        if (run is None) == (measure is None):
            raise ValueError(f"run, measure: got {'both' if run else 'neither'}, expected one of them")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: got {direction!r}, expected one of {', '.join(DIRECTIONS)}")
        roof = self.roof(unit)
        errors = check()
        ms = measure() if measure else self._time(run, graph)
        rate = work / ms / 1e9
        others = self._measured_peers((op, case, direction), peers, peer_check, graph)
        if found := {name: error for name, (_, error) in others.items() if error is not None}:
            errors = {**(errors if isinstance(errors, Mapping) else {"result": errors}), **found}
        row = {
            "op": op,
            "case": case,
            "direction": direction,
            "backend": backend,
            "ms": ms,
            "rate": rate,
            "unit": unit,
            "roof": roof,
            "percent": 100 * rate / roof,
            "peers": {name: ms for name, (ms, _) in others.items()},
            "timer": ("graph" if graph else "events") if self.device == "cuda" else "wall",
            "errors": errors if errors is None or isinstance(errors, float) else dict(errors),
            **((extra() if callable(extra) else extra) or {}),
        }
        self.rows.append(row)
        return row

    def _measured_peers(self, key, peers, check, graph) -> dict[str, tuple[float, float | None]]:
        if key not in self._peers:
            self._peers[key] = {}
            for name, peer in ((peers() if callable(peers) else peers) or {}).items():
                try:
                    error = check(name) if check else None
                    self._peers[key][name] = self._time(peer, graph), error
                except failures() as failure:
                    if check is None:
                        raise
                    self.leave_out(f"{name}, {' '.join(key)}", first_line(failure))
        return self._peers[key]

    def time(self, run: Runs, graph: bool = False) -> float:
        """Milliseconds of one call, timed as every row is."""
        return self._time(run, graph)

    def _time(self, run: Runs, graph: bool) -> float:
        if self.device == "cuda":
            return time_ms(run, self.device, graph=graph, warmup_ms=WARMUP_MS)
        return time_ms(run, self.device, repeats=3, at_least_ms=0.0, warmup_ms=0.0)

    def results(self) -> dict[str, Any]:
        """Everything about this run, ready for JSON."""
        ceilings = {k: getattr(self, k) for k in ("copy_tb_per_s", "matmul_tflop_per_s") if k in self.__dict__}
        machine = describe_machine(self.device)
        return {
            **machine,
            "versions": machine["versions"] | self.versions,
            "ceilings": ceilings,
            "left_out": dict(self.left_out),
            "rows": self.rows,
        }

    def save(self, path: Path | None = None) -> Path:
        """Write the run to ``path``, or to a new file named after GPU and time in ``bench/results``."""
        results = self.results()
        if path is None:
            gpu = "-".join((results["gpu"] or "cpu").lower().split())
            path = RESULTS / f"{gpu}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"
        write_results(results, path)
        return path

    def table(self) -> str:
        return format_table(self.results())


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, as a reason."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
