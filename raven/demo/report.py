"""Write ``report.html``: one file with everything inline, from the numbers of ``metrics.json`` and the pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from raven.demo import numbers
from raven.demo.charts import Line, chart, smooth
from raven.demo.numbers import LABELS, METRICS


@dataclass(frozen=True)
class Pictures:
    """What the report shows besides numbers, as bytes.

    ``previews`` has an animated WebP for each ``(model, length, prompt index)``, ``grids`` an mp4 for each length,
    ``masks`` a ``(title, caption, PNG)`` for each layout.
    """

    previews: Mapping[tuple[str, int, int], bytes] = field(default_factory=dict)
    grids: Mapping[int, bytes] = field(default_factory=dict)
    masks: Sequence[tuple[str, str, bytes]] = ()


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is either the old or the whole new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def write(folder: Path, metrics: dict, pictures: Pictures) -> Path:
    """Write ``metrics.json`` and ``report.html`` into ``folder`` and return the path of the report.

    ``metrics`` has the keys ``run`` (title, lead, facts), ``lengths``, ``prompts``, ``records``, ``rows``,
    ``comparisons``, ``training``, ``stages`` and ``notes``, as ``raven.demo.stages`` builds them.
    """
    write_json(folder / "metrics.json", metrics)
    template = Template(Path(__file__).with_name("assets").joinpath("template.html").read_text(encoding="utf-8"))
    long = max(metrics["lengths"].values())
    page = template.substitute(
        title=escape(metrics["run"]["title"]),
        lead=escape(metrics["run"]["lead"]),
        facts="".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in metrics["run"]["facts"]),
        findings=_findings(metrics),
        videos=_videos(metrics, pictures),
        table=_table(metrics),
        table_notes=_paragraphs(metrics.get("table_notes", ())),
        drift=_drift(metrics, long),
        drift_notes=_drift_notes(metrics, long),
        training=_training(metrics) or '<p class="quiet">No training stage was run.</p>',
        masks="".join(_mask(*mask) for mask in pictures.masks),
        stages=_stages(metrics),
        notes=_paragraphs(metrics.get("notes", ())),
    )
    path = folder / "report.html"
    part = path.with_name("report.html.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f'<p class="quiet">{escape(text)}</p>' for text in texts)


def _findings(metrics: dict) -> str:
    items = []
    for comparison in metrics["comparisons"]:
        short = numbers.verdict_in_short(comparison)
        css = short if short in ("helped", "hurt", "mixed") else "none"
        if comparison["before"] == "teacher":  # a reference, not a stage: nothing "helps" the teacher
            short, css = "for reference", "none"
        items.append(f'<li><span class="badge {css}">{short}</span>{escape(comparison["sentence"])}</li>')
    rule = (
        "Each pair of videos has the same prompt and the same seed. Given is the mean difference ± its standard error; "
        "a difference counts when it is more than two standard errors, everything else is called no clear difference."
    )
    return f'<ul>{"".join(items)}</ul><p class="quiet">{rule}</p>'


def _videos(metrics: dict, pictures: Pictures) -> str:
    lengths = metrics["lengths"]
    # One block of columns per length, with an empty column (None) between the blocks.
    columns: list[tuple[str, int] | None] = []
    cells = []
    for name, length in lengths.items():
        block = [(m, length) for m in LABELS if any(key[:2] == (m, length) for key in pictures.previews)]
        if block:
            cells += ["<div></div>"] if columns else []
            columns += ([None] if columns else []) + block
            title = f"{name.capitalize()} length, {length} frames"
            cells.append(f'<div class="group" style="grid-column: span {len(block)}">{title}</div>')
    if not columns:
        return '<p class="quiet">No videos were kept.</p>'
    cells += [f'<div class="head {c[0]}">{escape(LABELS[c[0]])}</div>' if c else "<div></div>" for c in columns]
    for index, prompt in enumerate(metrics["prompts"]):
        row = [_cell(c, index, prompt, pictures) if c else "<div></div>" for c in columns]
        if any("<img" in cell for cell in row):
            cells += [f'<p class="prompt">“{escape(prompt)}”</p>', *row]
    widths = " ".join("1fr" if c else "4px" for c in columns)
    blocks = [
        f'<div class="scroll"><div class="videos" style="grid-template-columns: {widths}">{"".join(cells)}</div></div>'
    ]
    for name, length in lengths.items():
        if length in pictures.grids:
            source = _data("video/mp4", pictures.grids[length])
            blocks.append(
                f"<details><summary>{name.capitalize()} length as one mp4</summary>"
                f'<p><video controls loop muted playsinline src="{source}"></video></p></details>'
            )
    return "".join(blocks)


def _cell(column: tuple[str, int], index: int, prompt: str, pictures: Pictures) -> str:
    content = pictures.previews.get((*column, index))
    if content is None:
        return '<div class="missing">not sampled</div>'
    return f'<img alt="{escape(LABELS[column[0]])}: {escape(prompt)}" src="{_data("image/webp", content)}">'


def _table(metrics: dict) -> str:
    head = "<tr><th>Length</th><th>Model</th>" + "".join(f'<th class="number">{m}</th>' for m in METRICS)
    lines = [head + '<th class="number">sampling</th><th class="number">videos</th></tr>']
    rows = metrics["rows"]
    for i, row in enumerate(rows):
        peers = [r for r in rows if r["length"] == row["length"]]
        cells = [f"<td>{row['length']} frames</td>", f'<td class="{row["model"]}">{escape(LABELS[row["model"]])}</td>']
        for metric in METRICS:
            best = max(r[metric]["mean"] for r in peers)
            css = "number best" if row[metric]["mean"] == best else "number"
            cells.append(
                f'<td class="{css}">{row[metric]["mean"]:.3f} <small>± {row[metric]["spread"]:.3f}</small></td>'
            )
        cells.append(f'<td class="number">{escape(row.get("sampling", ""))}</td>')
        cells.append(f'<td class="number">{row["videos"]} <small>({len(row["seeds"])} seeds)</small></td>')
        last = i + 1 < len(rows) and rows[i + 1]["length"] != row["length"]
        lines.append(f"<tr{' class=break' if last else ''}>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _drift(metrics: dict, long: int) -> str:
    rows = [row for row in metrics["rows"] if row["length"] == long]
    charts = []
    for metric in METRICS:
        lines = []
        for row in rows:
            mean, spread = row["chunks"][metric]["mean"], row["chunks"][metric]["spread"]
            x = list(range(1, len(mean) + 1))
            low = [max(0.0, m - s) for m, s in zip(mean, spread, strict=True)]
            high = [min(1.0, m + s) for m, s in zip(mean, spread, strict=True)]
            lines.append(Line(LABELS[row["model"]], row["model"], x, mean, low, high))
        trained = metrics["run"]["trained_chunks"] + 0.5
        charts.append(
            chart(lines, f"{metric.capitalize()} per chunk", "chunk", metric, (0.0, 1.0), (trained, "trained length"))
        )
    return "".join(charts)


def _drift_notes(metrics: dict, long: int) -> str:
    rows = [row for row in metrics["rows"] if row["length"] == long]
    return "<ul>" + "".join(f"<li>{escape(numbers.drift_sentence(row))}</li>" for row in rows) + "</ul>"


def _training(metrics: dict) -> str:
    charts = []
    for curve in metrics["training"]:
        x, y = curve["x"], curve["y"]
        window = max(1, len(y) // 20)
        lines = [
            Line("", curve["css"], x, y, faint=True),
            Line(f"mean of the last {window}" if window > 1 else "", curve["css"], x, smooth(y, window)),
        ]
        charts.append(chart(lines, curve["title"], curve["x_label"], curve["y_label"]))
    return "".join(charts)


def _mask(title: str, caption: str, png: bytes) -> str:
    return (
        f'<figure><img alt="{escape(title)}" src="{_data("image/png", png)}">'
        f'<figcaption style="margin: 10px 0 0"><b>{escape(title)}.</b> {escape(caption)}</figcaption></figure>'
    )


def _stages(metrics: dict) -> str:
    head = '<tr><th>Stage</th><th>What</th><th class="number">seconds</th></tr>'
    lines = [
        f'<tr><td>{escape(s["title"])}</td><td>{escape(s["what"])}</td><td class="number">{s["seconds"]:.1f}</td></tr>'
        for s in metrics["stages"]
    ]
    return f"<table>{head}{''.join(lines)}</table>"
