"""A library that runs on older machines than the one that built it: which symbols it asks for, and older ones instead.

The C library of 2.34 took in libpthread, libdl and librt and gave their functions new versions, though nothing about
them changed. A library that is linked there against stubs that define the old versions asks for those, which every
later C library still has.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

COMPILER = os.environ.get("NVCC_CCBIN") or "g++"  # the one that nvcc uses
# Where a function was before 2.34, by the start of its name.
HOMES = {"dl": "libdl.so.2", "pthread_": "libpthread.so.0", "sem_": "libpthread.so.0", "shm_": "librt.so.1"}


def soname(library: str) -> str:
    return f"lib{library}.so"


def needed(path: Path) -> set[str]:
    """Names of the libraries that the file at ``path`` asks for."""
    return set(re.findall(r"NEEDED +(\S+)", _objdump("-p", path)))


def undefined(path: Path) -> dict[str, str | None]:
    """Symbols that the file takes from other libraries, and the version it asks for: ``{"dlsym": "GLIBC_2.34"}``."""
    table = re.findall(r"\*UND\*\s+[0-9a-f]+\s+(?:\(?([A-Z]+_[\d.]+)\)?|Base)?\s+(\S+)$", _objdump("-T", path), re.M)
    return {name: version or None for version, name in table}


def defined(path: Path) -> dict[str, set[str]]:
    """Symbols of the file and all their versions, the old ones too."""
    found: dict[str, set[str]] = {}
    line = r"^[0-9a-f]+ .{7} (?!\*UND\*)\S+\s+[0-9a-f]+\s+\(?([A-Za-z]+(?:_[\d.]+)?)\)?\s+(\S+)$"
    for version, name in re.findall(line, _objdump("-T", path), re.M):
        found.setdefault(name, set()).add(version)
    return found


def too_new(path: Path, newest: Mapping[str, str]) -> dict[str, str]:
    """Symbols whose version is above ``newest`` (``{"GLIBC": "2.28", ...}``), or of a family that it lacks."""
    return {name: version for name, version in undefined(path).items() if version and not _allowed(version, newest)}


def older_stubs(path: Path, folder: Path, newest: Mapping[str, str]) -> list[Path]:
    """Stub libraries with the old versions of what ``path`` asks for too new, as far as this machine's libc has any."""
    replace: dict[str, dict[str, list[str]]] = {}
    names = too_new(path, newest)
    versions = defined(_libc()) if names else {}
    for name in names:
        home = next((library for start, library in HOMES.items() if name.startswith(start)), None)
        old = [version for version in versions.get(name, ()) if _allowed(version, newest)]
        if home and old:
            replace.setdefault(home, {}).setdefault(max(old, key=_key), []).append(name)
    return [stub(folder / home, symbols, home) for home, symbols in sorted(replace.items())]


def stub(path: Path, symbols: Mapping[str, list[str]], name: str) -> Path:
    """An empty library called ``name`` that claims to have ``symbols``: version to names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    script = path.with_suffix(".map")
    nodes = (f"{version} {{ {'; '.join(names)}; }};" for version, names in symbols.items())
    script.write_text("\n".join(nodes))
    source = "".join(f"void {s}(void) {{}}\n" for names in symbols.values() for s in names)
    options = [f"-Wl,--version-script={script}"] if symbols else []
    command = [COMPILER, "-shared", "-fPIC", "-nostdlib", "-w", "-fno-builtin", f"-Wl,-soname,{name}", *options]
    subprocess.run([*command, "-x", "c", "-", "-o", str(path)], input=source, text=True, check=True)
    return path


def _libc() -> Path:
    """The C library that the linker takes."""
    trace = subprocess.run([COMPILER, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True)
    return Path(trace.stdout.strip())


def _objdump(option: str, path: Path) -> str:
    return subprocess.run(["objdump", option, str(path)], capture_output=True, text=True, check=True).stdout


def _allowed(version: str, newest: Mapping[str, str]) -> bool:
    family, _, number = version.rpartition("_")
    return family in newest and _key(number) <= _key(newest[family])


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
