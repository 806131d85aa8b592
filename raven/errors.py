"""Errors and the argument checks shared by every public entry point."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

# What torch.load raises for a damaged file: it takes the pickled instructions in it at their word.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run these arguments; the message says why."""


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | str | None]) -> None:
    """Raise ``ValueError`` unless ``tensor.shape`` matches ``shape``, ``TypeError`` for something that is no tensor.

    An ``int`` must match exactly; a string is a letter for the message (any size); ``None`` is any size.
    """
    _check_tensor(name, tensor)
    sizes = tuple(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        not isinstance(want, int) or got == want for got, want in zip(sizes, shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: got shape {sizes}, expected [{want}]")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def check_dtype(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ``TypeError`` unless ``tensor`` is one and its dtype one of ``dtypes``."""
    _check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        takes = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {str(tensor.dtype).removeprefix('torch.')}, expected {takes}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ``ValueError`` for a NaN or an infinity in a tensor. Waits for a GPU, so not for what runs in a loop."""
    count = int((~tensor.detach().isfinite()).sum())
    if count:
        raise ValueError(f"{name}: got {count} of {tensor.numel()} values NaN or infinite, expected finite numbers")


def check_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ``ValueError`` unless both tensors live on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {other.device} like {other_name}")


def check_no_tangent(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise ``NotImplementedError`` for forward-mode gradients: custom ops of PyTorch would drop them silently."""
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{op}: forward-mode derivatives are not available")


def check_level(name: str, level: torch.Tensor | float, *, low: float = 0.0, exclusive: bool = False) -> None:
    """Raise ``ValueError`` unless every noise level lies in ``[low, 1]`` (``(low, 1]`` when exclusive).

    Levels on a GPU are checked there without a copy only when they are Python numbers; a CUDA tensor is not
    read back, because that would stall the stream.
    """
    if isinstance(level, torch.Tensor):
        if level.is_cuda or level.is_meta or torch.compiler.is_compiling():
            return
        values = level.detach()
        bad = ~((values > low if exclusive else values >= low) & (values <= 1))
        if not bool(bad.any()):
            return
        got: object = values[bad].reshape(-1)[0].item()
    else:
        if (level > low if exclusive else level >= low) and level <= 1:
            return
        got = level
    bracket = "(" if exclusive else "["
    raise ValueError(f"{name}: got noise level {got}, expected a value in {bracket}{low:g}, 1]")
