"""What the kernels and the model are held to on one H200, and how far the rows of a run are from it.

Every ratio is taken within one run: to a peer that was measured beside the row, to the measured roof, to the same
backend's own rate for another job. Whole steps and streams have absolute limits: seconds, memory, frames per second.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MAIN = "repacked-60840"
DETERMINISTIC = "backward-deterministic"
OTHER_MASKS = (
    f"{MAIN}-clean-first",
    f"{MAIN}-sink-1-window-2",
    f"{MAIN}-batch-2",
    "repacked-63960-frame-wise",
    "teacher-forcing-65520",
    "ragged-pack-65520",
)


@dataclass(frozen=True)
class Target:
    """A line of the table: ``must`` has to hold, ``goal`` is hoped for (``None``: there is none).

    against: what the ratio is to: "dense cuDNN" at 32,760 tokens, "roof", "main" (the repacked rate in the same
    direction), "fast" (the usual backward), or the name of a peer in the row.
    """

    op: str
    case: str
    direction: str
    against: str
    must: float
    goal: float | None = None

    @property
    def job(self) -> str:
        return f"{self.op} {self.case} {self.direction}"

    def ratio(self, row: Row, rows: Sequence[Row]) -> float | None:
        """``row``'s rate divided by what it is held against; ``None`` when that was not measured."""
        if self.against == "roof":
            return row["rate"] / row["roof"]
        if self.against == "dense cuDNN":
            rate = row.get("cudnn_dense_rate")
            return row["rate"] / rate if rate else None
        if self.against in ("main", "fast"):
            other = find(rows, self.op, MAIN, "backward" if self.against == "fast" else self.direction, row["backend"])
            return row["rate"] / other["rate"] if other else None
        peer = row["peers"].get(self.against)
        return peer / row["ms"] if peer else None


def _attention() -> list[Target]:
    op = "chunk_attention"
    return [
        Target(op, MAIN, "forward", "dense cuDNN", 1.05, 1.18),
        Target(op, MAIN, "backward", "dense cuDNN", 1.00, 1.17),
        Target(op, MAIN, DETERMINISTIC, "fast", 0.85, 0.92),
        Target(op, "decode-4680x32760", "forward", "cudnn", 1.10, 1.30),
        Target(op, "decode-4680x4680", "forward", "cudnn", 1.00, 1.30),
        Target(op, "decode-4680x98280", "forward", "cudnn", 1.10, 1.25),
        Target(op, "dense-32760", "forward", "cudnn", 1.00, 1.15),
        Target(op, "dense-32760", "backward", "cudnn", 1.00, 1.15),
        *(Target(op, case, direction, "main", 0.9) for case in OTHER_MASKS for direction in ("forward", "backward")),
    ]


TARGETS = (
    *_attention(),
    Target("kv_append", "tokens-60840", "forward", "roof", 0.90, 0.95),
    Target("kv_append", "tokens-4680", "forward", "roof", 0.80, 0.90),
    Target("qk_norm_rope", "tokens-60840", "forward", "roof", 0.90, 0.95),
    Target("qk_norm_rope", "tokens-4680", "forward", "roof", 0.80, 0.90),
    Target("qk_norm_rope", "tokens-60840", "backward", "roof", 0.85, 0.92),
    *(
        Target(op, f"tokens-{tokens}", direction, "roof", must)
        for op in ("gated_residual", "modulate")
        for tokens, direction, must in ((60840, "forward", 0.85), (4680, "forward", 0.85), (60840, "backward", 0.75))
    ),
    Target("policy_loss", "samples-64", "forward+backward", "roof", 0.90, 0.95),
    Target("gaussian_log_prob", "samples-4", "forward+backward", "eager", 6.0, 10.0),
)


@dataclass(frozen=True)
class Limit:
    """An absolute figure of a row, its entry ``key``: at most ``must``, or with ``at_least`` not less.

    backend: which rows it holds for; ``None``: all.
    """

    op: str
    case: str
    direction: str
    key: str
    unit: str
    must: float
    goal: float | None = None
    backend: str | None = None
    at_least: bool = False

    @property
    def job(self) -> str:
        return f"{self.op} {self.case} {self.direction}"

    def within(self, figure: float, limit: float) -> bool:
        """Whether a measured figure keeps ``limit``."""
        return figure >= limit if self.at_least else figure <= limit


def _step() -> list[Limit]:
    job = ("step", f"{MAIN}-selective", "forward+backward")
    full = ("step", f"{MAIN}-full", "forward+backward")
    return [
        Limit(*job, "seconds", "s", 2.5, 2.2, backend="cuda"),
        Limit(*job, "seconds", "s", 3.1, 2.2, backend="triton"),
        Limit(*job, "peak_gib", "GiB", 22.0),
        Limit(*full, "peak_gib", "GiB", 17.0),
    ]


def _stream() -> list[Limit]:
    whole, ring, two = (("stream", case, "forward") for case in ("full-history", "sink-1-window-2", "two-prompts"))
    rate = ("frames_per_s", "frames/s")
    return [
        Limit(*whole, *rate, 38.0, 48.0, at_least=True),
        Limit(*ring, *rate, 42.0, 55.0, at_least=True),
        Limit("stream", "full-history-fp8", "forward", *rate, 43.0, 55.0, at_least=True),
        Limit(*whole, "first_chunk_ms", "ms", 160.0, 125.0),
        Limit(*whole, "idle_percent", "%", 2.0),
        Limit(*two, "of_one_prompt", "x one prompt", 1.0, 1.1, at_least=True),
    ]


def _long() -> list[Limit]:
    """Late in a video against early in it."""
    rules = ("longlive", "longlive_inf", "reward_forcing")
    jobs = [("long", f"{rule}-10000", "forward") for rule in rules]
    growth = (("time_growth", "x", 1.10), ("memory_growth", "x", 1.01))
    return [Limit(*job, *limit) for job in jobs for limit in growth]


LIMITS = (*_step(), *_stream(), *_long())


def find(rows: Sequence[Row], op: str, case: str, direction: str, backend: str) -> Row | None:
    """The row of that name, the last one where several are."""
    name = (op, case, direction, backend)
    return next((r for r in reversed(rows) if (r["op"], r["case"], r["direction"], r["backend"]) == name), None)


def format_targets(results: Mapping[str, Any]) -> str:
    """The table of targets as text, one line for each that a backend has a row for; the others are named below it."""
    rows = results["rows"]
    backends = [b for b in ("cuda", "triton") if any(row["backend"] == b for row in rows)]
    lines = [["job", "backend", "measured", "against", "ratio", "must", "goal", ""]]
    missing = []
    for target in TARGETS:
        found = [(b, row) for b in backends if (row := find(rows, target.op, target.case, target.direction, b))]
        ratios = [(b, row, target.ratio(row, rows)) for b, row in found]
        if not any(ratio is not None for *_, ratio in ratios):
            missing.append(target.job)
        for backend, row, ratio in ratios:
            if ratio is not None:
                goal = "-" if target.goal is None else f"{target.goal:.2f}"
                measured = f"{row['rate']:.4g} {row['unit']}"
                numbers = [f"{ratio:.3f}", f"{target.must:.2f}", goal, verdict(target, ratio)]
                lines.append([target.job, backend, measured, target.against, *numbers])
    for limit in LIMITS:
        names = [b for b in backends if limit.backend in (None, b)]
        found = [(b, row) for b in names if (row := find(rows, limit.op, limit.case, limit.direction, b))]
        figures = [(b, row[limit.key]) for b, row in found if limit.key in row]
        if not figures:
            missing.append(f"{limit.job} ({limit.unit}{', ' + limit.backend if limit.backend else ''})")
        for backend, figure in figures:
            bound = "at least" if limit.at_least else "at most"
            goal = "-" if limit.goal is None else f"{limit.goal:g}"
            numbers = [f"{figure / limit.must:.3f}", f"{limit.must:g}", goal, verdict_of(limit, figure)]
            lines.append([limit.job, backend, f"{figure:.4g} {limit.unit}", bound, *numbers])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths).rstrip())
    if missing:
        text += ["", *textwrap.wrap(f"without a figure in this run: {', '.join(missing)}", 120)]
    return "\n".join(text) if len(lines) > 1 else ""


def verdict(target: Target, ratio: float) -> str:
    if ratio < target.must:
        return "missed"
    return "goal" if target.goal is not None and ratio >= target.goal else "holds"


def verdict_of(limit: Limit, figure: float) -> str:
    if not limit.within(figure, limit.must):
        return "missed"
    return "goal" if limit.goal is not None and limit.within(figure, limit.goal) else "holds"
