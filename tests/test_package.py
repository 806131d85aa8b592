"""What is installed: names, versions, the few hard requirements, and the files of a wheel."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import raven

ROOT = Path(__file__).parents[1]

IMPORT_WITH_TORCH_AND_NUMPY_ALONE = """
import importlib.metadata as metadata, re, sys

def closure(name, found):
    if name in found:
        return found
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return found
    found.add(name)
    for line in requires:
        if "extra ==" not in line:
            closure(re.match(r"[A-Za-z0-9._-]+", line)[0].lower().replace("_", "-"), found)
    return found

allowed = closure("torch", set()) | closure("numpy", set()) | {"raven-kernels"}
allowed.discard("triton")
blocked = {
    module
    for module, names in metadata.packages_distributions().items()
    if not allowed & {name.lower().replace("_", "-") for name in names}
}
assert {"triton", "tqdm", "safetensors"} <= blocked and not {"torch", "numpy", "raven"} & blocked

class Finder:
    # All finders in one, which does not know the blocked modules.
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [Finder(list(sys.meta_path))]
import raven, raven.ops, raven.layout, raven.cache, raven.planner, raven.schedule, raven.env
import torch
from raven.layout import ChunkLayout
layout = ChunkLayout.repacked((2, 2), tokens_per_frame=4)
q = torch.ones(1, layout.length, 2, 8)
assert torch.allclose(raven.ops.chunk_attention(q, q, q, layout), q)
"""


def test_version_has_one_source():
    assert importlib.metadata.version("raven-kernels") == raven.__version__


def test_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="raven")
    assert command.value == "raven.cli:main"


def test_requirements():
    requires = importlib.metadata.requires("raven-kernels")
    base = [line for line in requires if "extra ==" not in line]
    assert sorted(line.split(";")[0].strip() for line in base) == ["numpy", "torch>=2.10", "triton>=3.6"]
    extras = importlib.metadata.metadata("raven-kernels").get_all("Provides-Extra")
    assert {"demo", "train", "test", "bench", "cuda12", "cuda13", "wan"} == set(extras)


def test_imports_with_torch_and_numpy_alone():
    environment = {**os.environ, "RAVEN_BACKEND": "reference"}
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IMPORT_WITH_TORCH_AND_NUMPY_ALONE],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_every_package_is_declared():
    """A folder without __init__.py would be left out of the wheel without a word."""
    folders = {path.parent for path in (ROOT / "raven").rglob("*.py")}
    without = {f.relative_to(ROOT).as_posix() for f in folders if not (f / "__init__.py").exists()}
    assert without - {"raven/kernels"} == set()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "raven" / "kernels") == "../kernels"


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory):
    """Names in a wheel built from a copy of the checkout on a machine whose C++ compiler fails, and what was said."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("raven", "kernels", "csrc", "tests", "bench"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    result = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("raven_kernels-*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), result.stderr


def test_wheel_holds_raven_and_nothing_else(wheel_without_compiler):
    names, _ = wheel_without_compiler
    top = {name.split("/")[0] for name in names}
    assert top == {"raven", f"raven_kernels-{raven.__version__}.dist-info"}
    python = {p.relative_to(ROOT).as_posix() for p in (ROOT / "raven").rglob("*.py") if "__pycache__" not in p.parts}
    kernels = {f"raven/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels
    assert {name for name in names if name.endswith(".py")} == python | kernels


def test_wheel_holds_the_data_files(wheel_without_compiler):
    names, _ = wheel_without_compiler
    data = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "raven").rglob("*")
        if p.is_file() and p.suffix not in {".py", ".pyc", ".so"}
    }
    assert data <= names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_install_without_a_compiler_says_so(wheel_without_compiler):
    names, said = wheel_without_compiler
    assert not any(name.endswith(".so") for name in names)
    assert said.count("raven._C is not built") == 1
