"""The modules of bench/, which is no package, and stored results as they write them."""

import importlib.util
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def module_of(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def arguments(**changes):
    """Those of a row, with nothing to check and nothing to run."""
    row = {"op": "add", "case": "small", "direction": "forward", "backend": "reference", "unit": "TB/s"}
    return row | {"check": lambda: None, "run": lambda: None, "work": 1e3} | changes


def stored(**changes):
    row = {"op": "chunk_attention", "case": "repacked-60840", "direction": "forward", "backend": "triton"}
    row |= {"ms": 10.0, "rate": 660.0, "unit": "TFLOP/s", "roof": 750.0, "percent": 88.0, "timer": "events"}
    row |= {"peers": {"flex": 20.0, "cudnn": 8.0}} | changes
    versions = {"raven": "0.1.0", "torch": "2.11.0"}
    return {"gpu": "NVIDIA X", "date": "today", "versions": versions, "ceilings": {"copy_tb_per_s": 4.2}, "rows": [row]}
