"""The ops for arrays of other libraries: CuPy's, NumPy's, and anything else with ``__dlpack__``; nothing is copied.

    import cupy
    from raven import interop

    with cupy.cuda.Stream():
        out = interop.chunk_attention(q, k, v, layout)   # CuPy arrays in, a CuPy array out, on that stream

The functions here have the names and the arguments of their ops: attention, norm and rotary, append, log-density, step.
Arrays become tensors over the same memory, and results become arrays of the library that the first array is from
(tensors where that library has no ``from_dlpack``). CuPy arrays are read and written on CuPy's current stream of their
device (``ValueError`` for the per-thread default stream); other libraries are made to wait, or to be waited for, as
DLPack prescribes. Arrays have no gradient: `as_tensor` leads to autograd.

DLPack has bfloat16, and so has CuPy from version 14 on; NumPy and older versions of CuPy do not. With
``bfloat16_bits=True`` arrays of uint16 are taken as the bits of bfloat16 numbers, and bfloat16 results come back so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from raven import ops

# CUDA's names of two default streams. PyTorch would take 0 for "make a new stream".
LEGACY_STREAM = (0, 1)
PER_THREAD_STREAM = 2


def as_tensor(x: Any, *, bfloat16_bits: bool = False, name: str = "x") -> torch.Tensor:
    """A tensor over the memory of ``x``, any shape, on its device.

    Args:
        x: an object with ``__dlpack__``; a tensor is returned as it is.
        bfloat16_bits: take uint16 for the bits of bfloat16 numbers.
        name: how error messages call ``x``.

    Raises:
        TypeError: ``x`` has no ``__dlpack__``.
        ValueError: memory that a tensor cannot describe: a negative stride (``ascontiguousarray`` copies it), a dtype
            or byte order that DLPack or PyTorch lacks, a device that this PyTorch cannot reach.
    """
    if isinstance(x, torch.Tensor):
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name}: got {type(x).__name__}, expected an array with __dlpack__")
    strides = getattr(x, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):
        # PyTorch ends the process at one of these.
        raise ValueError(f"{name}: got strides {strides}, expected none that is negative (try ascontiguousarray)")
    try:
        tensor = torch.from_dlpack(x)
    except (BufferError, RuntimeError, AssertionError, TypeError, ValueError) as error:
        kind = f"{type(x).__module__}.{type(x).__name__} of {getattr(x, 'dtype', 'unknown dtype')}"
        raise ValueError(f"{name}: got {kind}, expected one that PyTorch can read: {error}") from error
    return tensor.view(torch.bfloat16) if bfloat16_bits and tensor.dtype == torch.uint16 else tensor


def as_array(tensor: torch.Tensor, like: Any, *, bfloat16_bits: bool = False) -> Any:
    """An array over the memory of ``tensor``, from the library of ``like``; the tensor itself if that cannot be.

    Args:
        tensor: any shape; it must not require a gradient.
        like: an array; its library is the one whose ``from_dlpack`` is called.
        bfloat16_bits: give bfloat16 as uint16.

    Raises:
        TypeError: the library has no such dtype (bfloat16, mostly).
    """
    from_dlpack = _from_dlpack(like)
    if from_dlpack is None:
        return tensor
    if bfloat16_bits and tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    try:
        return from_dlpack(tensor)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        library = type(like).__module__.partition(".")[0]
        dtype = str(tensor.dtype).removeprefix("torch.")
        hint = "; bfloat16_bits=True gives its bits as uint16" if tensor.dtype == torch.bfloat16 else ""
        raise TypeError(f"tensor: got {dtype}, expected a dtype that {library} has{hint}: {error}") from error


def _from_dlpack(like: Any) -> Callable[[torch.Tensor], Any] | None:
    """The standard's ``from_dlpack`` for the library of ``like``, if there is one."""
    if hasattr(like, "__array_namespace__"):
        return getattr(like.__array_namespace__(), "from_dlpack", None)
    library = sys.modules.get(type(like).__module__.partition(".")[0])
    return getattr(library, "from_dlpack", None)


def _is_array(x: Any) -> bool:
    return hasattr(x, "__dlpack__") and not isinstance(x, torch.Tensor)


def _current_stream(arrays: list[Any]) -> AbstractContextManager:
    """PyTorch works on CuPy's current stream inside, if there are CuPy arrays."""
    on_cupy = next((x for x in arrays if type(x).__module__.partition(".")[0] == "cupy"), None)
    if on_cupy is None or not torch.cuda.is_available():
        return nullcontext()
    device = torch.device("cuda", on_cupy.device.id)
    pointer = import_module("cupy").cuda.get_current_stream(device.index).ptr
    if pointer == PER_THREAD_STREAM:
        # One name for as many streams as threads: PyTorch would give memory that one still reads to another.
        raise ValueError(
            "stream: got CuPy's per-thread default stream, expected the null stream or a cupy.cuda.Stream()"
        )
    if pointer in LEGACY_STREAM:
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(pointer, device))


def _for_arrays(op: Callable) -> Callable:
    """``op`` with arrays for tensors, in and out."""
    names = tuple(signature(op).parameters)

    @functools.wraps(op)
    def run(*args: Any, bfloat16_bits: bool = False, **kwargs: Any) -> Any:
        arrays = [x for x in (*args, *kwargs.values()) if _is_array(x)]
        if not arrays:
            return op(*args, **kwargs)

        def inward(name: str, x: Any) -> Any:
            return as_tensor(x, bfloat16_bits=bfloat16_bits, name=name) if _is_array(x) else x

        with _current_stream(arrays), torch.no_grad():
            tensors = [inward(name, x) for name, x in zip(names, args, strict=False)]
            out = op(*tensors, **{name: inward(name, x) for name, x in kwargs.items()})
            several = out if isinstance(out, tuple) else (out,)
            results = tuple(as_array(x, arrays[0], bfloat16_bits=bfloat16_bits) for x in several)
            return results if isinstance(out, tuple) else results[0]

    return run


chunk_attention = _for_arrays(ops.chunk_attention)
consistency_step = _for_arrays(ops.consistency_step)
gaussian_log_prob = _for_arrays(ops.gaussian_log_prob)
kv_append = _for_arrays(ops.kv_append)
qk_norm_rope = _for_arrays(ops.qk_norm_rope)
