"""The compiled CUDA library ``libraven_cuda.so``: where it is, whether it can run, what it was built with.

Each op passes allocated outputs to ``torch.ops.raven_cuda.<op>``; shapes, dtypes and devices were checked before.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from functools import cache
from pathlib import Path
from typing import Any

import torch

import raven
from raven.backends import capability

LIBRARY = Path(__file__).with_name("libraven_cuda.so")
CAPABILITY = (9, 0)  # sm_90a code runs on no other
MARK = b"raven-build-config "  # before the JSON in the file, csrc/build_info.cu.in


@cache
def unavailable() -> str | None:
    """Load the library; why that is not possible, or ``None``."""
    if not LIBRARY.exists():
        return "the CUDA library is not installed (make cuda, or pip install without RAVEN_BUILD_NO_CUDA)"
    made_for = _compiled_in().get("raven", raven.__version__)
    if made_for != raven.__version__:
        return f"the CUDA library was built for raven {made_for}, and this is {raven.__version__}: build it again"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the CUDA library does not load: {error}"
    return _driver_too_old()


def _driver_too_old() -> str | None:
    """A library made by CUDA 13 needs a driver for CUDA 13.0 or any later version."""
    built = _compiled_in().get("cuda_runtime")
    if built is None:
        return None
    runs = ctypes.CDLL(str(LIBRARY)).raven_driver_version()
    if runs // 1000 >= built // 1000:
        return None
    return f"the driver runs CUDA {_dotted(runs)}, and the CUDA library needs {built // 1000}.0: update the driver"


def reason(*args: object) -> str | None:
    """Why the compiled kernels cannot run on these tensors, or ``None``."""
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if not arg.is_cuda:
            return f"the tensors are on {arg.device.type}"
        if capability(arg.device.index) != CAPABILITY:
            return f"compute capability {capability(arg.device.index)} is not {CAPABILITY}"
        if arg.dtype == torch.float64:
            return "float64 is only computed by the reference"
    return unavailable()


def build_config() -> dict[str, Any]:
    """What the CUDA library was built with, from the file itself: it is not loaded for that, and no GPU is needed.

    Always: ``library`` (its path; ``None`` when it is not installed) and ``unavailable`` (why it does not run here, or
    ``None``). With a library: ``raven`` ``nvcc`` ``host_compiler`` ``cuda_runtime`` ``torch_headers`` (versions),
    ``torch_target_version`` (the oldest PyTorch that it runs with), ``archs`` and ``ops`` (lists), ``flags`` (nvcc's).
    """
    found: dict[str, Any] = {"library": str(LIBRARY) if LIBRARY.exists() else None, "unavailable": unavailable()}
    compiled_in = _compiled_in()
    if compiled_in:
        target = int(compiled_in["torch_target_version"], 16)
        found |= compiled_in
        found["cuda_runtime"] = _dotted(compiled_in["cuda_runtime"])
        found["torch_target_version"] = f"{target >> 56}.{target >> 48 & 255}"
        found |= {name: compiled_in[name].split() for name in ("archs", "ops")}
    return found


@cache
def _compiled_in() -> dict[str, Any]:
    """The JSON in the library; empty without a library, or in one that was not built by csrc/build_cuda.py."""
    if not LIBRARY.exists():
        return {}
    with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(MARK)
        return {} if start < 0 else json.loads(content[start + len(MARK) : content.find(b"\0", start)])


def _dotted(version: int) -> str:
    """``13.0`` of CUDA's 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
