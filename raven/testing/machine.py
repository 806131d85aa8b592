"""Where a measurement was made."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

import raven
from raven.backends import triton_version


def describe_machine(device: str) -> dict[str, Any]:
    """``gpu`` (name of the current one for ``"cuda"``, else ``None``), ``cpu``, ``date`` (UTC) and ``versions``."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "raven": raven.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton_version(),
        },
    }
