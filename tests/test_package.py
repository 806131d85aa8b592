"""What is installed: names, versions, the few hard requirements, and the files of a wheel."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

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
    assert {"build-cuda", "demo", "train", "test", "bench", "cuda12", "cuda13", "wan"} == set(extras)


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
def checkout(tmp_path_factory):
    """A copy of what a wheel is built from."""
    source = tmp_path_factory.mktemp("source")
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("raven", "kernels", "csrc", "tests", "bench"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def build_wheel(checkout, out, **environment):
    """What ``pip wheel`` does, without a new environment."""
    pytest.importorskip("setuptools", minversion="77")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    return subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel_without_compiler(checkout, tmp_path_factory):
    """Names in a wheel built on a machine whose C++ compiler fails, and what was said."""
    out = tmp_path_factory.mktemp("wheel")
    result = build_wheel(checkout, out, CC="false", CXX="false", RAVEN_BUILD_NO_CUDA="1")
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("raven_kernels-*.whl")
    return set(zipfile.ZipFile(wheel).namelist()), result.stderr


@pytest.fixture(scope="module")
def portable_wheel(checkout, tmp_path_factory):
    """The wheel of ``make wheel``, from objects that were compiled before."""
    out = tmp_path_factory.mktemp("portable")
    objects = str(ROOT / "build/cuda")
    result = build_wheel(checkout, out, RAVEN_BUILD_PORTABLE="1", RAVEN_CUDA_BUILD_DIR=objects)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("raven_kernels-*.whl")
    return wheel


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
    assert said.count("the CUDA library is not built (RAVEN_BUILD_NO_CUDA=1)") == 1


def test_cuda_library_is_not_left_out_in_silence(checkout, tmp_path):
    """A wrong architecture, and an nvcc that is not there: the message has the fix, and no wheel comes out.

    No host compiler works, so that none spends ten seconds on the host module, which may be left out.
    """
    for environment, message in (
        ({"RAVEN_CUDA_ARCHS": "80"}, "RAVEN_CUDA_ARCHS: got '80', expected 90a (Hopper"),
        ({"CUDACXX": "/nowhere/nvcc"}, "CUDACXX: got '/nowhere/nvcc', expected the path of nvcc 13.0 or newer"),
    ):
        result = build_wheel(checkout, tmp_path, CC="false", CXX="false", **environment)
        assert result.returncode != 0 and not list(tmp_path.iterdir())
        assert f"raven: {message}" in result.stderr and "RAVEN_BUILD_NO_CUDA=1 installs without" in result.stderr


@pytest.mark.cuda_build
def test_one_wheel_for_every_python(portable_wheel, wheel_without_compiler):
    assert portable_wheel.name == f"raven_kernels-{raven.__version__}-py3-none-manylinux_2_28_{platform.machine()}.whl"
    names = set(zipfile.ZipFile(portable_wheel).namelist())
    assert names == wheel_without_compiler[0] | {"raven/libraven_cuda.so"}
    assert "Root-Is-Purelib: false" in read_from(portable_wheel, "dist-info/WHEEL")


@pytest.mark.cuda_build
def test_an_installed_wheel_says_what_it_was_built_with(portable_wheel, tmp_path):
    zipfile.ZipFile(portable_wheel).extractall(tmp_path)
    code = "import json, raven; print(raven.__file__); print(json.dumps(raven.build_config()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    where, built = run.stdout.splitlines()
    assert where == str(tmp_path / "raven/__init__.py")
    built = json.loads(built)
    assert built["library"] == str(tmp_path / "raven/libraven_cuda.so")
    assert built["raven"] == raven.__version__ and built["archs"] == ["90a"]
    assert built["ops"] == sorted(path.stem for path in (ROOT / "csrc/ops").glob("*.cu"))
    assert built["torch_target_version"] == "2.10" and built["cuda_runtime"].startswith("13.")
    assert built["nvcc"].startswith("13.") and "-std=c++17" in built["flags"].split()
    assert re.search(r"\w+ \d+\.\d+", built["host_compiler"])
    if torch.version.cuda is None:
        assert built["unavailable"] == "this PyTorch was built without CUDA"


def read_from(wheel, end):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(end)]
    return archive.read(name).decode()
