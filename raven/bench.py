"""The command ``raven bench``: run the benches of a checkout, put their rows into one file, print and draw the table.

A results file is JSON: ``gpu`` (name or ``null``), ``cpu``, ``date``, ``versions``, ``ceilings``, ``left_out`` (who has
no figure, and why) and ``rows``; a row has ``op, case, direction, backend, ms, rate, unit, roof, percent, peers {name:
ms}, timer`` and what its bench adds (whole steps: ``seconds``, ``phases_ms`` and on a GPU ``peak_gib``). A case has a
row for each backend that can run it, with the same peers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from raven._bench_plots import plot_results
from raven._targets import format_targets

ROW_KEYS = ("op", "case", "direction", "backend", "ms", "rate", "unit", "roof", "peers")
_NOTHING_COLLECTED = 5  # pytest's exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0 when every bench passed, 1 when one failed (its row is missing from the table)."""
    parser = argparse.ArgumentParser(
        prog="raven bench",
        description="Measure the kernels against their peers. Every row is refused unless its correctness check "
        "passed in the same process.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these ops (default: all)")
    parser.add_argument(
        "-k", "--case", dest="keyword", metavar="EXPR", help="only cases whose name matches, as in pytest -k"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also measure FlashAttention 3 and 4, MagiAttention and flashinfer, where they are importable",
    )
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="print stored results, of one GPU if several, and measure nothing; with --output draw their pictures",
    )
    parser.add_argument("--output", metavar="FILE", help="results file (default: a new one in bench/results)")
    parser.add_argument("--folder", metavar="DIR", help="folder of the benches (default: bench/ of this checkout)")
    args = parser.parse_args(argv)
    if args.table:
        return _show([read_results(path) for path in args.table], args.output)
    files = bench_files(find_folder(args.folder), args.ops)
    path, failed, parts = Path(args.output) if args.output else None, [], []
    for part, failure in _run(files, args.keyword, args.peers):
        parts += [part] * (part is not None)
        failed += [failure] * (failure is not None)
        results = merge_results(parts)
        if results["rows"]:  # after every bench, so that whatever ends the run leaves the rows before it
            path = path or _default_path(files[0].parent, results)
            write_results(results, path)
    if not parts or not results["rows"]:
        print("no rows: no bench ran to its end", file=sys.stderr)
        for who, reason in merge_results(parts)["left_out"].items():
            print(f"left out: {who}: {reason}", file=sys.stderr)
        return 1
    print(_report(results))
    print(f"\nwritten to {path}")
    pictures = plot_results(results, path)
    print(f"pictures: {', '.join(map(str, pictures))}" if pictures else "no picture: matplotlib is not installed")
    if failed:
        print("failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _show(parts: Sequence[Mapping[str, Any]], output: str | None) -> int:
    """Print, and draw, what was measured before."""
    gpus = sorted({str(part.get("gpu")) for part in parts})
    if len(gpus) > 1:
        raise ValueError(f"table: got results of {', '.join(gpus)}, expected those of one GPU")
    results = merge_results(parts)
    print(_report(results))
    if output:
        print(f"pictures: {', '.join(map(str, plot_results(results, output)))}")
    return 0


def find_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the benches. ``ValueError`` where there is none, as in an installed wheel."""
    path = Path(folder) if folder else Path(__file__).resolve().parents[1] / "bench"
    if not any(path.glob("bench_*.py")):
        raise ValueError(
            f"folder: got {path}, which holds no bench_*.py; the benches are part of a checkout, not of an installed "
            "package: run this inside one (pip install -e .), or name its folder with --folder"
        )
    return path


def bench_files(folder: Path, ops: Sequence[str] = ()) -> list[Path]:
    """Bench files of the ops, all of them when none is named. ``ValueError`` for an op without one."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    for op in ops:
        if op not in found:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(found)}")
    return [found[op] for op in (ops or found)]


def _run(files: Sequence[Path], keyword: str | None, peers: bool) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """Per file its results and, if it failed, its name; an interruption ends the run after what was measured.

    One process per file: an illegal memory access in one leaves the others their rows.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for file in files:
            part = Path(scratch) / f"{file.stem}.json"
            # The settings of the checkout's own tests (plug-ins, strictness) do not concern a bench.
            command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(file.parent), str(file)]
            command += ["-q", "--no-header", "-p", "no:cacheprovider", "--benchmark-disable", "--raven-json", str(part)]
            command += ["-k", keyword] if keyword else []
            process, interrupted = subprocess.Popen(command + ["--raven-peers"] * peers), False
            try:
                code = process.wait()
            except KeyboardInterrupt:
                interrupted, code = True, _stop(process)
            failed = interrupted or code not in (0, _NOTHING_COLLECTED)
            yield read_results(part) if part.exists() else None, file.stem if failed else None
            if interrupted:
                return


def _stop(process: subprocess.Popen) -> int:
    """Interrupt a bench, which then saves the rows it has."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def merge_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of several runs on one machine under one heading; of each ceiling the first measurement."""
    merged: dict[str, Any] = {"gpu": None, "versions": {}, "ceilings": {}, "left_out": {}, "rows": []}
    for part in parts:
        joined = {key: {**part.get(key, {}), **merged[key]} for key in ("ceilings", "left_out", "versions")}
        joined["rows"] = merged["rows"] + part["rows"]
        merged = {**part, **{k: v for k, v in merged.items() if v}, **joined}
    return merged


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a results file; ``OSError`` when it cannot be read, ``ValueError`` when it is no such file."""
    with open(path, encoding="utf-8") as file:
        try:
            results = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"table: got {path}, which is no JSON file ({error})") from error
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
        raise ValueError(f"table: got {path}, which has no rows; expected a file that raven bench wrote")
    for row in results["rows"]:
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ValueError(f"table: got {path} with a row without {', '.join(missing)}")
    return results


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Store a run, rounded to six digits. The file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def _default_path(folder: Path, results: Mapping[str, Any]) -> Path:
    gpu = "-".join((results["gpu"] or "cpu").lower().split())
    return folder / "results" / f"{gpu}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}.json"


def _report(results: Mapping[str, Any]) -> str:
    """The rows, who is not among them and why, and the targets."""
    parts = [format_table(results)]
    if left_out := results.get("left_out"):
        parts.append("\n".join(["left out:", *(f"  {who}: {reason}" for who, reason in left_out.items())]))
    if phases := format_phases(results):
        parts.append(f"where the time goes:\n{phases}")
    if targets := format_targets(results):
        parts.append(f"targets, on one H200:\n{targets}")
    return "\n\n".join(parts)


def format_table(results: Mapping[str, Any]) -> str:
    """The rows as text: rate, share of the measured ceiling, and how many times faster than each peer."""
    versions = results.get("versions", {})
    heading = f"{results.get('gpu') or 'no GPU'}, {results.get('date', 'no date')}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [["op", "case", "direction", "backend", "ms", "rate", "of roof", "of dense cuDNN", "against peers"]]
    for row in results["rows"]:
        peers = ", ".join(f"{_ratio(ms / row['ms'])} {name}" for name, ms in row["peers"].items())
        yardstick = row.get("cudnn_dense_rate")
        lines.append(
            [
                row["op"],
                row["case"],
                row["direction"],
                row["backend"],
                f"{row['ms']:.4g}",
                f"{row['rate']:.4g} {row['unit']}",
                f"{100 * row['rate'] / row['roof']:.0f} %",
                _ratio(row["rate"] / yardstick) if yardstick else "-",
                peers or "-",
            ]
        )
    if all(line[7] == "-" for line in lines[1:]):
        lines = [line[:7] + line[8:] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([heading, software, *_ceilings(results), "", *text])


def format_phases(results: Mapping[str, Any]) -> str:
    """The phases of whole steps as text, one line each; nothing when no row has any."""
    lines = []
    for row in results["rows"]:
        if not (phases := row.get("phases_ms")):
            continue
        whole = sum(phases.values())
        peak = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        if "official_seconds" in row:
            official = f"{row['official_seconds']:g} s, {row['official_peak_gib']:g} GiB"
            peak += f" (official code, measured earlier on an H200: {official})"
        lines.append(f"{row['op']} {row['case']}, {row['backend']}: {whole / 1e3:.3g} s{peak}")
        width = max(map(len, phases))
        lines += [f"  {name.ljust(width)}  {ms:9.1f} ms  {100 * ms / whole:5.1f} %" for name, ms in phases.items()]
    return "\n".join(lines)


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _ceilings(results: Mapping[str, Any]) -> list[str]:
    ceilings = results.get("ceilings", {})
    parts = [
        f"{label} {ceilings[key]:.4g} {unit}"
        for key, label, unit in (
            ("copy_tb_per_s", "copy", "TB/s"),
            ("matmul_tflop_per_s", "matrix product", "TFLOP/s"),
        )
        if key in ceilings
    ]
    return [f"roofs measured in this run: {', '.join(parts)}"] if parts else []
