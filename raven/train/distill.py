"""RAVEN (arXiv 2605.15190): distribution matching distillation of a causal few-step student.

The student rolls out videos on its cache; the critic learns the distribution of the rollouts; the student's stored
noisy states are replayed, packed with their clean end points, through one forward whose gradient also reaches the
history, and are pulled from where the critic sees the rollouts to where the teacher sees the data.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from raven.losses import dmd_loss, flow_matching_loss
from raven.repack import bidirectional_forward, repacked_forward
from raven.rollout import rollout
from raven.schedule import add_noise, sampling_levels, shift_level, x0_from_velocity
from raven.train import distributed
from raven.train.base import BaseTrainer, freeze
from raven.train.config import DistillConfig
from raven.train.graph import GraphedStep
from raven.train.loop import run
from raven.train.optim import set_lr, warmup_cosine
from raven.train.phases import phase
from raven.train.prompts import PromptFile, Prompts

_KEPT = ("x_t", "x_0", "context")


class RavenTrainer(BaseTrainer):
    """One ``step``: rollout, critic update, and at every ``ttur``-th step a student update from the same rollout.

    Args:
        student: causal start, trained in place; ``averaged("student")`` is its moving average.
        teacher: bidirectional, frozen here.
        prompts: ``(count, generator) -> (prompts, context [count, text_len, text_dim])``.
        config: settings; ``history="self_forcing"`` cuts the gradient into the history.
        critic: bidirectional; default a copy of the teacher, so it must have the student's latents.
        negative: what classifier-free guidance contrasts with, ``[text_len, text_dim]``; default zeros, as no prompt.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        prompts: Prompts,
        config: DistillConfig,
        critic: torch.nn.Module | None = None,
        negative: torch.Tensor | None = None,
    ) -> None:
        super().__init__(config, next(student.parameters()).device)
        critic = copy.deepcopy(teacher) if critic is None else critic
        freeze([teacher])
        self.teacher, self.prompts, self.negative = teacher, prompts, negative
        self.add_trained("student", student, config.student_lr, config.ema)
        self.add_trained("critic", critic.requires_grad_(True), config.critic_lr)
        self.levels = sampling_levels(config.levels, config.shift).tolist()
        self._level_table = torch.tensor(self.levels, device=self.device)
        self._rollouts: list[dict[str, torch.Tensor]] = []
        self._new_graphs()

    def _new_graphs(self) -> None:
        config = self.config
        whole = config.cuda_graph and config.accumulation == 1 and distributed.world_size() == 1
        self._critic_update = GraphedStep(lambda **batch: self._update("critic", [batch]), whole)
        self._student_update = GraphedStep(lambda **batch: self._update("student", [batch]), whole)

    def step(self) -> dict[str, float | torch.Tensor]:
        """One step; metrics ``critic_loss``, ``critic_norm``, and with a student update ``dmd_loss``, ``gap`` (mean
        distance of critic and teacher), ``student_norm``."""
        config = self.config
        self.begin_step()
        if self.steps_done % config.rollout_every == 0:
            self._rollouts = [self._roll_out() for _ in range(config.accumulation)]
        for name, rate in (("student", config.student_lr), ("critic", config.critic_lr)):
            set_lr(self.optimizers[name], warmup_cosine(self.steps_done, config.steps, config.warmup, rate, final=1.0))
        metrics = self._run("critic", self._critic_update, [self._critic_batch(r) for r in self._rollouts])
        if (self.steps_done + 1) % config.ttur == 0 and self.steps_done >= config.critic_first:
            metrics |= self._run("student", self._student_update, [self._student_batch(r) for r in self._rollouts])
        self.steps_done += 1
        return metrics

    def _run(self, name: str, graphed: GraphedStep, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return graphed(**batches[0]) if len(batches) == 1 else self._update(name, batches)

    def _update(self, name: str, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Gradients of all micro-batches, then one optimizer step."""
        loss_of = self._critic_loss if name == "critic" else self._student_loss
        totals: dict[str, torch.Tensor] = {}
        for batch in batches:
            loss, metrics = loss_of(**batch)
            self.backward(name, loss / len(batches))
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0) + value / len(batches)
        totals[f"{name}_norm"] = self.apply_gradients(name)
        self.update_average(name)
        return totals

    @torch.no_grad()
    def _roll_out(self) -> dict[str, torch.Tensor]:
        """Videos of the current student: states ``[K, B, C, F, H, W]``, end points, and what they were asked for."""
        config = self.config
        _, context = self.prompts(config.batch, self.host_generator)
        student = self.modules["student"]
        with phase("rollout"), self.autocast(student):
            result = rollout(
                student,
                context,
                config.latent_shape,
                config.chunk_frames,
                self.levels,
                sink=config.sink,
                window=config.window,
                generator=self.generator,
            )
        return {"x_t": result.x_t, "x_0": result.x_0, "context": context}

    def _renoising(self, x_0: torch.Tensor) -> dict[str, torch.Tensor]:
        """A random level ``s`` ``[B]`` (shifted, kept off the ends) and noise."""
        config = self.config
        u = shift_level(torch.rand(len(x_0), generator=self.generator, device=self.device), config.shift)
        return {"s": config.min_level + (config.max_level - config.min_level) * u, "noise": self.randn_like(x_0)}

    def _critic_batch(self, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x_0": kept["x_0"], "context": kept["context"], **self._renoising(kept["x_0"])}

    def _critic_loss(
        self, x_0: torch.Tensor, context: torch.Tensor, s: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        critic = self.modules["critic"]
        with phase("critic forward"), self.autocast(critic):
            v = bidirectional_forward(critic, add_noise(x_0, noise, s), s, context)
        loss = flow_matching_loss(v, x_0, noise)
        return loss, {"critic_loss": loss.detach()}

    def _student_batch(self, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One random sampling level per sample, as it was met in the rollout."""
        x_0 = kept["x_0"]
        picks = torch.randint(len(self.levels), (len(x_0),), generator=self.generator, device=self.device)
        x_t = kept["x_t"][picks, torch.arange(len(x_0), device=self.device)]
        t = self._level_table[picks]
        return {"x_t": x_t, "x_0": x_0, "t": t, "context": kept["context"], **self._renoising(x_0)}

    def _student_loss(
        self,
        x_t: torch.Tensor,
        x_0: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        s: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, student = self.config, self.modules["student"]
        with phase("student forward"), self.autocast(student):
            v = repacked_forward(
                student,
                x_t,
                x_0,
                t,
                context,
                config.chunk_frames,
                sink=config.sink,
                window=config.window,
                detach_history=config.history == "self_forcing",
            )
        estimate = x0_from_velocity(v.float(), x_t, t)
        with torch.no_grad():
            x_s = add_noise(estimate, noise, s)
            fake, real = self._fake(x_s, s, context), self._real(x_s, s, context)
            gap = (fake - real).abs().mean()
        loss = dmd_loss(estimate, fake, real, config.chunk_frames, config.alpha, config.per_chunk_norm)
        return loss, {"dmd_loss": loss.detach(), "gap": gap}

    def _fake(self, x_s: torch.Tensor, s: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        critic = self.modules["critic"]
        with phase("critic score"), self.autocast(critic):
            v = bidirectional_forward(critic, x_s, s, context)
        return x0_from_velocity(v.float(), x_s, s)

    def _real(self, x_s: torch.Tensor, s: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The teacher's clean estimate, guided; prompted and unprompted halves in one forward."""
        scale = self.config.guidance
        with phase("teacher score"), self.autocast(self.teacher):
            if scale == 1:
                v = bidirectional_forward(self.teacher, x_s, s, context).float()
            else:
                empty = torch.zeros_like(context) if self.negative is None else self.negative.expand_as(context)
                both = torch.cat([context, empty])
                v = bidirectional_forward(self.teacher, torch.cat([x_s, x_s]), torch.cat([s, s]), both).float()
                prompted, unprompted = v.chunk(2)
                v = unprompted + scale * (prompted - unprompted)
        return x0_from_velocity(v, x_s, s)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.steps_done % self.config.rollout_every:  # the next step goes on with the rollouts at hand
            state["rollouts"] = self._rollouts
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        kept = state.get("rollouts", [])
        self._rollouts = [{name: r[name].to(self.device) for name in _KEPT} for r in kept]
        self._new_graphs()  # captured graphs hold the addresses of the old optimizer state


def distill_from_files(
    teacher: str,
    start: str,
    prompts: str | PathLike[str],
    out: str | PathLike[str],
    config: DistillConfig,
    critic: str | None = None,
    model_config: str | None = None,
    teacher_config: str | None = None,
    device: str | None = None,
    save_every: int = 20,
) -> Path | None:
    """Distil with weights and prompt embeddings from files; writes ``student.safetensors`` (the average) into ``out``.

    ``teacher``, ``start`` and ``critic`` (default: the teacher's weights) are checkpoints as ``raven.checkpoint`` reads
    them; ``prompts`` is a ``PromptFile``. Resumes what was interrupted in ``out``. Returns the student's path (rank 0).
    """
    from raven.train.files import load_trained, save_student

    with distributed.process_group(device) as place:
        frozen_dtype = (
            torch.bfloat16 if config.master_weights or (place.type == "cuda" and config.amp) else torch.float32
        )
        student = load_trained(start, model_config, place, torch.float32)
        model_of_teacher = load_trained(teacher, teacher_config, place, frozen_dtype)
        critic_path, critic_config = (teacher, teacher_config) if critic is None else (critic, model_config)
        source = PromptFile(prompts, student.config.text_len, place)
        trainer = RavenTrainer(
            student,
            model_of_teacher,
            source,
            config,
            critic=load_trained(critic_path, critic_config, place, torch.float32),
            negative=source.negative,
        )
        run(trainer, config.steps, out, save_every, desc="distill")
        if not distributed.is_main():
            return None
        return save_student(Path(out) / "student.safetensors", trainer.averaged("student"), config)


def main(argv: Sequence[str] | None = None) -> int:
    """``raven distill``; returns the exit code."""
    from raven.train.files import add_run_arguments, read_settings

    parser = argparse.ArgumentParser(
        prog="raven distill",
        description="Train a few-step causal student with RAVEN from a teacher, a causal start and prompt embeddings. "
        "Run it under torchrun for several GPUs. Interrupt it at any time: the same command goes on.",
    )
    parser.add_argument("--teacher", required=True, help="bidirectional teacher (.safetensors, .pt or a folder)")
    # Where CPython issue 58573 is open, as in 3.11 and 3.12.3, torchrun takes "--start" for one of its own options.
    parser.add_argument("--start", "--causal-start", required=True, help="causal start of the student")
    parser.add_argument("--critic", help="start of the critic (default: the teacher)")
    parser.add_argument("--teacher-config", help="config (.json) of the teacher, where it is another size")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    path = distill_from_files(
        args.teacher,
        args.start,
        args.prompts,
        args.out,
        read_settings(DistillConfig, args.settings, args.set),
        critic=args.critic,
        model_config=args.model_config,
        teacher_config=args.teacher_config or args.model_config,
        device=args.device,
        save_every=args.save_every,
    )
    if path is not None:
        print(path)
    return 0
