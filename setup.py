"""Packages, the optional host module, and the CUDA library; everything else is declared in pyproject.toml.

Environment, read by csrc/build_cuda.py as well:
    RAVEN_CUDA_ARCHS      architectures of the CUDA library; default: ``default_archs`` of csrc/flags.json
    RAVEN_BUILD_NO_CUDA   1: without the CUDA library
    RAVEN_BUILD_NO_EXT    1: without the host module raven._C, whose Python twin is used
    RAVEN_BUILD_PORTABLE  1: for other machines and Pythons: no host module, and the wheel is tagged accordingly
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build_cuda  # noqa: E402


def say(text):
    print(f"raven: {text}", file=sys.stderr)


def say_skipped(reason):
    say(f"the host module raven._C is not built ({reason}); its Python path is used.")


def cuda_wanted():
    return sys.platform == "linux" and os.environ.get("RAVEN_BUILD_NO_CUDA") != "1"


class Build(build_ext):
    """The host module is optional: a machine without a C++ compiler gets a working install. The CUDA library is not:
    it is left out on demand alone, because an install that lacks it runs at another speed."""

    def run(self):
        if not self.inplace:  # what an earlier build with other settings left would be installed as well
            for library in (Path(self.build_lib) / "raven").glob("*.so"):
                library.unlink()
        super().run()
        if cuda_wanted():
            output = Path("" if self.inplace else self.build_lib) / build_cuda.LIBRARY
            try:
                build_cuda.build(output)
            except build_cuda.BuildError as error:
                raise SystemExit(f"raven: {error}") from None
        else:
            why = "RAVEN_BUILD_NO_CUDA=1" if sys.platform == "linux" else f"it needs Linux, this is {sys.platform}"
            say(f"the CUDA library is not built ({why}); Triton and PyTorch run instead.")

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            say_skipped(str(error))


class CompiledDistribution(Distribution):
    def has_ext_modules(self):
        return bool(self.ext_modules) or cuda_wanted()


class Wheel(bdist_wheel):
    """The CUDA library asks nothing of Python: without the host module one wheel serves all versions."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        if cuda_wanted() and not self.distribution.ext_modules:
            python, abi = "py3", "none"
            platform = build_cuda.platform_tag() if build_cuda.portable_wanted() else platform
        return python, abi, platform


def host_module():
    for name in ("RAVEN_BUILD_NO_EXT", "RAVEN_BUILD_PORTABLE"):
        if os.environ.get(name) == "1":
            say_skipped(f"{name}=1")
            return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say_skipped("pybind11 is not installed")
        return []
    sources = ["csrc/host/planner.cpp", "csrc/host/module.cpp"]
    include = ["csrc/include"]
    depends = ["csrc/include/raven/planner.h"]
    standard = build_cuda.FLAGS["cxx_standard"]
    # optional: an editable install copies the module next to the sources, and must not insist on finding it
    module = Pybind11Extension(
        "raven._C", sources, include_dirs=include, depends=depends, cxx_std=standard, optional=True
    )
    return [module]


def build_requirements():
    """PyTorch, for its headers, where a CUDA library can be built; a machine without nvcc is told before that."""
    if not cuda_wanted() or importlib.util.find_spec("torch"):
        return []
    try:
        build_cuda.find_nvcc()
    except build_cuda.BuildError:
        return []
    return ["torch>=2.10"]


setup(
    # The Triton kernels live at the top level and are installed inside raven: a top-level package named "kernels"
    # would shadow the one that diffusers imports.
    packages=[*find_packages(include=["raven", "raven.*"]), "raven.kernels"],
    package_dir={"raven.kernels": "kernels"},
    package_data={"raven": ["py.typed"], "raven.demo": ["assets/*"], "raven.models": ["*.json"]},
    include_package_data=False,
    ext_modules=host_module(),
    setup_requires=build_requirements(),
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    distclass=CompiledDistribution,
)
