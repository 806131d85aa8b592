"""Videos that a model makes for training: every state on the way is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raven.models.wan import CausalWan, Context
from raven.sampling import Generators, checked_levels
from raven.stream import Stream


@dataclass(frozen=True)
class Rollout:
    """What a roll-out leaves for training: K levels, the noisy states there, and the clean end points.

    ``levels`` ``[K]`` float32, ``x_t`` ``[K, B, C, F, H, W]``, ``x_0`` ``[B, C, F, H, W]``.
    """

    levels: torch.Tensor
    x_t: torch.Tensor
    x_0: torch.Tensor

    @property
    def x_next(self) -> torch.Tensor:
        """The state sampled after each level, ``[K, B, C, F, H, W]``; after the last one the clean end point."""
        return torch.cat([self.x_t[1:], self.x_0[None]])


@torch.no_grad()
def rollout(
    model: CausalWan,
    context: Context,
    latent_shape: Sequence[int],
    chunk_frames: Sequence[int],
    levels: torch.Tensor | Sequence[float] | None = None,
    sink: int = 0,
    window: int | None = None,
    generator: Generators = None,
) -> Rollout:
    """Generate a video of chunks ``chunk_frames`` and keep every state, without gradient.

    One consistency step a level, history on the cache; the last chunk's clean pass is left out, because nothing
    follows it. Arguments as in ``Stream``.
    """
    sizes = tuple(chunk_frames)
    stream = Stream(model, context, latent_shape, sizes, sink, window, generator=generator, graphs=False)
    chunks, trajectory = [], []
    for i in range(len(stream.sizes)):
        x_0, states = stream.denoise(levels)
        if i + 1 < len(stream.sizes):
            stream.commit(x_0, defer=True)
        chunks.append(x_0)
        trajectory.append(states)
    kept = torch.tensor(checked_levels(levels), dtype=torch.float32, device=model.device)
    return Rollout(kept, torch.cat(trajectory, dim=3), torch.cat(chunks, dim=2))
