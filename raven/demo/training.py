"""The four training stages of the demo: teacher, causal start, RAVEN, CM-GRPO; and their curves for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from raven.demo import sizes
from raven.models import CausalWan
from raven.rewards import ShapesReward
from raven.train.distill import RavenTrainer
from raven.train.loop import read_metrics, run
from raven.train.policy import CMGRPOTrainer
from raven.train.pretrain import StartTrainer, TeacherTrainer
from raven.train.prompts import WorldPrompts

if TYPE_CHECKING:
    from raven.demo.stages import Demo

LOG = "metrics.jsonl"
POINTS = 400  # of a curve in metrics.json and in the report


def _train(demo: Demo, name: str, trainer: Any, module: str) -> str:
    """Run a trainer in its folder (it resumes by itself) and keep the averaged model."""
    steps = trainer.config.steps
    run(
        trainer,
        steps,
        demo.folder / name,
        save_every=max(1, min(500, steps // 4)),
        progress=demo.progress,
        log_every=max(1, steps // POINTS),
        desc=name,
    )
    demo.save(name, trainer.averaged(module))
    # A resumable checkpoint is many times the model; the stage will not be resumed any more.
    (demo.folder / name / "checkpoint.pt").unlink()
    config = trainer.config
    batch = f"{config.prompts} x {config.group}" if name == "grpo" else f"{config.batch}"
    return f"{steps} steps of {batch} videos"


def _new_model(demo: Demo, seed: int) -> CausalWan:
    torch.manual_seed(seed)
    return CausalWan(demo.size.wan_config(demo.world.text_dim, demo.world.text_len)).to(demo.device)


def teacher(demo: Demo) -> str:
    """Train the bidirectional teacher on real videos of the world."""
    config = demo.size.teacher
    return _train(demo, "teacher", TeacherTrainer(_new_model(demo, config.seed), demo.world, config), "model")


def start(demo: Demo) -> str:
    """Train the causal start on real videos of the world, by teacher forcing."""
    config = demo.size.start
    if demo.size.start_from_teacher:
        model = demo.load("teacher").requires_grad_(True)
    else:
        model = _new_model(demo, config.seed)
    return _train(demo, "start", StartTrainer(model, demo.world, config), "model")


def raven(demo: Demo) -> str:
    """Distil a few-step student from the teacher, beginning at the causal start."""
    student = demo.load("start").requires_grad_(True)
    prompts = WorldPrompts(demo.world, demo.device)
    return _train(demo, "raven", RavenTrainer(student, demo.load("teacher"), prompts, demo.size.raven), "student")


def grpo(demo: Demo) -> str:
    """Improve the student with the rewards of the world."""
    student = demo.load("raven").requires_grad_(True)
    reward = ShapesReward(demo.world, sizes.CHUNK)
    prompts = WorldPrompts(demo.world, demo.device)
    trainer = CMGRPOTrainer(student, reward, prompts, demo.size.grpo, weights=demo.size.rewards)
    return _train(demo, "grpo", trainer, "student")


STAGES: dict[str, Callable[[Demo], str]] = {"teacher": teacher, "start": start, "raven": raven, "grpo": grpo}

_CURVES = (
    ("teacher", "loss", "Teacher: flow-matching loss", "step", "loss"),
    ("start", "loss", "Causal start: flow-matching loss", "step", "loss"),
    ("raven", "critic_loss", "RAVEN: loss of the critic", "step", "loss"),
    ("raven", "dmd_loss", "RAVEN: distribution-matching loss", "step", "loss"),
    ("raven", "gap", "RAVEN: distance of critic and teacher", "step", "mean |difference|"),
    ("grpo", "reward", "CM-GRPO: reward of the rollouts", "update", "weighted sum"),
    ("grpo", "reward/quality", "CM-GRPO: quality of the rollouts", "update", "quality"),
    ("grpo", "reward/semantic", "CM-GRPO: semantic of the rollouts", "update", "semantic"),
    ("grpo", "reward/dynamic", "CM-GRPO: dynamic of the rollouts", "update", "dynamic"),
)


def curves(demo: Demo) -> list[dict[str, Any]]:
    """Every recorded curve as plain values: title, css (colour), x, y and labels."""
    found = []
    for stage, key, title, x_label, y_label in _CURVES:
        points = [(r["step"], r[key]) for r in read_metrics(demo.folder / stage / LOG) if key in r]
        if points:
            x, y = (list(column) for column in zip(*points, strict=True))
            found.append({"title": title, "css": stage, "x": x, "y": y, "x_label": x_label, "y_label": y_label})
    return found
