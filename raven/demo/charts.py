"""Line charts as inline SVG: coloured by CSS classes, so that one picture reads on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 40


@dataclass(frozen=True)
class Line:
    """One line: ``css`` is the class that colours it, ``low``/``high`` an optional band around it."""

    label: str
    css: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default_factory=tuple)
    high: Sequence[float] = field(default_factory=tuple)
    faint: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside ``[low, high]``, about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each point; the first points average what there is."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> str:
    """An SVG of ``lines``; ``mark`` draws a dashed vertical line with a label. Non-finite points break a line."""
    xs = _finite([x for line in lines for x in line.x])
    ys = _finite([y for line in lines for part in (line.y, line.low, line.high) for y in part])
    if not xs or not ys:
        return f'<p class="quiet">{escape(title)}: no values were recorded.</p>'
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = y_range or (min(ys), max(ys))
    if y_range is None:
        margin = 0.06 * (y_high - y_low) or max(abs(y_high), 1.0) * 0.1
        y_low, y_high = y_low - margin, y_high + margin

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        inside = min(max(y, y_low), y_high)
        return TOP + (y_high - inside) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x_low, x_high, 6):
        parts.append(
            f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{x:.6g}</text>'
        )
    if mark is not None:
        at, text = mark
        parts.append(f'<line class="mark" x1="{px(at):.1f}" x2="{px(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{px(at) + 5:.1f}" y="{HEIGHT - BOTTOM - 6}">{escape(text)}</text>')
    for line in lines:
        if len(line.low):
            edge = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(line.x, line.high, strict=True)]
            edge += [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(reversed(line.x), reversed(line.low), strict=True)]
            parts.append(f'<polygon class="band {line.css}" points="{" ".join(edge)}"/>')
    for line in lines:
        for points in _runs(line):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="line {line.css}{" faint" if line.faint else ""}" points="{path}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    half = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="12" y="{half:.0f}" text-anchor="middle" transform="rotate(-90 12 {half:.0f})">'
        f"{escape(y_label)}</text></svg>"
    )
    named = [line for line in lines if line.label and not line.faint]
    keys = "".join(f'<span class="key {line.css}">{escape(line.label)}</span>' for line in named)
    return f'<figure><figcaption>{escape(title)}</figcaption>{"".join(parts)}<p class="keys">{keys}</p></figure>'


def _runs(line: Line) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
