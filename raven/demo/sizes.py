"""The sizes of the demo: world, model, and how long each stage trains. Step counts are fixed, so a seed is a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from raven.models.config import WanConfig
from raven.train.config import Config, DistillConfig, PolicyConfig, PretrainConfig

CHUNK = 3
_STAGES = ("teacher", "start", "raven", "grpo")
LONGER = 3  # the long videos have this many times the frames of the training videos


@dataclass(frozen=True)
class Evaluation:
    """How much is sampled. ``teacher_long_prompts`` is smaller because attention over the whole video is dear."""

    prompts: int
    seeds: int
    shown: int
    teacher_steps: int
    teacher_long_prompts: int
    teacher_long_steps: int
    guidance: float = 3.0
    shift: float = 5.0


@dataclass(frozen=True)
class Size:
    """One size: ``world`` are the arguments of the world, ``model`` those of ``WanConfig`` that it leaves open."""

    name: str
    about: str
    world: dict[str, Any]
    model: dict[str, Any]
    teacher: PretrainConfig
    start: PretrainConfig
    raven: DistillConfig
    grpo: PolicyConfig
    evaluation: Evaluation
    window: int
    rewards: dict[str, float]
    start_from_teacher: bool = False  # the causal start begins at the teacher's weights instead of at random ones
    shipped: bool = False
    hidden: bool = False

    @property
    def frames(self) -> int:
        """Frames of a training video."""
        return self.raven.frames

    @property
    def chunks(self) -> int:
        """Chunks of a training video."""
        return len(self.raven.chunk_frames)

    @property
    def long_frames(self) -> int:
        """Frames of a long video."""
        return LONGER * self.frames

    def wan_config(self, text_dim: int, text_len: int) -> WanConfig:
        """The model of this size for a world's text encoding; its latents are the pixels."""
        return WanConfig(in_dim=3, out_dim=3, text_dim=text_dim, text_len=text_len, **self.model)

    def settings(self) -> dict[str, Any]:
        """All numbers as plain values, to recognise a folder of another run."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in plain.items():
            if isinstance(value, Config):
                plain[name] = value.to_dict()
            elif isinstance(value, Evaluation):
                plain[name] = dict(vars(value))
        return plain


def _frames(chunks: int, size: int) -> dict[str, Any]:
    return {"chunk_frames": (CHUNK,) * chunks, "latent_shape": (3, size, size)}


_TINY = _frames(4, 32)
_SMALL = _frames(4, 32)
_TEST = _frames(2, 16)

SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            about="32 x 32 pixels, 12 frames; 2 CPU cores, at most 5 minutes",
            world={"size": 32, "max_shapes": 2},
            model={
                "dim": 128,
                "ffn_dim": 256,
                "num_heads": 4,
                "num_layers": 4,
                "freq_dim": 128,
                "patch_size": (1, 4, 4),
            },
            teacher=PretrainConfig(steps=14000, batch=64, lr=2e-3, shift=3.0, pool=32768, **_TINY),
            start=PretrainConfig(steps=9000, batch=64, lr=2e-3, pool=32768, **_TINY),
            raven=DistillConfig(
                steps=120,
                batch=4,
                accumulation=1,
                rollout_every=2,
                critic_first=16,
                student_lr=1e-4,
                critic_lr=4e-4,
                ema=0.9,
                guidance=1.5,
                **_TINY,
            ),
            grpo=PolicyConfig(steps=12, group=8, prompts=2, lr=3e-6, ema=0.8, grad_clip=1.0, **_TINY),
            evaluation=Evaluation(
                prompts=6, seeds=3, shown=4, teacher_steps=16, teacher_long_prompts=2, teacher_long_steps=12
            ),
            window=3,
            rewards={"quality": 1.0, "semantic": 2.0, "dynamic": 0.5},
            shipped=True,
        ),
        Size(
            name="small",
            about="as tiny with a larger model; one GPU, everything from scratch, at most 10 minutes on an H200",
            world={"size": 32, "max_shapes": 2},
            model={
                "dim": 192,
                "ffn_dim": 768,
                "num_heads": 3,
                "num_layers": 6,
                "freq_dim": 256,
                "patch_size": (1, 4, 4),
            },
            teacher=PretrainConfig(steps=5500, batch=64, lr=1.5e-3, shift=3.0, pool=32768, **_SMALL),
            start=PretrainConfig(steps=1800, batch=64, lr=1e-3, pool=32768, **_SMALL),
            raven=DistillConfig(
                steps=600,
                batch=16,
                accumulation=1,
                rollout_every=2,
                cuda_graph=True,
                critic_first=20,
                student_lr=5e-5,
                critic_lr=2e-4,
                ema=0.97,
                guidance=2.0,
                **_SMALL,
            ),
            grpo=PolicyConfig(
                steps=150, group=16, prompts=16, every_step=True, lr=2e-5, ema=0.9, grad_clip=1.0, **_SMALL
            ),
            evaluation=Evaluation(
                prompts=32, seeds=4, shown=4, teacher_steps=32, teacher_long_prompts=16, teacher_long_steps=32
            ),
            window=3,
            rewards={"quality": 1.0, "semantic": 2.0, "dynamic": 0.5},
            start_from_teacher=True,
        ),
        Size(
            name="test",
            about="for the tests",
            world={"size": 16, "max_shapes": 1},
            model={"dim": 32, "ffn_dim": 32, "num_heads": 1, "num_layers": 1, "freq_dim": 32, "patch_size": (1, 8, 8)},
            teacher=PretrainConfig(steps=2, batch=2, warmup=1, **_TEST),
            start=PretrainConfig(steps=2, batch=2, warmup=1, **_TEST),
            raven=DistillConfig(
                steps=4, batch=2, accumulation=1, rollout_every=2, student_lr=1e-4, critic_lr=1e-4, **_TEST
            ),
            grpo=PolicyConfig(steps=2, group=2, prompts=1, lr=1e-4, **_TEST),
            evaluation=Evaluation(
                prompts=2, seeds=3, shown=1, teacher_steps=1, teacher_long_prompts=1, teacher_long_steps=1
            ),
            window=1,
            rewards={"quality": 1.0, "semantic": 2.0, "dynamic": 0.5},
            hidden=True,
        ),
    )
}


def find(name: str, seed: int = 0, changes: Sequence[str] = ()) -> Size:
    """The size of that name with its seed in every stage, and ``changes`` such as ``raven.steps=50``.

    Raises ``ValueError`` for an unknown size, stage or setting, and for values that the setting does not take.
    """
    if name not in SIZES:
        known = ", ".join(s.name for s in SIZES.values() if not s.hidden)
        raise ValueError(f"size: got {name!r}, expected one of {known}")
    size = SIZES[name]
    # Each stage has its own stream of random numbers.
    seeds = {stage: replace(getattr(size, stage), seed=10 * seed + i) for i, stage in enumerate(_STAGES)}
    size = replace(size, **seeds)
    for change in changes:
        size = _changed(size, change)
    if size.frames % CHUNK or any(frames != CHUNK for frames in size.raven.chunk_frames):
        raise ValueError(f"raven.chunk_frames: got {size.raven.chunk_frames}, expected chunks of {CHUNK} frames")
    return size


def _changed(size: Size, change: str) -> Size:
    target, equals, text = change.partition("=")
    stage, dot, setting = target.partition(".")
    parts = (*_STAGES, "evaluation")
    if not equals or not dot or stage not in parts:
        raise ValueError(f"set: got {change!r}, expected STAGE.SETTING=VALUE with a stage of {', '.join(parts)}")
    config = getattr(size, stage)
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    if setting not in known:
        raise ValueError(f"set: got {setting!r}, expected a setting of {stage}: {', '.join(known)}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    kind = type(known[setting])
    fits = (
        known[setting] is None or isinstance(value, kind) or (kind in (float, tuple) and isinstance(value, int | list))
    )
    if not fits:
        raise ValueError(f"set: got {text!r} for {target}, expected a {kind.__name__} such as {known[setting]!r}")
    return replace(size, **{stage: replace(config, **{setting: value})})
