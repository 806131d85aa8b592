"""CM-GRPO (RAVEN, arXiv 2605.15190): reinforcement of a few-step student by the rewards of its own rollouts.

``method="flow_grpo"`` (arXiv 2505.05470) is the baseline: Euler-Maruyama steps instead of consistency steps.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path

import torch

from raven.errors import check_shape
from raven.grpo import Transition, cm_grpo_loss, draw_steps, group_advantages, replay, sde_rollout, transition
from raven.rollout import Rollout, rollout
from raven.schedule import sampling_levels
from raven.train import distributed
from raven.train.base import BaseTrainer, freeze
from raven.train.config import PolicyConfig
from raven.train.loop import run
from raven.train.optim import set_lr, warmup_cosine
from raven.train.phases import phase
from raven.train.prompts import PromptFile, Prompts

# (video as decoded [B, ...], prompts) -> name -> [B], larger is better
Reward = Callable[[torch.Tensor, list[str]], Mapping[str, torch.Tensor]]


class CMGRPOTrainer(BaseTrainer):
    """One ``step``: roll out ``prompts`` groups of ``group`` videos, score them, and update the student.

    Args:
        student: causal few-step model, trained in place; ``averaged("student")`` is its moving average.
        reward: ``(video, prompts) -> {name: [B]}``.
        prompts: ``(count, generator) -> (prompts, context [count, text_len, text_dim])``.
        config: settings.
        weights: of the rewards, by name; default ``reward.weights`` if it has them, else 1 each.
        decode: latents ``[B, C, F, H, W]`` -> what the reward takes; default the latents themselves.
        reference: model that the KL term holds on to; default a copy of the student as it is now (when ``kl > 0``).
    """

    def __init__(
        self,
        student: torch.nn.Module,
        reward: Reward,
        prompts: Prompts,
        config: PolicyConfig,
        weights: Mapping[str, float] | None = None,
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        reference: torch.nn.Module | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(
                f"reward: got {type(reward).__name__}, expected a function (video, prompts) -> {{name: [B]}}"
            )
        super().__init__(config, next(student.parameters()).device)
        self.reward, self.prompts, self.decode = reward, prompts, decode
        self.weights = weights if weights is not None else getattr(reward, "weights", None)
        self.reference = None
        if config.kl > 0:
            self.reference = copy.deepcopy(student) if reference is None else reference
            distributed.broadcast_parameters(self.reference)
            freeze([self.reference])
        self.add_trained("student", student, config.lr, config.ema)
        self.levels = sampling_levels(config.levels, config.shift).tolist()
        self.kernel = "consistency" if config.method == "cm_grpo" else "euler_maruyama"

    def step(self) -> dict[str, float | torch.Tensor]:
        """One rollout and its updates; metrics ``reward`` (weighted sum), ``reward/<name>``, ``advantage`` (mean
        magnitude), ``loss``, ``student_norm`` and those of ``raven.grpo.cm_grpo_loss``."""
        config = self.config
        self.begin_step()
        set_lr(
            self.optimizers["student"],
            warmup_cosine(self.steps_done, config.steps, config.warmup, config.lr, final=1.0),
        )
        asked, context = self.prompts(config.prompts, self.host_generator)
        asked = [prompt for prompt in asked for _ in range(config.group)]
        context = context.repeat_interleave(config.group, dim=0)
        played = self._roll_out(context)
        with phase("rewards"):
            rewards = self._score(played.x_0, asked)
        rewards = {name: values.to(self.device) for name, values in rewards.items()}
        advantages = self.advantages(rewards, asked)
        metrics = {f"reward/{name}": value.float().mean() for name, value in rewards.items()}
        factors = self.weights or dict.fromkeys(rewards, 1.0)
        metrics["reward"] = sum(factors[name] * metrics[f"reward/{name}"] for name in rewards)
        metrics["advantage"] = advantages.abs().mean()
        metrics |= self._update(played, advantages, context)
        self.steps_done += 1
        return metrics

    @torch.no_grad()
    def _score(self, latents: torch.Tensor, asked: list[str]) -> Mapping[str, torch.Tensor]:
        rewards = self.reward(latents if self.decode is None else self.decode(latents), asked)
        if not isinstance(rewards, Mapping):
            raise TypeError(f"reward: got {type(rewards).__name__} from it, expected {{name: [B]}}")
        for name, values in rewards.items():
            check_shape(f"reward {name!r}", values, (len(asked),))
        return rewards

    def advantages(self, rewards: Mapping[str, torch.Tensor], asked: list[str]) -> torch.Tensor:
        """Advantages ``[B]`` of scored samples; override to weigh them otherwise."""
        return group_advantages(
            rewards,
            asked,
            self.weights,
            self.config.advantage_clip,
            gather=distributed.gather if distributed.world_size() > 1 else None,
            rank=distributed.rank(),
        )

    def _roll_out(self, context: torch.Tensor) -> Rollout:
        config = self.config
        shape = (config.latent_shape, config.chunk_frames, self.levels, config.sink, config.window, self.generator)
        student = self.modules["student"]
        with phase("rollout"), self.autocast(student), torch.no_grad():
            if self.kernel == "consistency":
                return rollout(student, context, *shape)
            return sde_rollout(student, context, *shape, noise_level=config.noise_level)

    def _micro_batches(self, played: Rollout, advantages: torch.Tensor, context: torch.Tensor) -> list[_Replay]:
        """What is replayed at once: one random step of every trajectory, or every step, cut to ``micro_batch``."""
        config, batch = self.config, len(advantages)
        if config.every_step:
            grid = [torch.full((batch,), k, device=self.device) for k in range(len(self.levels) - 1)]
        else:
            grid = [draw_steps(batch, len(self.levels), self.generator, self.device)]
        size = config.micro_batch or batch
        pieces = []
        for steps in grid:
            whole = transition(played, steps)
            for begin in range(0, batch, size):
                part = slice(begin, begin + size)
                step = Transition(**{f.name: getattr(whole, f.name)[part] for f in fields(Transition)})
                share = len(step.x_0) / (batch * len(grid))
                pieces.append(_Replay(step, advantages[part], context[part], share))
        return pieces

    def _update(self, played: Rollout, advantages: torch.Tensor, context: torch.Tensor) -> dict[str, torch.Tensor]:
        config, student = self.config, self.modules["student"]
        visible = {"sink": config.sink, "window": config.window}
        policy = {"kernel": self.kernel, "noise_level": config.noise_level}
        pieces = self._micro_batches(played, advantages, context)
        if config.clip is not None:
            with phase("old log-probabilities"), torch.no_grad(), self.autocast(student):
                for piece in pieces:
                    piece.old_log_prob, _ = replay(
                        student, piece.step, piece.context, config.chunk_frames, **visible, **policy
                    )
        for _ in range(config.updates_per_rollout):
            totals: dict[str, torch.Tensor] = {}
            for piece in pieces:
                with phase("student forward"), self.autocast(student):
                    loss, metrics = cm_grpo_loss(
                        student,
                        piece.step,
                        piece.advantages,
                        piece.context,
                        config.chunk_frames,
                        alpha=config.alpha,
                        scale=config.scale,
                        clip=config.clip,
                        old_log_prob=piece.old_log_prob,
                        kl=config.kl,
                        reference=self.reference,
                        **visible,
                        **policy,
                    )
                self.backward("student", loss * piece.share)
                for key, value in {"loss": loss.detach(), **metrics}.items():
                    totals[key] = totals.get(key, 0) + value * piece.share
            totals["student_norm"] = self.apply_gradients("student")
        self.update_average("student")
        return totals


class _Replay:
    """A micro-batch of transitions with what its loss needs; ``share`` is its part of the update's mean."""

    def __init__(self, step: Transition, advantages: torch.Tensor, context: torch.Tensor, share: float) -> None:
        self.step, self.advantages, self.context, self.share = step, advantages, context, share
        self.old_log_prob: torch.Tensor | None = None


def grpo_from_files(
    student: str,
    reward: Reward,
    prompts: str | PathLike[str],
    out: str | PathLike[str],
    config: PolicyConfig,
    weights: Mapping[str, float] | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
    model_config: str | None = None,
    device: str | None = None,
    save_every: int = 20,
) -> Path | None:
    """Improve the student of a checkpoint file; writes ``student.safetensors`` (the average) into ``out``.

    Resumes what was interrupted in ``out``. Returns the student's path on rank 0.
    """
    from raven.train.files import load_trained, save_student

    with distributed.process_group(device) as place:
        model = load_trained(student, model_config, place, torch.float32)
        source = PromptFile(prompts, model.config.text_len, place)
        trainer = CMGRPOTrainer(model, reward, source, config, weights=weights, decode=decode)
        run(trainer, config.steps, out, save_every, desc="grpo")
        if not distributed.is_main():
            return None
        return save_student(Path(out) / "student.safetensors", trainer.averaged("student"), config)


def main(argv: Sequence[str] | None = None) -> int:
    """``raven grpo``; returns the exit code."""
    from raven.train.files import add_run_arguments, import_factory, read_settings

    parser = argparse.ArgumentParser(
        prog="raven grpo",
        description="Improve a few-step causal student with CM-GRPO (or Flow-GRPO: --set method=flow_grpo). "
        "Run it under torchrun for several GPUs. Interrupt it at any time: the same command goes on.",
    )
    parser.add_argument("--student", required=True, help="few-step causal student (.safetensors, .pt or a folder)")
    parser.add_argument(
        "--reward", required=True, metavar="MODULE:NAME", help="called without arguments; gives a reward"
    )
    parser.add_argument("--weight", action="append", default=[], metavar="NAME=NUMBER", help="weight of one reward")
    parser.add_argument("--decode", metavar="MODULE:NAME", help="called without arguments; gives latents -> video")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    path = grpo_from_files(
        args.student,
        import_factory(args.reward, "reward")(),
        args.prompts,
        args.out,
        read_settings(PolicyConfig, args.settings, args.set),
        weights=_weights(args.weight),
        decode=import_factory(args.decode, "decode")() if args.decode else None,
        model_config=args.model_config,
        device=args.device,
        save_every=args.save_every,
    )
    if path is not None:
        print(path)
    return 0


def _weights(pairs: list[str]) -> dict[str, float] | None:
    weights = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            value = float(number)
        except ValueError as error:
            raise ValueError(f"weight: got {pair!r}, expected NAME=NUMBER") from error
        if not name or name in weights or not math.isfinite(value):
            raise ValueError(f"weight: got {pair!r}, expected NAME=NUMBER, finite and once for each name")
        weights[name] = value
    return weights or None
