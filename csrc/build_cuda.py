"""Compile csrc/ops/*.cu into raven/libraven_cuda.so; setup.py, `make cuda` and the tests call this.

Every flag is in csrc/flags.json. Each source becomes one object, several at a time (``MAX_JOBS``, or as many as there
are processors); next to it stay the log of ptxas and the PTX, which `resources.py` reads. An object is made anew only
when its command or a file of csrc/ that it includes has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import portable  # noqa: E402

ROOT = Path(__file__).parents[1]
FLAGS = json.loads((ROOT / "csrc/flags.json").read_text())
LIBRARY = Path("raven/libraven_cuda.so")
NO_CUDA = "RAVEN_BUILD_NO_CUDA=1 installs without the CUDA library: Triton and PyTorch run then"


class BuildError(RuntimeError):
    """The library cannot be built; the message says how it can."""


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str  # "13.0.88"

    @property
    def library_dirs(self) -> list[str]:
        """Where the static runtime is in the wheels of nvcc, whose own search path lacks it."""
        return [str(d) for d in (self.path.parents[1] / "lib",) if (d / "libcudart_static.a").exists()]


@dataclass(frozen=True)
class Torch:
    include: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Unit:
    """One source and what it is compiled into; paths are relative to the root, or absolute."""

    source: Path
    object: Path

    @property
    def log(self) -> Path:
        return self.object.with_suffix(".log")

    @property
    def ptx(self) -> Path:
        return self.object.with_suffix(".ptx")

    @property
    def record(self) -> Path:
        return self.object.with_suffix(".json")


def archs(environ: Mapping[str, str] = os.environ) -> list[str]:
    """``RAVEN_CUDA_ARCHS``, separated by ``;`` or ``,`` or spaces; what this machine has plays no role."""
    names = re.split(r"[;,\s]+", environ.get("RAVEN_CUDA_ARCHS", "").strip())
    names = [name.removeprefix("sm_") for name in names if name] or FLAGS["default_archs"]
    for name in names:
        if name not in FLAGS["archs"]:
            known = ", ".join(f"{arch} ({chips})" for arch, chips in FLAGS["archs"].items())
            raise BuildError(
                f"RAVEN_CUDA_ARCHS: got {name!r}, expected {known}. Other GPUs run the Triton kernels. {NO_CUDA}"
            )
    return sorted(set(names))


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Nvcc:
    """``CUDACXX``, the wheel in this Python, ``CUDA_HOME``, ``PATH``, /usr/local/cuda: the first that is there."""
    minimum = FLAGS["nvcc_minimum"]
    fix = (
        f"Name one: CUDACXX=/path/to/nvcc; or pip install 'cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]=={minimum}.*' and "
        f"build with pip install --no-build-isolation. {NO_CUDA}"
    )
    if asked := environ.get("CUDACXX"):
        found = shutil.which(asked)
        if found is None:
            raise BuildError(f"CUDACXX: got {asked!r}, expected the path of nvcc {minimum} or newer. {fix}")
    else:
        roots = [environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
        candidates = [
            Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc",
            *(Path(root) / "bin/nvcc" for root in roots if root),
            shutil.which("nvcc", path=environ.get("PATH")),
            Path("/usr/local/cuda/bin/nvcc"),
        ]
        found = next((str(path) for path in candidates if path and os.access(path, os.X_OK)), None)
        if found is None:
            raise BuildError(f"nvcc: found none, expected {minimum} or newer. {fix}")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    if version is None:
        raise BuildError(f"nvcc: {found} says {said.strip()!r}, expected a version. {fix}")
    if _numbers(version[1]) < _numbers(minimum):
        raise BuildError(f"nvcc: got {version[1]} ({found}), expected {minimum} or newer. {fix}")
    return Nvcc(Path(found), version[1])


def find_torch() -> Torch:
    """Headers of the PyTorch in this Python. Any from 2.10 on gives the same library: its stable interface."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch: not installed in the Python that builds, expected 2.10 or newer for its headers. "
            f"pip install torch and pip install --no-build-isolation. {NO_CUDA}"
        )
    include = Path(spec.origin).parent / "include"
    header = include / "torch/headeronly/version.h"
    version = re.search(r'"([\d.]+)"', header.read_text()) if header.exists() else None
    if version is None or _numbers(version[1]) < (2, 10):
        got = version[1] if version else f"one without {header.name}"
        raise BuildError(f"torch: got {got}, expected 2.10 or newer: pip install -U torch. {NO_CUDA}")
    return Torch((str(include), str(include / "torch/csrc/api/include")), version[1])


def sources() -> list[Path]:
    """The op files, relative to the root, sorted."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/ops").glob("*.cu"))


def compile_flags(names: list[str]) -> list[str]:
    """Flags of every .cu, without the folders of PyTorch's headers."""
    return [
        f"-std=c++{FLAGS['cxx_standard']}",
        *FLAGS["nvcc"],
        f"-DTORCH_TARGET_VERSION={FLAGS['torch_target_version']}",
        *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in names),
        *(f"-I{folder}" for folder in FLAGS["include"]),
    ]


def compile_unit(unit: Unit, nvcc: Nvcc, torch: Torch, flags: list[str]) -> bool:
    """Compile one source unless its object is up to date; whether it did. Raises ``BuildError`` with nvcc's words."""
    key = f"{' '.join(flags)}; {unit.source.name}; nvcc {nvcc.version}, torch {torch.version}"
    if _up_to_date(unit, key):
        return False
    unit.object.parent.mkdir(parents=True, exist_ok=True)
    unit.record.unlink(missing_ok=True)
    keep = unit.object.with_suffix(".keep")
    keep.mkdir(exist_ok=True)
    depends = keep / "depends"
    depends.touch()
    started = depends.stat().st_mtime
    include = [part for folder in torch.include for part in ("-isystem", folder)]
    extra = ["-MD", "-MF", str(depends), "--keep", "--keep-dir", str(keep), "-o", str(unit.object)]
    command = [str(nvcc.path), *flags, *include, *extra, "-c", str(unit.source)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    unit.log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise BuildError(f"nvcc could not compile {unit.source}:\n{done.stdout}{done.stderr}")
    ptx = sorted(keep.glob("*.ptx"))
    unit.ptx.write_text("".join(path.read_text() for path in ptx))
    included = _own_files(depends.read_text())
    shutil.rmtree(keep)
    record = {"key": key, "source": _digest(unit.source), "files": {str(path): _digest(path) for path in included}}
    if all((ROOT / path).stat().st_mtime <= started for path in (unit.source, *included)):  # or it was edited meanwhile
        unit.record.write_text(json.dumps(record, indent=1))
    return True


def compile_all(build: Path, names: list[str], nvcc: Nvcc, torch: Torch, ops: list[Path] | None = None) -> list[Unit]:
    """Objects of ``ops`` (all of them) and of the file that says what the library was built with."""
    ops = sources() if ops is None else ops
    if not ops:
        raise BuildError("csrc/ops: found no .cu file, expected one for each op")
    flags = compile_flags(names)
    info = build / "build_info.cu"
    info.parent.mkdir(parents=True, exist_ok=True)
    filled = {
        "RAVEN_VERSION": package_version(),
        "RAVEN_ARCHS": " ".join(names),
        "RAVEN_OPS": " ".join(path.stem for path in ops),
        "RAVEN_FLAGS": " ".join(flags),
    }
    text = (ROOT / "csrc/build_info.cu.in").read_text()
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    if not info.exists() or info.read_text() != text:
        info.write_text(text)
    units = [Unit(source, build / f"{source.stem}.o") for source in [*ops, info]]
    units.append(Unit(Path("csrc/compat.cpp"), build / "compat.o"))
    known = {unit.object.stem for unit in units} | {path.stem for path in sources()}
    gone = {path.stem for path in build.glob("*.o")} - known
    for name in gone:  # ops that were renamed: nothing may report on them
        for path in build.glob(f"{name}.*"):
            path.unlink()
    largest_first = sorted(units, key=lambda unit: -(ROOT / unit.source).stat().st_size)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda unit: compile_unit(unit, nvcc, torch, flags), largest_first))  # raises what they raise
    return units


def link(units: list[Unit], output: Path, build: Path, nvcc: Nvcc) -> None:
    """One shared library, linked without PyTorch, which asks of the machine's libraries only what old ones have.

    With ``RAVEN_BUILD_PORTABLE=1`` it is an error when that fails.
    """
    stubs = build / "stubs"
    for name in FLAGS["torch_libraries"]:
        portable.stub(stubs / f"lib{name}.so", {}, portable.soname(name))
    exports = build / "exports.map"
    exports.write_text("{ global: " + "".join(f"{name}; " for name in FLAGS["exports"]) + "local: *; };\n")
    command = [
        str(nvcc.path),
        *FLAGS["link"],
        f"-Xlinker=--version-script={exports}",
        *(str(unit.object) for unit in units),
        *(f"-L{folder}" for folder in (stubs, *nvcc.library_dirs)),
        *(f"-l{name}" for name in FLAGS["torch_libraries"]),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f"new-{output.name}")
    _run([*command, "-o", str(fresh)])
    older = portable.older_stubs(fresh, stubs, FLAGS["newest_symbols"])
    if older:
        _run([*command, *(f"-l:{path.name}" for path in older), "-o", str(fresh)])
    newer = portable.too_new(fresh, FLAGS["newest_symbols"])
    if newer and portable_wanted():
        fresh.unlink()
        raise BuildError(
            f"RAVEN_BUILD_PORTABLE=1: the library would ask for {newer}, expected nothing newer than "
            f"{FLAGS['newest_symbols']}: build with an older GCC, or define them in csrc/compat.cpp"
        )
    os.replace(fresh, output)  # never half a library, and never new bytes under a process that has it open


def build(output: Path = LIBRARY, folder: Path | None = None, ops: list[Path] | None = None) -> list[Unit]:
    """Build the library, in the repository as the current folder; raises ``BuildError`` with the fix in its message."""
    names, nvcc, torch = archs(), find_nvcc(), find_torch()
    if shutil.which(portable.COMPILER) is None:
        raise BuildError(
            f"{portable.COMPILER}: found none, and nvcc needs it: install GCC, or name one in NVCC_CCBIN. {NO_CUDA}"
        )
    folder = folder or build_folder()
    units = compile_all(folder, names, nvcc, torch, ops)
    link(units, output, folder, nvcc)
    return units


def describe() -> dict[str, object]:
    """The tools of `build` for CMake, which takes the flags from csrc/flags.json itself."""
    names, nvcc, torch = archs(), find_nvcc(), find_torch()
    return {
        "version": package_version(),
        "archs": " ".join(names),
        "nvcc": str(nvcc.path),
        "library_dirs": nvcc.library_dirs,
        "torch_include": torch.include,
    }


def build_folder() -> Path:
    """Where objects are kept: ``RAVEN_CUDA_BUILD_DIR``, or build/cuda."""
    return Path(os.environ.get("RAVEN_CUDA_BUILD_DIR", "build/cuda"))


def portable_wanted() -> bool:
    """Whether the wheel is to run on other machines: no host module, the platform tag of ``newest_symbols``."""
    return os.environ.get("RAVEN_BUILD_PORTABLE") == "1"


def package_version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "raven/__init__.py").read_text())[1]


def platform_tag() -> str:
    """The platform that a wheel claims when nothing newer than ``newest_symbols`` is asked for."""
    return f"{FLAGS['platform']}_{platform.machine()}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _digest(path: Path) -> str:
    return hashlib.sha256((ROOT / path).read_bytes()).hexdigest()


def _own_files(rule: str) -> list[Path]:
    """The files of this repository in a rule for make, relative to the root."""
    paths = {(ROOT / name).resolve() for name in rule.replace("\\\n", " ").partition(": ")[2].split()}
    return sorted(path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT / "csrc"))


def _up_to_date(unit: Unit, key: str) -> bool:
    if not all(path.exists() for path in (unit.object, unit.log, unit.ptx, unit.record)):
        return False
    record = json.loads(unit.record.read_text())
    files = {Path(name): digest for name, digest in record["files"].items()}
    if record["key"] != key or record["source"] != _digest(unit.source):
        return False
    return all((ROOT / path).exists() and _digest(path) == d for path, d in files.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library, relative to the repository")
    parser.add_argument("--ops", help="comma-separated: only these of csrc/ops")
    parser.add_argument("--describe", action="store_true", help="only say, as JSON, what it would be built with")
    args = parser.parse_args()
    ops = [Path(f"csrc/ops/{name}.cu") for name in args.ops.split(",")] if args.ops else None
    os.chdir(ROOT)
    try:
        if args.describe:
            print(json.dumps(describe()))
            return 0
        units = build(args.output, ops=ops)
    except BuildError as error:
        print(f"raven: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(units)} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
