"""Checkpoints of a training run: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raven.errors import DAMAGED

FORMAT = "raven-training-2"  # 1: queries, keys and values of a block were three parameters


def save_atomic(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``state`` to ``path`` so that a crash or a full disk leaves the earlier file as it was.

    The file is written beside its destination, flushed to the disk, and renamed. Raises ``OSError`` naming the file
    when it cannot be written; what was written of it is removed.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        partial.unlink(missing_ok=True)
        kept = "the earlier checkpoint is intact" if path.exists() else "there is no earlier checkpoint"
        code = error.errno if isinstance(error, OSError) else None
        raise OSError(code, f"could not write the checkpoint ({error}); {kept}", str(path)) from error


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ``save_atomic``. Raises ``ValueError`` for a file that is damaged or something else."""
    advice = f"{path} is not a readable raven training checkpoint; delete it to start from the beginning"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except DAMAGED as error:
        raise ValueError(f"{advice} ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(advice)
    del state["format"]
    return state


def check_same_tensors(what: str, saved: Any, current: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` unless ``saved`` has the names and shapes of ``current``; done before any is replaced."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{what}: got {type(saved).__name__} in place of saved tensors, expected a dict of them")
    if differing := sorted(saved.keys() ^ current.keys(), key=str):
        given = "more" if differing[0] in saved else "no"
        raise ValueError(f"{what}: got {given} {differing[0]!r}, expected the {len(current)} tensors of this model")
    for name, tensor in current.items():
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in (saved[name], tensor)]
        if shapes[0] != shapes[1]:  # none: a module's extra state, which is its own affair
            pairs = zip(shapes, (saved[name], tensor), strict=True)
            got, expected = (type(x).__name__ if shape is None else shape for shape, x in pairs)
            raise ValueError(f"{what}: got {name} {got}, expected {expected}")


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ``ValueError`` listing every setting of a saved run that differs from the current ones."""
    differing = [
        f"{key} {saved.get(key)!r} -> {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ValueError(f"config: the run to be resumed had other settings ({'; '.join(differing)})")
