"""What ``raven env`` prints: versions, GPUs, the planner, and for each op which backend runs and why not the others."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

import raven
from raven import backends, native, planner

# What the extras bring, and numpy and triton.
PACKAGES = (
    "numpy", "triton", "safetensors", "tqdm", "matplotlib", "pillow", "imageio-ffmpeg", "diffusers",
    "transformers", "accelerate", "cupy-cuda12x", "cupy-cuda13x",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """The facts, ready for JSON.

    Keys: ``raven python platform torch cuda`` (versions), ``packages`` (name to version or ``None``), ``gpus`` (list of
    ``index name capability memory_gib``), ``no_gpu`` (why there is none, or ``None``), ``planner``, ``cuda_library``
    (`raven.build_config`), ``backend`` (the one asked for, or ``None``), ``ops`` (device to op to ``chosen``,
    ``reasons`` and ``remarks``).
    Raises ``ValueError`` when ``RAVEN_BACKEND`` names no backend.
    """
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    devices = ["cpu", *(f"cuda:{gpu['index']}" for gpu in gpus)]
    return {
        "raven": raven.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": gpus,
        "no_gpu": None if gpus else _why_no_gpu(),
        "planner": planner.description(),
        "cuda_library": native.build_config(),
        "backend": backends.get_backend(),
        "ops": {device: _ops_on(device) for device in devices},
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of ``collect`` as text for people."""
    found = {name: version for name, version in facts["packages"].items() if version}
    missing = [name for name, version in facts["packages"].items() if not version]
    lines = [
        f"raven {facts['raven']}, Python {facts['python']}, {facts['platform']}",
        f"torch {facts['torch']}, CUDA {facts['cuda'] or 'not built in'}",
        "packages: " + ", ".join(f"{name} {version}" for name, version in found.items()),
    ]
    if missing:
        lines.append("not installed: " + ", ".join(missing))
    lines += [facts["planner"], _cuda_library(facts["cuda_library"])]
    for gpu in facts["gpus"]:
        lines.append(f"GPU {gpu['index']}: {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
    if facts["no_gpu"]:
        lines.append(f"no GPU: {facts['no_gpu']}")
    asked = facts["backend"]
    lines.append(f"backend asked for: {asked}" if asked else "backend: chosen automatically")
    for device, ops in facts["ops"].items():
        lines += ["", f"ops on {device}"]
        for op, choice in ops.items():
            explanation = backends.Explanation(op, **choice)
            lines += [f"  {line}" for line in str(explanation).splitlines()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``raven env``."""
    parser = argparse.ArgumentParser(prog="raven env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the same for programs")
    args = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else describe(facts))
    return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
    }


def _cuda_library(built: dict[str, Any]) -> str:
    if built["library"] is None:
        return built["unavailable"]
    text = f"CUDA library: {built['library']}"
    if "nvcc" in built:
        text += (
            f", raven {built['raven']}, sm_{' sm_'.join(built['archs'])}, nvcc {built['nvcc']}, "
            f"{built['host_compiler']}, for torch {built['torch_target_version']} and newer"
        )
    return text + (f"; not used: {built['unavailable']}" if built["unavailable"] else "")


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "torch sees no CUDA device (no driver, or none made visible)"


def _ops_on(device: str) -> dict[str, dict[str, Any]]:
    """What would run in the dtype and head size of the Wan models."""
    heads = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=device)  # [B, L, H, D]
    choices = {}
    for op in backends.operators():
        explanation = backends.explain(op, heads, heads, heads)
        choices[op] = {name: getattr(explanation, name) for name in ("chosen", "reasons", "remarks")}
    return choices
