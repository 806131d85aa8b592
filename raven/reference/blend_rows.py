"""A moving average of cache rows in place, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from raven.reference.qk_norm_rope import compute_dtype


def blend_rows(cache: Tensor, lost: Tensor | None, target: int, source: int, tokens: int, alpha: float) -> None:
    """Arguments as in ``raven.ops.blend_rows``; computed in float32, in float64 for such."""
    dtype = compute_dtype(cache)
    mean, new = cache[:, target : target + tokens], cache[:, source : source + tokens]
    exact = mean.to(dtype)
    if lost is not None:
        exact = exact + lost[:, :tokens].to(dtype)
    exact = alpha * exact + (1 - alpha) * new.to(dtype)
    mean.copy_(exact)
    if lost is not None:
        lost[:, :tokens] = (exact - mean.to(dtype)).to(lost.dtype)
