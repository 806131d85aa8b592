"""Training steps at Wan2.1-1.3B size with random weights: 480x832, 81 frames in chunks of 3 latent frames, bfloat16.

The repacked step (60,840 tokens) with bfloat16 weights and gradients; one RAVEN iteration with a teacher of the same
size and float32 masters under student and critic; one CM-GRPO update of 4 trajectories. Rates count useful operations
alone: what checkpointing recomputes is not among them. The rows of "cuda" use Hopper's kernels where an op has one and
Triton's elsewhere. A row is refused unless a slice of two blocks has as small errors as the reference backend has in
bfloat16, and everything that the full size computes is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from harness import DEVICE
from wan_step import (
    Inputs,
    Size,
    assert_finite,
    automatic,
    bidirectional_flops,
    median_of,
    peak_gib,
    random_model,
    random_text,
    repacked_flops,
    rollout_flops,
    slice_errors,
    with_backward,
)

from raven.models import WanConfig
from raven.train.base import BaseTrainer
from raven.train.config import DistillConfig, PolicyConfig
from raven.train.distill import RavenTrainer
from raven.train.phases import PhaseTimer, phase
from raven.train.policy import CMGRPOTrainer

pytestmark = pytest.mark.usefixtures("freed")
WAN = Size()
TINY = Size(WanConfig(32, 64, 1, 2, 2, 2, 16, 4, 3, (1, 4, 4)), (2, 8, 8), (1, 2, 2), 2)
REPEATS = 3 if DEVICE == "cuda" else 1
# The official code on an H200, measured earlier: forward and backward, checkpointing per block.
OFFICIAL = {"official_seconds": 5.54, "official_peak_gib": 26.5}


@cache
def checked_slice(backend: str, size: Size, mode: str) -> dict[str, float]:
    return slice_errors(size, mode)


def repacked(bench, name: str, size: Size, mode: str) -> None:
    backend = automatic(size)
    model, inputs, record = random_model(size.config, 0), Inputs(size), {}
    model.gradient_checkpointing = mode

    def once() -> PhaseTimer:
        with PhaseTimer(DEVICE) as timer:
            with phase("forward"):
                v = inputs.forward(model)
            with phase("backward"):
                v.backward(inputs.grad)
        record["velocity"] = v.detach()
        return timer

    def check() -> dict[str, float]:
        bench.progress(f"{name}, {backend}: slice against float64")
        errors = checked_slice(backend, size, mode)
        bench.progress(f"{name}, {backend}: {', '.join(f'{k} {v:.2e}' for k, v in errors.items())}; first full step")
        record["peak_gib_first"] = peak_gib(once)
        assert_finite("velocity", [record["velocity"]])
        assert_finite("gradients", [p.grad for p in model.parameters()])
        return errors

    def measure() -> float:
        # Gradients are there and are added to, as from the second micro-batch on: memory is at its worst.
        timers: list[PhaseTimer] = []
        record["peak_gib"] = peak_gib(lambda: timers.extend(once() for _ in range(REPEATS)))
        record["phases_ms"], record["ms"] = phases_of(timers)
        peak = "" if record["peak_gib"] is None else f", {record['peak_gib']:.1f} GiB"
        bench.progress(f"{name}, {backend}: {record['ms']:.0f} ms{peak}")
        return record["ms"]

    bench.row(
        op="step",
        case=name,
        direction="forward+backward",
        backend=backend,
        check=check,
        measure=measure,
        work=with_backward(repacked_flops(size)),
        unit="TFLOP/s",
        extra=lambda: described(record) | (OFFICIAL if size is WAN else {}),
    )


def phases_of(timers: list[PhaseTimer]) -> tuple[dict[str, float], float]:
    """Phases (with what lies between them) and milliseconds of the step in the middle."""
    middle = median_of([{"ms": timer.total_ms(), "timer": timer} for timer in timers])
    phases, ms = middle["timer"].phases_ms(), middle["ms"]
    return {**phases, "between": max(0.0, ms - sum(phases.values()))}, ms


def described(record: dict) -> dict[str, object]:
    """What the targets and the table of phases read."""
    wanted = {key: record.get(key) for key in ("phases_ms", "peak_gib", "peak_gib_first")}
    return {"seconds": record["ms"] / 1e3} | {key: value for key, value in wanted.items() if value is not None}


def update(bench, name: str, size: Size, make: Callable[[Size], BaseTrainer], work: float, repeats: int) -> None:
    """A row of whole trainer steps: the first one is checked, the following ones are measured."""
    backend, record = automatic(size), {}

    def check() -> dict[str, float]:
        bench.progress(f"{name}, {backend}: slice against float64, then models and a first step")
        errors = checked_slice(backend, size, "selective")
        trainer = record["trainer"] = make(size)
        before = {key: masters.parameters[-2].detach().clone() for key, masters in trainer.masters.items()}
        average = trainer.averages["student"].average[-2].clone()
        record["metrics"] = trainer.step()
        values = {key: float(value) for key, value in record["metrics"].items()}
        assert_finite("metrics", [torch.tensor(list(values.values()))])
        for key, masters in trainer.masters.items():
            assert values[f"{key}_norm"] > 0, f"{key}: gradient norm 0"
            assert_finite(f"weights of {key}", list(trainer.modules[key].parameters()))
            moved = masters.parameters[-2].detach() - before[key]
            assert_finite(f"update of {key}", [moved])
        assert_finite("update of the average", [trainer.averages["student"].average[-2] - average])
        bench.progress(f"{name}, {backend}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
        return errors

    def measure() -> float:
        timers: list[PhaseTimer] = []

        def steps() -> None:
            for i in range(repeats):
                with PhaseTimer(DEVICE) as timer:
                    record["trainer"].step()
                timers.append(timer)
                bench.progress(f"{name}, {backend}: step {i + 1} of {repeats}, {timer.total_ms() / 1e3:.2f} s")

        record["peak_gib"] = peak_gib(steps)
        record["phases_ms"], record["ms"] = phases_of(timers)
        return record["ms"]

    bench.row(
        op="step",
        case=name,
        direction="update",
        backend=backend,
        check=check,
        measure=measure,
        work=work,
        unit="TFLOP/s",
        extra=lambda: described(record),
    )


SETTINGS = {"master_weights": True, "checkpointing": "selective"}


def prompts_of(size: Size):
    """Random texts in place of prompts."""

    def prompts(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        return ["random"] * count, random_text(size.config, count, generator).to(DEVICE)

    return prompts


def raven_trainer(size: Size) -> RavenTrainer:
    """One sample a step, with a student update at every step. The critic starts as a copy of the teacher."""
    sizes = {"latent_shape": size.latent, "chunk_frames": size.chunks, "levels": size.steps}
    config = DistillConfig(accumulation=1, ttur=1, **sizes, **SETTINGS)
    student = random_model(size.config, 0, torch.float32)
    return RavenTrainer(student, random_model(size.config, 1), prompts_of(size), config)


def raven_flops(size: Size) -> float:
    """Rollout; the critic's step; the student's, with one score of the critic and two of the teacher."""
    critic = bidirectional_flops(size)
    trained = with_backward(critic) + with_backward(repacked_flops(size))
    return rollout_flops(size) + trained + 3 * sum(critic)


def policy_trainer(size: Size) -> CMGRPOTrainer:
    """Four trajectories of one prompt, replayed one by one; the reward is the mean of a video's latents."""
    sizes = {"latent_shape": size.latent, "chunk_frames": size.chunks, "levels": size.steps}
    config = PolicyConfig(group=4, prompts=1, micro_batch=1, **sizes, **SETTINGS)
    student = random_model(size.config, 0, torch.float32)
    return CMGRPOTrainer(student, lambda video, asked: {"mean": video.mean(dim=(1, 2, 3, 4))}, prompts_of(size), config)


def policy_flops(size: Size) -> float:
    """Four rollouts and four replays."""
    return 4 * (rollout_flops(size) + with_backward(repacked_flops(size)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_repacked(bench, mode):
    repacked(bench, f"repacked-{WAN.layout.length}-{mode}", WAN, mode)


@pytest.mark.gpu
def test_raven_iteration(bench):
    update(bench, "raven-iteration", WAN, raven_trainer, raven_flops(WAN), repeats=2)


@pytest.mark.gpu
def test_policy_update(bench):
    update(bench, "cm-grpo-4-trajectories", WAN, policy_trainer, policy_flops(WAN), repeats=1)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_smoke_repacked(bench, mode):
    """Small enough for any machine, and the same code path as the others."""
    repacked(bench, f"repacked-smoke-{mode}", TINY, mode)


def test_smoke_raven_iteration(bench):
    update(bench, "raven-smoke", TINY, raven_trainer, raven_flops(TINY), repeats=1)


def test_smoke_policy_update(bench):
    update(bench, "cm-grpo-smoke", TINY, policy_trainer, policy_flops(TINY), repeats=1)
