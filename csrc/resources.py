"""What ptxas made of each kernel, against what its source declares; `python csrc/resources.py` prints the table.

A kernel declares its registers with ``__launch_bounds__(threads, blocks)``: that many blocks must fit the 65,536
registers of a multiprocessor, so a thread may have ``65536 / (threads * blocks)`` of them, in steps of 8, at most 255.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor; CUDA C programming guide, "technical specifications"
MOST = 255  # of a thread
# wgmma that waits for itself (C7510 and its neighbours), setmaxnreg that is ignored, and whatever is called a warning.
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
    found = []
    for match in block.finditer(log):
        stores, loads, stack = (int(match[name]) for name in ("stores", "loads", "stack"))
        found.append(Kernel(match["name"], int(match["registers"]), caps[match["name"]], stores, loads, stack))
    if {kernel.name for kernel in found} != caps.keys():
        raise ValueError(f"log: got {len(found)} kernels, expected the {len(caps)} of the PTX")
    return found


def complaints(log: str) -> list[str]:
    """Lines in which the compilers warn, or say that matrix products were serialised."""
    return sorted({line.strip() for line in log.splitlines() if COMPLAINT.search(line)})


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names and what stands in the source."""
    names = list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = [re.sub(r"^void |\(.*$", "", line) for line in done.stdout.splitlines()]
    return dict(zip(names, short, strict=True))


def _product(numbers: str) -> int:
    product = 1
    for number in numbers.split(","):
        product *= int(number)
    return product


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/cuda")
    faults = []
    for log in sorted(folder.glob("*.log")):
        found = kernels(log.read_text(), log.with_suffix(".ptx").read_text())
        names = readable(kernel.name for kernel in found)
        for kernel in found:
            spills = f"{kernel.spill_stores}/{kernel.spill_loads}"
            registers = f"{kernel.registers} of {kernel.declared} registers"
            print(f"{log.stem:22} {registers:22} spills {spills}, stack {kernel.stack}: {names[kernel.name]}")
        faults += [fault for kernel in found for fault in kernel.faults] + complaints(log.read_text())
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
