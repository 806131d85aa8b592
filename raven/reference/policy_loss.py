"""Policy loss of a consistency step in plain PyTorch: the oracle of the fused op, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven.reference.gaussian_log_prob import gaussian_log_prob, gaussian_log_prob_backward
from raven.schedule import Level


def policy_loss(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: Level,
    s: Level,
    advantages: torch.Tensor,
    chunk_frames: Sequence[int] | None = None,
    chunk_weights: Sequence[float] | None = None,
    scale: float = 100.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-scale * mean_b(advantages_b sum_n w_n log_prob_bn / elements)`` and the log-density; both by autograd.

    Arguments and formula: `raven.ops.policy_loss`.
    """
    log_prob = gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames)
    if x_t.numel() == 0:
        return log_prob.sum(), log_prob
    per_sample = (_table(log_prob) * _per_element(log_prob, x_t, chunk_weights)).sum(1)
    return -scale * (advantages.detach().to(log_prob.dtype) * per_sample).mean(), log_prob


def policy_loss_and_gradient(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: Level,
    s: Level,
    advantages: torch.Tensor,
    chunk_frames: Sequence[int] | None,
    chunk_weights: Sequence[float] | None,
    scale: float,
    need_v: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss and log-density without autograd, and the loss's gradient in v (``None`` unless ``need_v``).

    The gradient is in v's dtype, but float32 for float16: its range may not hold what the backward still scales.
    """
    with torch.no_grad():
        loss, log_prob = policy_loss(v, x_t, x_s, t, s, advantages, chunk_frames, chunk_weights, scale)
        if not need_v:
            return loss, log_prob, None
        if x_t.numel() == 0:
            gradient = torch.zeros_like(v)
        else:
            weights = _per_element(log_prob, x_t, chunk_weights)
            grad = -scale / len(v) * advantages.to(log_prob.dtype)[:, None] * weights
            wide = v.float() if v.dtype == torch.float16 else v
            grad = grad.reshape(log_prob.shape)
            (gradient,) = gaussian_log_prob_backward(grad, wide, x_t, x_s, t, s, chunk_frames, True, False, False)
    return loss, log_prob, gradient.float() if v.dtype == torch.float16 else gradient


def _table(log_prob: torch.Tensor) -> torch.Tensor:
    return log_prob if log_prob.dim() == 2 else log_prob[:, None]


def _per_element(log_prob: torch.Tensor, x: torch.Tensor, chunk_weights: Sequence[float] | None) -> torch.Tensor:
    """``w_n / elements`` of a sample, ``[N]``."""
    weights = (1.0,) * _table(log_prob).shape[1] if chunk_weights is None else chunk_weights
    elements = x[0].numel()
    return torch.tensor([w / elements for w in weights], dtype=log_prob.dtype, device=log_prob.device)
