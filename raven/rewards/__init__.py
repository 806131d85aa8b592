"""Rewards: what a policy update ascends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from raven.rewards.shapes import ShapesReward

__all__ = ["Reward", "ShapesReward"]


@runtime_checkable
class Reward(Protocol):
    """Anything that scores finished videos; any function of this signature is one."""

    def __call__(self, video: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Scores by name, each ``[B]`` float32 on the video's device, larger is better.

        ``video [B, 3, F, H, W]`` holds pixels in [-1, 1]; ``prompts`` has one prompt per video.
        """
        ...
