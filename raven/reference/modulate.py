"""LayerNorm with a scale and shift per segment of tokens, in plain PyTorch: the oracle and the CPU path.

Diffusion transformers (arXiv 2212.09748) normalise without a learned affine and take scale and shift from the noise
level: here one row of a table for each segment of the sequence. Nothing of the size of the tokens is made from the
table. Everything is computed in float32 (float64 for float64 inputs) and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raven.schedule import compute_dtype

Lengths = Sequence[int] | None


def with_rows(fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: Tensor, lengths: Lengths) -> Tensor:
    """``fn(x, rows)``, row ``rows[:, i]`` of ``[B, N, C]`` for the tokens of segment i; ``[C]`` is for all tokens.

    ``x [B, L, C]``; ``lengths`` are the tokens of each segment, ``None`` where all are equal.
    """
    rows = rows.to(x.dtype)
    if rows.ndim == 1:
        return fn(x, rows)
    segments = rows.shape[1]
    if lengths is None:
        return fn(x.unflatten(1, (segments, x.shape[1] // segments)), rows.unsqueeze(2)).flatten(1, 2)
    parts = x.split(tuple(lengths), dim=1)
    return torch.cat([fn(part, rows[:, i, None]) for i, part in enumerate(parts)], dim=1)


def segment_sums(x: Tensor, like: Tensor, lengths: Lengths) -> Tensor:
    """``x [B, L, C]`` summed over the tokens of each segment, shape of the table ``like``: ``[B, N, C]`` or ``[C]``."""
    if like.ndim == 1:
        return x.sum(dim=(0, 1))
    segments = like.shape[1]
    if lengths is None:
        return x.unflatten(1, (segments, x.shape[1] // segments)).sum(dim=2)
    return torch.stack([part.sum(dim=1) for part in x.split(tuple(lengths), dim=1)], dim=1)


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalised ``x`` and its statistics ``[..., 2]``: mean and 1 / standard deviation."""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + eps)
    return centred * rstd, torch.cat((mean, rstd), dim=-1)


def factor(scale: Tensor) -> Tensor:
    """What the normalised tokens are multiplied by: ``1 + scale`` from a table, a learned weight ``[C]`` as it is."""
    return scale if scale.ndim == 1 else 1 + scale


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Lengths, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``(y, statistics)``; arguments as in ``raven.ops.modulate``, shift and scale ``[C]`` are a learned affine."""
    wide = compute_dtype(x, shift, scale)
    normed, stats = layer_norm(x.to(wide), eps)
    y = with_rows(torch.mul, normed, factor(scale.to(wide)), lengths)
    return with_rows(torch.add, y, shift, lengths).to(dtype), stats
