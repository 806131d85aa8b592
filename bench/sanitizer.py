"""Run the CUDA kernels under compute-sanitizer and keep a summary: ``python bench/sanitizer.py [TOOL ...]``.

Each tool watches `sanitizer_cases.py` in a process of its own, all at the same time, without PyTorch's caching of
memory, so that every tensor has borders of its own. The summary goes to ``bench/results/<gpu>-sanitizer.txt``. Exit
code 1 when a tool found something or did not run to the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

TOOLS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "hazard", "--show-backtrace", "device"],
    "synccheck": [],
    "initcheck": [],
}
ERROR_CODE = 9
CASES = Path(__file__).with_name("sanitizer_cases.py")
LIMIT_S = 1800


def command(sanitizer: str, tool: str, help_text: str) -> list[str]:
    """The call that watches our kernels. initcheck must see everybody's, or memory they wrote would look unwritten."""
    arguments = [
        sanitizer,
        "--tool",
        tool,
        *TOOLS[tool],
        "--error-exitcode",
        str(ERROR_CODE),
        "--print-limit",
        "100000",
    ]
    if tool != "initcheck":
        option = next((o for o in ("--kernel-regex", "--kernel-name", "--filter") if o in help_text), None)
        arguments += [option, "kns=raven"] if option else []
    return [*arguments, sys.executable, str(CASES)]


def plain(line: str) -> str:
    """Without addresses, coordinates, arguments and folders."""
    line = re.sub(r"0x[0-9a-f]+", "0x..", line)
    line = re.sub(r"\(\d+,\d+,\d+\)", "(..)", line)
    line = re.sub(r"<[^ ].*>\(.*\)(?=\+)", "", line)
    return re.sub(r"(?:/[\w.+-]+)+/", "", line)


def summarise(tool: str, code: int, output: str, seconds: float) -> tuple[bool, list[str]]:
    """Whether the run was clean, and its lines of the log: no process numbers, no addresses, no paths."""
    cases = re.findall(r"^case: (.*)$", output, re.MULTILINE)
    verdicts = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", output, re.MULTILINE)
    clean = code == 0 and bool(verdicts) and all(re.match(r"\w+ SUMMARY: 0 ", v) for v in verdicts)
    lines = [
        f"{tool}: {'clean' if clean else 'NOT CLEAN'}, {len(cases)} cases, {seconds:.0f} s",
        *(f"  {v}" for v in verdicts),
    ]
    if not clean:
        found = [plain(line) for line in re.findall(r"^=+ +(\S.*)$", output, re.MULTILINE)]
        unwanted = ("SUMMARY", "COMPUTE-SANITIZER", "Host Frame", "Saved host backtrace", "Address ", "Current Value")
        found = [line for line in dict.fromkeys(found) if not any(word in line for word in unwanted)]
        errors = [line.strip() for line in output.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
        lines += [f"  {line[:180]}" for line in (*found[:20], *errors[:3])] + [f"  exit code {code}"]
    return clean, lines


def versions(sanitizer: str) -> list[str]:
    import torch

    import raven

    banner = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"\d{4}\.\d+\.\d+", banner)
    return [
        f"{torch.cuda.get_device_name()}, {datetime.now(timezone.utc):%Y-%m-%d}",
        f"raven {raven.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"compute-sanitizer {number.group() if number else 'of an unknown version'}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the CUDA kernels under compute-sanitizer.")
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"some of {', '.join(TOOLS)} (default: all)")
    parser.add_argument("--output", metavar="FILE", help="summary (default: bench/results/<gpu>-sanitizer.txt)")
    args = parser.parse_args(argv)
    if unknown := set(args.tools) - set(TOOLS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(TOOLS)}")
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    help_text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    running = {
        tool: subprocess.Popen(
            command(sanitizer, tool, help_text),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for tool in args.tools or TOOLS
    }
    plain = subprocess.run([sys.executable, str(CASES), "--kernels"], capture_output=True, text=True, env=environment)
    lines, all_clean = versions(sanitizer), plain.returncode == 0
    lines += [line[:180] for line in plain.stdout.splitlines() if line.startswith(("kernel: ", "left out: "))]
    for tool, process in running.items():
        output, _ = process.communicate(timeout=LIMIT_S)
        clean, summary = summarise(tool, process.returncode, output, time.monotonic() - start)
        all_clean &= clean
        lines += ["", *summary]
    text = "\n".join(lines) + "\n"
    print(text)
    gpu = "-".join(lines[0].split(",")[0].lower().split())
    path = Path(args.output) if args.output else Path(__file__).parent / "results" / f"{gpu}-sanitizer.txt"
    path.write_text(text, encoding="utf-8")
    print(f"written to {path}")
    return 0 if all_clean else 1


if __name__ == "__main__":
    sys.exit(main())
