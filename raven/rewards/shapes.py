"""Closed-form rewards of the world ``shapes``: its own metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven.worlds.shapes import Shapes


class ShapesReward:
    """``{"quality", "semantic", "dynamic"}`` of each video, in [0, 1].

    ``chunk_frames`` as in ``Shapes.score``. ``weights`` is a default for the sum of normalised rewards; semantic
    has most, as text alignment has in RAVEN (arXiv 2605.15190).
    """

    weights = {"quality": 1.0, "semantic": 2.0, "dynamic": 1.0}

    def __init__(self, world: Shapes | None = None, chunk_frames: int | Sequence[int] | None = None):
        self.world = Shapes() if world is None else world
        self.chunk_frames = chunk_frames

    def __call__(self, video: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Score ``video [B, 3, F, H, W]`` in [-1, 1]; each value ``[B]`` float32. Errors as in ``Shapes.score``."""
        scores = self.world.score(video, prompts, self.chunk_frames)
        return {"quality": scores.quality, "semantic": scores.semantic, "dynamic": scores.dynamic}
