"""Residual plus a gated branch, and the LayerNorm that follows it, in plain PyTorch: the oracle and the CPU path.

Everything is computed in float32 (float64 for float64 inputs). The sum is rounded once, and normalised as rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raven.reference.modulate import Lengths, factor, modulate, segment_sums, with_rows
from raven.schedule import compute_dtype


def gated_sum(x: Tensor, branch: Tensor, gate: Tensor | None, lengths: Lengths) -> Tensor:
    """``x + gate * branch`` in the dtype of ``x``."""
    wide = compute_dtype(*(t for t in (x, branch, gate) if t is not None))
    added = branch.to(wide)
    if gate is not None:
        added = with_rows(torch.mul, added, gate, lengths)
    return (x.to(wide) + added).to(x.dtype)


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, lengths: Lengths, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(x_new, y, statistics)``; arguments as in ``raven.ops.gated_residual``, shift and scale may be bias, weight."""
    total = gated_sum(x, branch, gate, lengths)
    return total, *modulate(total, shift, scale, lengths, eps, dtype)


def backward(
    grad_total: Tensor | None,
    grad_y: Tensor | None,
    total: Tensor | None,
    stats: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    lengths: Lengths,
    dtypes: Sequence[torch.dtype],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The wanted ones of the gradients of x, branch, gate, shift and scale; those of tables in at least float32.

    With ``n = (total - mean) * rstd`` and ``s = grad_y * factor``, ``total`` gets
    ``d = grad_total + rstd * (s - mean(s) - n * mean(s n))``; x gets ``d``, the branch ``gate * d``, the gate
    ``sum d * branch``, shift ``sum grad_y`` and scale ``sum grad_y * n``. ``dtypes`` are those of x and branch.
    """
    given = [t for t in (grad_total, grad_y, total, branch, gate, scale) if t is not None]
    wide = compute_dtype(*given)
    found: list[Tensor | None] = [None] * 5
    d = None if grad_total is None else grad_total.to(wide)
    if grad_y is not None:
        grad = grad_y.to(wide)
        mean, rstd = stats.to(wide).split(1, dim=-1)
        normed = (total.to(wide) - mean) * rstd
        if wanted[3]:
            found[3] = segment_sums(grad, scale, lengths)
        if wanted[4]:
            found[4] = segment_sums(grad * normed, scale, lengths)
        scaled = with_rows(torch.mul, grad, factor(scale.to(wide)), lengths)
        along = (scaled * normed).mean(dim=-1, keepdim=True)
        normed = rstd * (scaled - scaled.mean(dim=-1, keepdim=True) - normed * along)
        d = normed if d is None else d + normed
    if wanted[0]:
        found[0] = d.to(dtypes[0])
    if wanted[1]:
        found[1] = (d if gate is None else with_rows(torch.mul, d, gate, lengths)).to(dtypes[1])
    if wanted[2]:
        found[2] = segment_sums(d * branch.to(wide), gate, lengths)
    return [grad for grad, want in zip(found, wanted, strict=True) if want]
