"""The consistency step in plain PyTorch: the oracle of the fused op, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven.schedule import Level, compute_dtype, expand_level


def consistency_step(
    v: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor | None, t: Level, s: Level
) -> torch.Tensor:
    """``(1 - s)(x_t - t v) + s noise``, shape and dtype of ``x_t``; computed in float32 (float64 for float64).

    ``noise = None`` leaves the mean. Levels in any form that `raven.schedule.expand_level` takes. Differentiable by
    autograd in every tensor.
    """
    dtype = compute_dtype(v, x_t)
    t, s = expand_level(t, x_t, name="t").to(dtype), expand_level(s, x_t, name="s").to(dtype)
    x_s = (1 - s) * (x_t.to(dtype) - t * v.to(dtype))
    if noise is not None:
        x_s = x_s + s * noise.to(dtype)
    return x_s.to(x_t.dtype)


def consistency_step_backward(
    grad: torch.Tensor, t: torch.Tensor, s: torch.Tensor, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The wanted ones of ``-t (1 - s) grad``, ``(1 - s) grad``, ``s grad`` (for v, x_t, noise), in the given dtypes."""
    t, s = expand_level(t, grad, name="t"), expand_level(s, grad, name="s")
    factors = (-t * (1 - s), 1 - s, s)
    return [(f * grad).to(d) for f, d, want in zip(factors, dtypes, wanted, strict=True) if want]
