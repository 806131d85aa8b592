"""Flow matching on a world's real videos: the bidirectional teacher, and the causal start (teacher forcing).

In the life of a large model both are given. For the built-in world they are trained here, on a GPU as one CUDA graph a
step, because the launches of so small a model cost more than its work.
"""

from __future__ import annotations

from typing import Any

import torch

from raven.errors import check_shape
from raven.losses import flow_matching_loss
from raven.repack import bidirectional_forward, repacked_forward
from raven.schedule import add_noise, shift_level
from raven.train import distributed
from raven.train.base import BaseTrainer
from raven.train.config import PretrainConfig
from raven.train.graph import GraphedStep
from raven.train.optim import set_lr, warmup_cosine
from raven.train.phases import phase
from raven.train.prompts import draw_seed

_RENDERED_AT_ONCE = 1024


class PretrainTrainer(BaseTrainer):
    """Regresses the velocity of noised videos; ``model`` is trained in place, its average is ``averaged("model")``.

    ``world`` has ``sample(n, frames, seed, device) -> (.video [n, C, F, H, W], .prompts)`` and
    ``encode(prompts, device) -> [n, text_len, text_dim]``. A share of the prompts is replaced by zeros, the empty
    prompt, so that the model can be guided.
    """

    ignored_settings = ("checkpointing",)  # the learning rate depends on the number of steps

    def __init__(self, model: torch.nn.Module, world: Any, config: PretrainConfig) -> None:
        device = next(model.parameters()).device
        super().__init__(config, device)
        self.world = world
        self.add_trained("model", model, config.lr, config.ema)
        self._pool: tuple[torch.Tensor, torch.Tensor] | None = None
        self._graphed = self._new_graph()

    def _new_graph(self) -> GraphedStep:
        return GraphedStep(self._update, self.config.cuda_graph and distributed.world_size() == 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._graphed = self._new_graph()  # a captured graph holds the addresses of the old optimizer state

    def draw_levels(self, batch: int) -> torch.Tensor:
        """Noise levels of a batch, ``[B]`` or one per chunk ``[B, N]``."""
        raise NotImplementedError

    def velocity(self, x_t: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The model's velocity for noised videos."""
        raise NotImplementedError

    def step(self) -> dict[str, float | torch.Tensor]:
        """One optimizer step; metrics ``loss``, ``grad_norm``, ``lr``."""
        self.begin_step()
        config = self.config
        video, context = self._batch(config.batch)
        keep = torch.rand(config.batch, generator=self.generator, device=self.device) >= config.prompt_dropout
        lr = warmup_cosine(self.steps_done, config.steps, config.warmup, config.lr, config.final_lr)
        set_lr(self.optimizers["model"], lr)
        metrics = self._graphed(
            x_0=video,
            noise=self.randn_like(video),
            t=self.draw_levels(config.batch),
            context=context * keep[:, None, None],
        )
        self.steps_done += 1
        return {**metrics, "lr": lr}

    def _update(
        self, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, context: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x_t = add_noise(x_0, noise, t, self.config.chunk_frames if t.ndim == 2 else None)
        with phase("model forward"), self.autocast(self.modules["model"]):
            v = self.velocity(x_t, x_0, t, context)
        loss = flow_matching_loss(v, x_0, noise)
        self.backward("model", loss)
        norm = self.apply_gradients("model")
        self.update_average("model")
        return {"loss": loss.detach(), "grad_norm": norm}

    def _uniform_levels(self, *shape: int) -> torch.Tensor:
        return shift_level(torch.rand(shape, generator=self.generator, device=self.device), self.config.shift)

    def _render(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.world.sample(count, self.config.frames, seed, device=self.device)
        check_shape("video", batch.video, (count, self.config.latent_shape[0], self.config.frames, "H", "W"))
        return batch.video, self.world.encode(batch.prompts, self.device)

    def _batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Videos ``[B, C, F, H, W]`` float32 and contexts ``[B, text_len, text_dim]``, fresh or from the pool."""
        if self.config.pool == 0:
            return self._render(count, draw_seed(self.host_generator))
        if self._pool is None:
            # The pool depends on the seed alone, so that a resumed run draws from the same videos.
            parts = [
                self._render(min(_RENDERED_AT_ONCE, self.config.pool - begin), self.config.seed * 1_000_003 + begin)
                for begin in range(0, self.config.pool, _RENDERED_AT_ONCE)
            ]
            self._pool = torch.cat([video.half() for video, _ in parts]), torch.cat([text for _, text in parts])
        picks = torch.randint(self.config.pool, (count,), generator=self.generator, device=self.device)
        return self._pool[0][picks].float(), self._pool[1][picks]


class TeacherTrainer(PretrainTrainer):
    """The bidirectional teacher: one noise level per video, every frame sees every frame."""

    def draw_levels(self, batch: int) -> torch.Tensor:
        return self._uniform_levels(batch)

    def velocity(self, x_t: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return bidirectional_forward(self.modules["model"], x_t, t, context)


class StartTrainer(PretrainTrainer):
    """The causal start: real clean chunks as history (teacher forcing), one independent noise level per chunk."""

    def draw_levels(self, batch: int) -> torch.Tensor:
        return self._uniform_levels(batch, len(self.config.chunk_frames))

    def velocity(self, x_t: torch.Tensor, x_0: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        config = self.config
        return repacked_forward(
            self.modules["model"], x_t, x_0, t, context, config.chunk_frames, sink=config.sink, window=config.window
        )
