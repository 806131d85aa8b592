"""Videos as plain images: conversion and a sheet to look at."""

from __future__ import annotations

import torch


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """``[B, 3, F, H, W]`` (or without B) in [-1, 1] as ``[B, F, H, W, 3]`` uint8 where it is, rounded and clipped."""
    levels = (video.detach().float().nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).movedim(-4, -1).contiguous()


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """The same as ``to_bytes``, on the CPU."""
    return to_bytes(video).cpu()


def contact_sheet(video: torch.Tensor, gap: int = 1, zoom: int = 1) -> torch.Tensor:
    """One uint8 picture ``[height, width, 3]`` of ``video [B, 3, F, H, W]``: a row per video, a column per frame."""
    images = to_uint8(video)
    batch, frames, height, width, _ = images.shape
    cells = torch.full((batch, frames, height + gap, width + gap, 3), 255, dtype=torch.uint8)
    cells[:, :, :height, :width] = images
    sheet = cells.transpose(1, 2).reshape(batch * (height + gap), frames * (width + gap), 3)
    return sheet.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
