"""From files to a training run and back: what ``raven distill`` and ``raven grpo`` have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch

from raven.checkpoint import load_model, save_checkpoint
from raven.models.config import WanConfig
from raven.models.wan import CausalWan
from raven.schedule import sampling_levels
from raven.train.config import Config, DistillConfig, PolicyConfig

AnyConfig = TypeVar("AnyConfig", bound=Config)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every training command takes."""
    parser.add_argument("--prompts", required=True, help="prompt embeddings (.safetensors, see raven.train.prompts)")
    parser.add_argument("--out", required=True, help="folder for checkpoints, metrics.jsonl and student.safetensors")
    parser.add_argument("--model-config", help="model config (.json), for weights that do not carry one")
    parser.add_argument("--settings", help="training settings (.json)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one setting, as JSON: --set batch=2"
    )
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument(
        "--device", help="cpu or cuda (default: cuda where there is one); with torchrun, one per process"
    )


def read_settings(kind: type[AnyConfig], path: str | None, pairs: list[str]) -> AnyConfig:
    """Settings from a JSON file, then ``name=value`` pairs (values as JSON, else as text) on top of it."""
    values = kind.from_json(path).to_dict() if path else {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"set: got {pair!r}, expected NAME=VALUE")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return kind.from_dict(values)


def load_trained(path: str, config: str | None, device: torch.device, dtype: torch.dtype) -> CausalWan:
    """Weights of a file on the training device."""
    return load_model(path, WanConfig.from_json(config) if config else None, device=device, dtype=dtype)


def save_student(path: str | PathLike[str], model: CausalWan, config: DistillConfig | PolicyConfig) -> Path:
    """Write a student with what ``raven generate`` has to know about how it was trained."""
    path = Path(path)
    trained = {
        "chunk_frames": config.chunk_frames[-1],
        "frames": config.frames,
        "latent_shape": list(config.latent_shape),
        "levels": sampling_levels(config.levels, config.shift).tolist(),
        "sink": config.sink,
        "window": config.window,
    }
    save_checkpoint(path, model, metadata={"raven": json.dumps(trained)})
    return path


def import_factory(name: str, what: str) -> Callable[..., Any]:
    """The callable ``module:attribute``; ``ValueError`` when there is none, ``TypeError`` for something else."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{what}: got {name!r}, expected MODULE:NAME")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}: got {name!r}, which cannot be imported ({error}), expected MODULE:NAME") from error
    if not callable(found):
        raise TypeError(f"{what}: got {name!r}, a {type(found).__name__}, expected something to call")
    return found
