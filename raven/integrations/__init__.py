"""Models of other libraries around the transformer; each is imported only when it is used (``[wan]``)."""

from __future__ import annotations

import importlib
from os import PathLike
from pathlib import Path
from types import ModuleType

INSTALL_HINT = "pip install raven-kernels[wan]"


def need(package: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise ``ModuleNotFoundError`` that names what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(f"{purpose} needs {package}: {INSTALL_HINT}", name=package) from error


def part_of(folder: str | PathLike[str], name: str) -> Path:
    """The folder ``name`` of a model in diffusers' layout; ``FileNotFoundError`` that names it when it is not there."""
    path = Path(folder) / name
    if not path.is_dir():
        raise FileNotFoundError(f"wan: got {folder}, expected a folder in diffusers' layout, with {name}/ in it")
    return path
