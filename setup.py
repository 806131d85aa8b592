"""Packages and the optional host module; everything else is declared in pyproject.toml."""

import os
import sys

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError


class OptionalBuild(build_ext):
    """A machine without a C++ compiler gets a working install: raven.planner has an equal Python path."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            say_skipped(str(error))


def say_skipped(reason):
    print(f"raven: the host module raven._C is not built ({reason}); its Python path is used.", file=sys.stderr)


def host_module():
    if os.environ.get("RAVEN_BUILD_NO_EXT") == "1":
        say_skipped("RAVEN_BUILD_NO_EXT=1")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        say_skipped("pybind11 is not installed")
        return []
    sources = ["csrc/host/planner.cpp", "csrc/host/module.cpp"]
    include = ["csrc/include"]
    depends = ["csrc/include/raven/planner.h"]
    # optional: an editable install copies the module next to the sources, and must not insist on finding it
    return [Pybind11Extension("raven._C", sources, include_dirs=include, depends=depends, cxx_std=17, optional=True)]


setup(
    # The Triton kernels live at the top level and are installed inside raven: a top-level package named "kernels"
    # would shadow the one that diffusers imports.
    packages=[*find_packages(include=["raven", "raven.*"]), "raven.kernels"],
    package_dir={"raven.kernels": "kernels"},
    package_data={"raven": ["py.typed"], "raven.demo": ["assets/*"], "raven.models": ["*.json"]},
    include_package_data=False,
    ext_modules=host_module(),
    cmdclass={"build_ext": OptionalBuild},
)
