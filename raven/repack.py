"""One packed forward over a whole roll-out, and the forwards of the other paradigms.

The repacked sequence is that of RAVEN (arXiv 2605.15190): noisy chunks interleaved with their clean end points, so
that one forward gives every noisy chunk the velocity that chunk-by-chunk generation gives it, with gradients into the
history. Teacher forcing is the same call with real clean chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn

from raven.layout import ChunkLayout
from raven.models.config import WanConfig
from raven.models.wan import Context

_repacked = lru_cache(maxsize=64)(ChunkLayout.repacked)
_blockwise = lru_cache(maxsize=64)(ChunkLayout.blockwise)


def _config(model: nn.Module) -> WanConfig:
    """The config of a model that may be wrapped (data parallel, compiled)."""
    while not isinstance(config := getattr(model, "config", None), WanConfig):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"model: got {type(model).__name__}, expected a CausalWan or a wrapper of one")
        model = inner
    return config


def split_frames(frames: int, chunk_frames: int | Sequence[int]) -> tuple[int, ...]:
    """Sizes of the chunks of a video of ``frames`` latent frames.

    ``chunk_frames`` is one size for all or the list of sizes; ``ValueError`` when they do not sum to ``frames``.
    """
    if isinstance(chunk_frames, int):
        if chunk_frames < 1 or frames % chunk_frames:
            raise ValueError(f"chunk_frames: got {chunk_frames}, expected a divisor of the {frames} frames")
        return (chunk_frames,) * (frames // chunk_frames)
    sizes = tuple(int(size) for size in chunk_frames)
    if sum(sizes) != frames or min(sizes, default=0) < 1:
        raise ValueError(f"chunk_frames: got {sizes}, expected positive sizes that sum to the {frames} frames")
    return sizes


def _grid(model: nn.Module, x: torch.Tensor) -> int:
    """Tokens of one frame of latents ``x`` ``[B, C, F, H, W]``."""
    if x.ndim != 5:
        raise ValueError(f"x_t: got shape {tuple(x.shape)}, expected [B, C, F, H, W]")
    _, ph, pw = _config(model).patch_size
    if x.shape[3] % ph or x.shape[4] % pw:
        raise ValueError(f"x_t: got a latent of {x.shape[3]}x{x.shape[4]}, expected a multiple of the patch {ph}x{pw}")
    return (x.shape[3] // ph) * (x.shape[4] // pw)


def repacked_forward(
    model: nn.Module,
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    t: torch.Tensor | float,
    context: Context,
    chunk_frames: int | Sequence[int],
    sink: int = 0,
    window: int | None = None,
    order: str = "interleaved",
    detach_history: bool = False,
) -> torch.Tensor:
    """Velocity of all noisy chunks, each seeing the clean chunks before it.

    ``x_t`` ``[B, C, F, H, W]`` holds every chunk's noisy state and ``x_0`` (same shape) its clean end point: real data
    for teacher forcing, the model's own roll-out for RAVEN. ``t`` in [0, 1]: a number, ``[B]``, or ``[B, N]`` for one
    level a chunk. ``sink`` and ``window`` count chunks. ``order`` is the packed order, "interleaved" or
    "clean_first"; the result is the same. ``x_0`` is a constant, and the last clean chunk is not used; the gradient
    reaches the weights through the clean keys and values too, unless ``detach_history`` (the Self Forcing gradient).
    Returns ``[B, C, F, H, W]`` in the dtype of ``x_t``. Raises ``ValueError`` for arguments that do not fit.
    """
    tokens = _grid(model, x_t)
    layout = _repacked(split_frames(x_t.shape[2], chunk_frames), tokens, sink, window, order)
    return model(x_t, t, context, layout, x_0=x_0, detach_history=detach_history)


def blockwise_forward(
    model: nn.Module,
    x_t: torch.Tensor,
    t: torch.Tensor | float,
    context: Context,
    chunk_frames: int | Sequence[int],
    local_frames: int | None = None,
) -> torch.Tensor:
    """Velocity of one noisy stream, each chunk seeing the noisy chunks before it (Diffusion Forcing, CausVid).

    ``t`` ``[B, N]`` usually holds an independent level for each chunk; ``local_frames`` limits how far back a chunk
    sees. Otherwise as ``repacked_forward``.
    """
    tokens = _grid(model, x_t)
    layout = _blockwise(split_frames(x_t.shape[2], chunk_frames), tokens, local_frames)
    return model(x_t, t, context, layout)


def bidirectional_forward(
    model: nn.Module, x_t: torch.Tensor, t: torch.Tensor | float, context: Context
) -> torch.Tensor:
    """Velocity of ``x_t`` ``[B, C, F, H, W]`` with every frame seeing every frame: the teacher and the critic."""
    return model(x_t, t, context)
