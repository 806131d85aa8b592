"""What ptxas made of each kernel, against what its source declares; `python csrc/resources.py` says it, with faults.

A kernel declares its registers with ``__launch_bounds__(threads, blocks)``: that many blocks must fit the 65,536
registers of a multiprocessor, so a thread may have ``65536 / (threads * blocks)`` of them, in steps of 8, at most 255.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor; CUDA C programming guide, "technical specifications"
MOST = 255  # of a thread
# wgmma that waits where the source does not (C7510 and its neighbours), setmaxnreg that is ignored, every warning.
COMPLAINT = re.compile(r"\(C75\d\d\)|\bwarning\s*[#:]|setmaxnreg ignored")


@dataclass(frozen=True)
class Kernel:
    """Registers of a thread and bytes of spills; ``declared`` is ``None`` without ``__launch_bounds__``."""

    name: str
    registers: int
    declared: int | None
    spill_stores: int
    spill_loads: int
    stack: int

    @property
    def faults(self) -> list[str]:
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"{self.name}: spills {self.spill_stores} bytes and loads {self.spill_loads}")
        if self.declared is None:
            found.append(f"{self.name}: declares no __launch_bounds__ (or __maxnreg__)")
        elif self.registers > self.declared:
            found.append(f"{self.name}: {self.registers} registers, declares at most {self.declared}")
        return found


def declared(ptx: str) -> dict[str, int | None]:
    """Mangled name of each kernel in PTX text, and the registers that its launch bounds leave a thread."""
    found: dict[str, int | None] = {}
    for name, directives in re.findall(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{", ptx):
        numbers = {key: value for key, value in re.findall(r"\.(\w+)\s+([\d, ]+)", directives)}
        if "maxnreg" in numbers:
            found[name] = int(numbers["maxnreg"])
        elif "maxntid" in numbers:
            threads = _product(numbers["maxntid"]) * int(numbers.get("minnctapersm", "1"))
            found[name] = min(MOST, REGISTERS // threads // 8 * 8)
        else:
            found[name] = None
    return found


def kernels(log: str, ptx: str) -> list[Kernel]:
    """Kernels of one source, from what ``-Xptxas=-v`` said and the PTX it was said about."""
    caps = declared(ptx)
    block = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.S,
    )
    matches = list(block.finditer(log))
    if {match["name"] for match in matches} != caps.keys():
        raise ValueError(f"log: got {len(matches)} kernels, expected the {len(caps)} of the PTX")
    found = []
    for match in matches:
        stores, loads, stack = (int(match[name]) for name in ("stores", "loads", "stack"))
        found.append(Kernel(match["name"], int(match["registers"]), caps[match["name"]], stores, loads, stack))
    return found


def complaints(log: str) -> list[str]:
    """Lines in which the compilers warn, or say that matrix products were serialised."""
    return sorted({line.strip() for line in log.splitlines() if COMPLAINT.search(line)})


def readable(lines: list[str]) -> list[str]:
    """Lines with mangled names as they stand in the source, without arguments."""
    done = subprocess.run(["c++filt"], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [re.sub(r"(?<=[\w>])\([^']*\)|\bvoid (?=raven)", "", line) for line in done.stdout.splitlines()]


def _product(numbers: str) -> int:
    product = 1
    for number in numbers.split(","):
        product *= int(number)
    return product


def report(log: Path) -> tuple[list[Kernel], list[str]]:
    """Kernels, under the names of their source, and faults of one object that `build_cuda` made; ``log`` lies by it."""
    text = log.read_text()
    found = kernels(text, log.with_suffix(".ptx").read_text())
    names = readable([kernel.name for kernel in found])
    found = [replace(kernel, name=name) for kernel, name in zip(found, names, strict=True)]
    return found, [fault for kernel in found for fault in kernel.faults] + readable(complaints(text))


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers and spills of the CUDA kernels; exit code 1 with faults.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/cuda"), help="where the objects are")
    parser.add_argument("--all", action="store_true", help="a line for every kernel")
    args = parser.parse_args()
    faults = []
    for log in sorted(args.folder.glob("*.log")):
        found, wrong = report(log)
        faults += wrong
        if found:
            print(f"{log.stem}: {len(found)} kernels, at most {max(kernel.registers for kernel in found)} registers")
        for kernel in found if args.all else ():
            print(
                f"  {kernel.registers:3} of {kernel.declared} registers, {kernel.stack} bytes of stack: {kernel.name}"
            )
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
