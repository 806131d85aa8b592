"""Log-density of a consistency step in plain PyTorch: the oracle of the fused op, and what runs on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raven.schedule import Level, compute_dtype, expand_level

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _levels(x: torch.Tensor, t: Level, s: Level, chunk_frames: Sequence[int] | None):
    return expand_level(t, x, chunk_frames, "t"), expand_level(s, x, chunk_frames, "s")


def _pieces(x: torch.Tensor, chunk_frames: Sequence[int] | None) -> tuple[torch.Tensor, ...]:
    return (x,) if chunk_frames is None else x.split(tuple(chunk_frames), dim=2)


def gaussian_log_prob(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: Level,
    s: Level,
    chunk_frames: Sequence[int] | None = None,
) -> torch.Tensor:
    """``log N(x_s; (1 - s)(x_t - t v), s^2 I)`` summed over the elements of each sample, or of each of its chunks.

    ``[B]``, or ``[B, N]`` with ``chunk_frames``; float32, float64 when an input is float64. Differentiable by autograd
    in v, x_t, x_s and the levels. Arguments and formula: `raven.ops.gaussian_log_prob`.
    """
    dtype = compute_dtype(v, x_t, x_s)
    v, x_t, x_s = (x.to(dtype) for x in (v, x_t, x_s))
    t, s = _levels(x_t, t, s, chunk_frames)
    squares = (x_s - (1 - s) * (x_t - t * v)).square()
    columns = []
    for n, piece in enumerate(_pieces(squares, chunk_frames)):
        size = math.prod(piece.shape[1:])
        rows = piece.reshape(len(piece), size)
        # One sum a sample: how a reduction over a whole batch is split may depend on the batch.
        energy = torch.stack([row.sum() for row in rows]) if len(rows) else rows.sum(1)
        level = _per_sample(s, n, chunk_frames)
        columns.append(-energy / (2 * level * level) - size * (level.log() + HALF_LOG_2PI))
    return columns[0] if chunk_frames is None else torch.stack(columns, dim=1)


def _per_sample(s: torch.Tensor, n: int, chunk_frames: Sequence[int] | None) -> torch.Tensor:
    """Level of chunk n, ``[B]``, from the broadcast form."""
    flat = s.reshape(s.shape[0], math.prod(s.shape[1:]))
    return flat[:, 0] if flat.shape[1] == 1 else flat[:, sum(tuple(chunk_frames or ())[:n])]


def gaussian_log_prob_backward(
    grad: torch.Tensor,
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    chunk_frames: Sequence[int] | None,
    need_v: bool,
    need_x_t: bool,
    need_x_s: bool,
) -> list[torch.Tensor]:
    """The wanted ones of the gradients of v, x_t, x_s, each in its input's dtype, for the gradient of the log-density.

    With ``k = grad / s^2`` and ``e = x_s - (1 - s)(x_t - t v)``: ``-t (1 - s) k e``, ``(1 - s) k e``, ``-k e``.
    """
    dtype = compute_dtype(v, x_t, x_s)
    dtypes = (v.dtype, x_t.dtype, x_s.dtype)
    v, x_t, x_s = (x.to(dtype) for x in (v, x_t, x_s))
    t, s = _levels(x_t, t, s, chunk_frames)
    if chunk_frames is None:
        grad = grad.reshape((-1,) + (1,) * (x_t.dim() - 1))
    else:
        grad = torch.cat([g[:, None].expand(-1, f) for g, f in zip(grad.unbind(1), chunk_frames, strict=True)], dim=1)
        grad = grad.reshape((x_t.shape[0], 1, x_t.shape[2]) + (1,) * (x_t.dim() - 3))
    scaled = (x_s - (1 - s) * (x_t - t * v)) * (grad / (s * s))
    wanted = ((need_v, -t * (1 - s)), (need_x_t, 1 - s), (need_x_s, -1.0))
    return [(factor * scaled).to(d) for (need, factor), d in zip(wanted, dtypes, strict=True) if need]
