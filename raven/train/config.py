"""Settings of the training loops. Defaults of ``DistillConfig`` and ``PolicyConfig`` are those of RAVEN
(arXiv 2605.15190) for Wan2.1-1.3B; small models want larger learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from raven.models.config import read_object

Self = TypeVar("Self", bound="Config")

HISTORIES = ("raven", "self_forcing")
METHODS = ("cm_grpo", "flow_grpo")
CHECKPOINTING = ("model", "none", "selective", "full")


# What a number has to be, whichever settings it belongs to: words for the message, and the condition.
_AT_LEAST_ZERO = ("expected at least 0", lambda v: v >= 0)
_POSITIVE = ("expected a positive number", lambda v: v > 0)
_SHARE = ("expected a number in [0, 1)", lambda v: 0 <= v < 1)
_RANGES = {
    **dict.fromkeys(("lr", "student_lr", "critic_lr", "final_lr", "eps", "weight_decay"), _AT_LEAST_ZERO),
    **dict.fromkeys(("warmup", "critic_first", "sink", "window", "kl", "pool"), _AT_LEAST_ZERO),
    **dict.fromkeys(("grad_clip", "shift", "advantage_clip", "clip", "scale", "noise_level"), _POSITIVE),
    **dict.fromkeys(("ema", "prompt_dropout"), _SHARE),
    "betas": ("expected two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v)),
}


_OPTIONAL_INTEGERS = ("window", "micro_batch")


def _is_number(value: Any, integer: bool = False) -> bool:
    return isinstance(value, int if integer else int | float) and not isinstance(value, bool)


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Raise ``TypeError`` unless a setting is of the kind of its default; ``None`` stands for an optional number."""
    if default is None:
        integer = name in _OPTIONAL_INTEGERS
        fits, kind = value is None or _is_number(value, integer), f"{'an integer' if integer else 'a number'} or None"
    elif isinstance(default, tuple):
        integer = isinstance(default[0], int)
        fits = isinstance(value, list | tuple) and all(_is_number(v, integer) for v in value)
        kind = "a list of integers" if integer else "a list of numbers"
    elif isinstance(default, float):
        fits, kind = _is_number(value), "a number"
    else:  # a bool is an int to isinstance, but no count
        fits, kind = (
            type(value) is type(default),
            {int: "an integer", bool: "true or false", str: "a text"}[type(default)],
        )
    if not fits:
        raise TypeError(f"{name}: got {value!r}, expected {kind}")


def _check_range(name: str, value: Any) -> None:
    """Raise ``ValueError`` for a number that is not finite (JSON has them here) or out of its setting's range."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name}: got {value!r}, expected finite numbers")
    if name in _RANGES and value is not None:
        want, holds = _RANGES[name]
        if not holds(value):
            raise ValueError(f"{name}: got {value!r}, {want}")


@dataclass(frozen=True)
class Config:
    """What every loop has: where chunks begin, the shape of a latent frame, the seed, the precision."""

    chunk_frames: tuple[int, ...] = (3,) * 7
    latent_shape: tuple[int, int, int] = (16, 60, 104)  # C, H, W
    seed: int = 0
    steps: int = 300
    amp: bool = True  # bfloat16 autocast of float32 weights on a GPU; float32 on a CPU
    master_weights: bool = False  # instead: bfloat16 weights, and float32 masters that the optimizer steps
    checkpointing: str = "model"  # what the backward pass recomputes; "model": as the models are set
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_kind(f.name, getattr(self, f.name), f.default)
            _check_range(f.name, getattr(self, f.name))
        for name in ("chunk_frames", "latent_shape", "betas"):
            if hasattr(self, name):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.chunk_frames or min(self.chunk_frames) < 1:
            raise ValueError(f"chunk_frames: got {self.chunk_frames}, expected at least one positive number of frames")
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            raise ValueError(f"latent_shape: got {self.latent_shape}, expected (C, H, W)")
        self._one_of("checkpointing", CHECKPOINTING)
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")

    @property
    def frames(self) -> int:
        """Latent frames of a training video."""
        return sum(self.chunk_frames)

    def _positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(values)}")

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """Build from plain values; an unknown key is a ``ValueError`` that names it."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"config key: got {key!r}, expected one of {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls: type[Self], path: str | PathLike[str]) -> Self:
        """Read a JSON object of settings."""
        return cls.from_dict(read_object(Path(path).read_bytes(), str(path)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Flow matching on real videos: the bidirectional teacher, or the causal start (teacher forcing)."""

    batch: int = 64
    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr left at the end of the cosine
    warmup: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    ema: float = 0.999
    shift: float = 5.0
    prompt_dropout: float = 0.1
    sink: int = 0
    window: int | None = None
    pool: int = 0  # videos rendered once and drawn from; 0 renders every batch anew
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("batch")


@dataclass(frozen=True)
class DistillConfig(Config):
    """RAVEN: distribution matching through repacked rollouts of the student."""

    batch: int = 1
    accumulation: int = 4
    levels: int = 4
    shift: float = 5.0
    student_lr: float = 2e-6
    critic_lr: float = 4e-7
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    ema: float = 0.9675
    ttur: int = 2  # the student is updated at every ttur-th step, the critic at every one
    critic_first: int = 0  # steps at the beginning that only train the critic
    rollout_every: int = 1  # a rollout serves this many consecutive steps
    guidance: float = 3.0
    alpha: float = -1.0
    per_chunk_norm: bool = False
    min_level: float = 0.02
    max_level: float = 0.98
    history: str = "raven"
    sink: int = 0
    window: int | None = None
    cuda_graph: bool = False  # each update as one CUDA graph; needs accumulation 1 and a single process

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("batch", "accumulation", "levels", "ttur", "rollout_every")
        self._one_of("history", HISTORIES)
        if self.ttur % self.rollout_every:
            raise ValueError(
                f"rollout_every: got {self.rollout_every}, expected a divisor of ttur = {self.ttur}, "
                "so that every rollout is the current student's"
            )
        if self.cuda_graph and self.accumulation > 1:
            raise ValueError(f"accumulation: got {self.accumulation} with cuda_graph, expected 1")
        if not 0 < self.min_level < self.max_level < 1:
            raise ValueError(
                f"min_level, max_level: got {self.min_level}, {self.max_level}, expected 0 < min < max < 1"
            )


@dataclass(frozen=True)
class PolicyConfig(Config):
    """CM-GRPO, and Flow-GRPO as the baseline."""

    steps: int = 160
    group: int = 4
    prompts: int = 1  # groups per update and rank
    micro_batch: int | None = None  # trajectories replayed at once; None: all
    levels: int = 4
    shift: float = 5.0
    lr: float = 5e-6
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-10
    weight_decay: float = 0.0
    warmup: int = 0
    ema: float = 0.9
    alpha: float = -1.0
    advantage_clip: float = 5.0
    scale: float = 100.0
    every_step: bool = False  # replay the whole grid of steps, not one random step per trajectory
    clip: float | None = None  # PPO ratio; None: REINFORCE
    updates_per_rollout: int = 1
    kl: float = 0.0
    method: str = "cm_grpo"
    noise_level: float = 0.7  # of Flow-GRPO's SDE
    sink: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("group", "prompts", "updates_per_rollout")
        self._one_of("method", METHODS)
        if self.levels < 2:
            raise ValueError(f"levels: got {self.levels}, expected at least 2 (the last step has no policy)")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch: got {self.micro_batch}, expected at least 1 or None")
        if self.updates_per_rollout > 1 and self.clip is None:
            raise ValueError("clip: got None with updates_per_rollout > 1, expected a positive range for the PPO ratio")
        if self.method == "flow_grpo" and self.clip is None:
            raise ValueError("clip: got None with method 'flow_grpo', expected a positive range such as 1e-4")
        if self.method == "flow_grpo" and self.kl > 0:
            raise ValueError(f"kl: got {self.kl} with method 'flow_grpo', expected 0 (or method 'cm_grpo')")
