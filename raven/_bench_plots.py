"""Pictures of a results file: every row's share of its roof, the roofline, and rates against sequence length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
# Differ for colour-blind readers and in grey print.
COLORS = {"cuda": "#1F5AA0", "triton": "#7FB2DC", "reference": "#B9BEC6"}
PEER_COLORS = {"cudnn": "#4B8B2B", "flex": "#C2571A", "fa3": "#8B5A2B", "fa4": "#6A3D9A", "magi": "#B8860B"}
PEER_COLORS |= {"fa4, keys gathered before": "#6A3D9A", "fa4-blocks": "#A98BC9"}
MARKERS = "osD^v<>P*X"
# Operations of the formulas per byte that must move, for rows that count bytes: float32 states, bfloat16 tokens.
INTENSITY = {
    ("kv_append", "forward"): 1.2,
    ("qk_norm_rope", "forward"): 1.8,
    ("qk_norm_rope", "backward"): 2.7,
    ("modulate", "forward"): 1.8,
    ("modulate", "backward"): 2.3,
    ("gated_residual", "forward"): 1.1,
    ("gated_residual", "backward"): 1.6,
    ("gaussian_log_prob", "forward"): 0.6,
    ("gaussian_log_prob", "backward"): 0.5,
    ("gaussian_log_prob", "forward+backward"): 0.5,
    ("policy_loss", "forward+backward"): 0.7,
    ("consistency_step", "forward"): 0.3,
    ("consistency_step", "backward"): 0.2,
}


def plot_results(results: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Draw ``<path>.png``, and beside it ``-roofline``, ``-lengths``, ``-phases`` and ``-growth`` where rows have them.

    ``path`` may have any suffix. Returns the files; none without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    path = Path(path)
    saved = []
    pictures = {"": _shares, "-roofline": _roofline, "-lengths": _lengths, "-phases": _phases, "-growth": _long}
    for ending, draw in pictures.items():
        figure = draw(results)
        if figure is not None:
            saved.append(path.with_name(f"{path.stem}{ending}.png"))
            figure.savefig(saved[-1], dpi=130)
    return saved


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # lets savefig work without any display
    return figure


def _title(results: Mapping[str, Any]) -> str:
    return f"{results.get('gpu') or 'CPU'}, {str(results.get('date', ''))[:10]}"


def _shares(results: Mapping[str, Any]) -> Figure:
    rows = [row for row in results["rows"] if not row.get("curve_only")]
    jobs = list(dict.fromkeys((row["op"], row["case"], row["direction"]) for row in rows))[::-1]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure = _figure(9.5, 1.4 + 0.15 * len(jobs) * (0.7 + len(backends)))
    axes = figure.add_subplot()
    height = 0.84 / len(backends)
    at = {job: i for i, job in enumerate(jobs)}
    highest = 100.0
    for number, backend in enumerate(backends):
        mine = [row for row in rows if row["backend"] == backend]
        places = [at[row["op"], row["case"], row["direction"]] + 0.42 - height * (number + 0.5) for row in mine]
        shares = [100 * row["rate"] / row["roof"] for row in mine]
        bars = axes.barh(places, shares, height=height, color=COLORS.get(backend, "gray"), label=f"raven, {backend}")
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=7)
        highest = max([highest, *(1.1 * share for share in shares)])
    for number, name in enumerate(sorted({name for row in rows for name in row["peers"]})):
        points = {
            (
                100 * row["rate"] / row["roof"] * row["ms"] / row["peers"][name],
                at[row["op"], row["case"], row["direction"]],
            )
            for row in rows
            if name in row["peers"]
        }
        marker = MARKERS[number % len(MARKERS)]
        color = PEER_COLORS.get(name)
        axes.scatter(
            *zip(*points, strict=True), marker=marker, s=26, zorder=3, edgecolors="black", color=color, label=name
        )
    axes.set_yticks(range(len(jobs)), ["  ".join(job) for job in jobs], fontsize=8)
    axes.set_ylim(-0.6, len(jobs) - 0.4)
    axes.set_xlim(0, highest)
    axes.axvline(100, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xlabel("% of the measured roof (copy bandwidth, or bf16 matrix product)")
    axes.set_title(_title(results), fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _roofline(results: Mapping[str, Any]) -> Figure | None:
    """Rates in TFLOP/s over operations per byte, under the roofs of this run."""
    ceilings = results.get("ceilings", {})
    copy, matmul = ceilings.get("copy_tb_per_s"), ceilings.get("matmul_tflop_per_s")
    points = [(row, place) for row in results["rows"] if (place := _place(row)) is not None]
    if not (copy and matmul and points):
        return None
    figure = _figure(7.5, 5)
    axes = figure.add_subplot()
    left, right = 0.1, 3 * max(matmul / copy, *(x for _, (x, _) in points))
    corner = matmul / copy
    axes.plot([left, corner, right], [left * copy, matmul, matmul], color="black", lw=1.2)
    axes.annotate(f"copy, {copy:.3g} TB/s", (corner / 8, corner / 8 * copy * 1.6), fontsize=8, ha="right")
    axes.annotate(f"bf16 matrix product, {matmul:.3g} TFLOP/s", (corner * 1.2, matmul * 1.15), fontsize=8)
    styles = {"forward": "o", "backward": "v", "backward-deterministic": "^", "forward+backward": "D"}
    shown = set()
    for row, place in points:
        label = f"{row['backend']}, {row['direction']}"
        axes.scatter(
            *place,
            marker=styles.get(row["direction"], "s"),
            color=COLORS.get(row["backend"], "gray"),
            edgecolors="black",
            linewidths=0.5,
            s=30,
            zorder=3,
            label=None if label in shown else label,
        )
        shown.add(label)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(left * copy * 0.5, matmul * 2))
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(_title(results), fontsize=10)
    axes.grid(alpha=0.25, which="both", lw=0.4)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def _place(row: Row) -> tuple[float, float] | None:
    if row["unit"] == "TFLOP/s":
        return (row["intensity"], row["rate"]) if "intensity" in row else None
    intensity = INTENSITY.get((row["op"], row["direction"]))
    return None if intensity is None else (intensity, row["rate"] * intensity)


def _lengths(results: Mapping[str, Any]) -> Figure | None:
    """TFLOP/s against tokens: a panel for each mask and direction, a line for each backend and peer."""
    rows = [row for row in results["rows"] if row.get("curve")]
    panels = [(curve, way) for curve in ("dense", "repacked") for way in ("forward", "backward")]
    if len({(row["curve"], row["tokens"]) for row in rows}) < 3:
        return None
    figure = _figure(10, 6.4)
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (curve, way) in zip(grid.flat, panels, strict=True):
        mine = [row for row in rows if (row["curve"], row["direction"]) == (curve, way)]
        for name in dict.fromkeys(row["backend"] for row in mine):
            _line(
                axes,
                [(r["tokens"], r["rate"]) for r in mine if r["backend"] == name],
                f"raven, {name}",
                COLORS.get(name),
            )
        for name in sorted({name for row in mine for name in row["peers"]}):
            points = {(r["tokens"], r["rate"] * r["ms"] / r["peers"][name]) for r in mine if name in r["peers"]}
            unique = {tokens: rate for tokens, rate in points}
            _line(axes, list(unique.items()), name, PEER_COLORS.get(name, "gray"), "--")
        if curve == "repacked" and (rates := {r["cudnn_dense_rate"] for r in mine if r.get("cudnn_dense_rate")}):
            axes.axhline(max(rates), color=PEER_COLORS["cudnn"], lw=0.9, ls=":", label="cudnn, dense 32,760")
        axes.set_title(f"{curve}, {way}", fontsize=10)
        axes.grid(alpha=0.3, lw=0.5)
        if mine:
            axes.legend(fontsize=7, loc="lower right")
    for axes in grid[1]:
        axes.set_xlabel("tokens")
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s")
        axes.set_ylim(0, None)
    figure.suptitle(f"chunk_attention, bf16, 12 heads of 128: {_title(results)}", fontsize=11)
    return figure


def _phases(results: Mapping[str, Any]) -> Figure | None:
    """Where the time of whole steps goes: a bar for each row, a colour for each phase."""
    rows = [row for row in results["rows"] if row.get("phases_ms")][::-1]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows[::-1] for name in row["phases_ms"]))
    figure = _figure(9.5, 1.6 + 0.45 * len(rows) + 0.05 * len(names))
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for number, name in enumerate(names):
        seconds = [row["phases_ms"].get(name, 0.0) / 1e3 for row in rows]
        hatch = "//" if number > 9 else None
        bars = axes.barh(range(len(rows)), seconds, left=left, color=f"C{number % 10}", hatch=hatch, label=name)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.bar_label(bars, labels=[f"{whole:.2f} s" for whole in left], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['case']}\n{row['backend']}" for row in rows], fontsize=8)
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel("seconds")
    axes.set_title(f"where the time goes: {_title(results)}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _long(results: Mapping[str, Any]) -> Figure | None:
    """Time of a chunk and memory along videos without an end, from rows with ``blocks``."""
    rows = [row for row in results["rows"] if row.get("blocks") and row["frames"] >= 1000]
    if not rows:
        return None
    panels = {
        "ms": ("ms a chunk", 1.0),
        "allocated": ("GPU memory, MiB", 2.0**20),
        "resident": ("process, MiB", 2.0**20),
    }
    figure = _figure(11, 3.8)
    for axes, (key, (label, unit)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, row in enumerate(rows):
            points = [(block["frames"], block[key] / unit) for block in row["blocks"]]
            name = f"{row['case'].rsplit('-', 1)[0]}, {row['backend']}"
            axes.plot(*zip(*points, strict=True), lw=1.3, color=f"C{number}", label=name)
        axes.set_ylim(0, 1.15 * max(block[key] for row in rows for block in row["blocks"]) / unit)
        axes.set(xlabel="latent frames", ylabel=label)
        axes.grid(alpha=0.3, lw=0.5)
    figure.suptitle(f"{rows[0]['frames']:,} latent frames: {_title(results)}", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _line(axes: Any, points: Sequence[tuple[float, float]], label: str, color: str | None, style: str = "-") -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=1.4, ls=style, color=color, label=label)
