"""The picture of a layout's mask."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raven.layout import ChunkLayout

# Orange and blue differ for colour-blind readers and in grey print.
COLORS = {"noisy": "#E08214", "clean": "#2B6CB0"}
_MAX_LABELS = 40


def plot_layout(layout: ChunkLayout, path: str | PathLike[str], title: str | None = None) -> None:
    """Draw queries as rows and keys as columns; a visible key range is filled in the colour of the key's role.

    The format follows the file's suffix. Raises ``ImportError`` without matplotlib, ``ValueError`` for no tokens.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'raven-kernels[demo]'") from error
    if not layout.length:
        raise ValueError("layout: got no tokens, expected at least one segment to draw")

    segments = layout.segments
    length = layout.length
    size = min(max(4.5, 0.42 * len(segments)), 12)
    figure = Figure(figsize=(size, size * 0.97), layout="constrained")
    FigureCanvasAgg(figure)  # lets savefig work without any display
    axes = figure.add_subplot()

    for (q_begin, q_end), keys in layout.spans.rows():
        for begin, end in keys:
            for segment in segments:
                left, right = max(begin, segment.start), min(end, segment.end)
                if left < right:
                    corner = (left, q_begin)
                    axes.add_patch(Rectangle(corner, right - left, q_end - q_begin, color=COLORS[segment.role], lw=0))
    for segment in segments:
        for line in (axes.axhline, axes.axvline):
            line(segment.start, color="#C8CCD2", lw=0.6)
    for document in layout.documents[1:]:
        for line in (axes.axhline, axes.axvline):
            line(document.start, color="black", lw=1.8)

    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal")
    axes.set_ylabel("query: who looks")
    axes.set_xlabel("key: who is seen")
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    step = -(-len(segments) // _MAX_LABELS)
    labelled = segments[::step]
    middles = [s.start + s.length / 2 for s in labelled]
    # Text shrinks with the narrowest labelled cell, so that neighbours never overlap.
    narrowest = min(s.length for s in labelled) * step / length * size * 72 * 0.85
    font = max(4.0, min(11.0, narrowest / 1.6))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(middles, [s.label for s in labelled], fontsize=font)
        for text, segment in zip(axis.get_ticklabels(), labelled, strict=True):
            text.set_color(COLORS[segment.role])
    axes.tick_params(length=0)

    present = [role for role in COLORS if any(s.role == role for s in segments)]
    names = {"noisy": "noisy chunk z", "clean": "clean chunk x"}
    handles = [Patch(color=COLORS[role], label=names[role]) for role in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    share = layout.spans.pairs / length**2
    default = f"{length:,} tokens, {share:.0%} of pairs visible"
    axes.set_title(f"{title}\n{default}" if title else default, fontsize=11)
    figure.savefig(path, dpi=120)
