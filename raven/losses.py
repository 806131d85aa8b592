"""Losses of RAVEN (arXiv 2605.15190): chunk weights, distribution matching, the critic, and the policy.

Everything is computed in float32 whatever the inputs are. Shapes: B batch, C channels, F latent frames, N chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from raven.errors import check_shape


def chunk_weights(sizes: Sequence[int], alpha: float) -> torch.Tensor:
    """Weight of every chunk's loss, ``[N]`` float32 on the CPU.

    With ``p_j`` the share of elements in chunk ``j`` and later, and ``pi_a(p) = a p / (1 + (a - 1) p)``, the weight is
    ``pi_alpha(p_j)`` for ``alpha > 0`` (early chunks count more), ``pi_|alpha|(p_N / p_j)`` for ``alpha < 0`` (late
    chunks count more), 1 for ``alpha = 0``; then scaled so that ``sum w_j m_j = sum m_j`` (RAVEN, arXiv 2605.15190).

    Args:
        sizes: elements (or frames: only ratios matter) ``m_j`` of each chunk, positive.
        alpha: any finite number; the paper trains with -1.
    """
    if len(sizes) == 0 or any(size <= 0 for size in sizes):
        raise ValueError(f"sizes: got {list(sizes)}, expected at least one chunk, each of positive size")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, expected a finite number")
    total = sum(sizes)
    share = [sum(sizes[j:]) / total for j in range(len(sizes))]
    if alpha == 0:
        raw = [1.0] * len(sizes)
    else:
        a = abs(alpha)
        arguments = share if alpha > 0 else [share[-1] / p for p in share]
        raw = [a * p / (1 + (a - 1) * p) for p in arguments]
    scale = total / sum(w * m for w, m in zip(raw, sizes, strict=True))
    return torch.tensor([w * scale for w in raw], dtype=torch.float32)


@lru_cache(maxsize=64)
def _frame_weights(chunk_frames: tuple[int, ...], alpha: float, device: torch.device) -> torch.Tensor:
    per_chunk = chunk_weights(chunk_frames, alpha)
    return per_chunk.repeat_interleave(torch.tensor(chunk_frames)).to(device)


def frame_weights(chunk_frames: Sequence[int], alpha: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """``chunk_weights`` spread over frames: ``[F]`` float32 on ``device``. The tensor is cached: do not write to it."""
    return _frame_weights(tuple(int(f) for f in chunk_frames), float(alpha), torch.device(device))


def _check_chunks(name: str, x: torch.Tensor, chunk_frames: Sequence[int]) -> None:
    if isinstance(chunk_frames, int):
        raise TypeError(f"chunk_frames: got {chunk_frames}, expected the frames of each chunk")
    check_shape(name, x, ("B", "C", sum(chunk_frames), "H", "W"))


def dmd_loss(
    x0: torch.Tensor,
    fake: torch.Tensor,
    real: torch.Tensor,
    chunk_frames: Sequence[int],
    alpha: float = -1.0,
    per_chunk_norm: bool = False,
    norm_min: float = 1e-5,
) -> torch.Tensor:
    """Distribution matching loss, a scalar whose gradient in ``x0`` is ``w (fake - real) / norm / x0.numel()``.

    ``norm = mean |x0 - real|`` over the sample, or over each chunk with ``per_chunk_norm``, at least ``norm_min``;
    ``w`` are the chunk weights of ``alpha``. The value itself (half the mean square of that direction) only tells how
    far the critic and the teacher disagree. DMD (arXiv 2311.18828), with the chunk weights of RAVEN (arXiv 2605.15190).

    Args:
        x0: the student's clean estimate ``[B, C, F, H, W]``, the only input that receives a gradient.
        fake, real: the critic's and the teacher's clean estimates, same shape.
        chunk_frames: frames of each chunk, summing to F.
    """
    _check_chunks("x0", x0, chunk_frames)
    check_shape("fake", fake, x0.shape)
    check_shape("real", real, x0.shape)
    estimate = x0.float()
    with torch.no_grad():
        fake, real = fake.float(), real.float()
        spans = list(chunk_frames) if per_chunk_norm else [x0.shape[2]]
        norm = torch.cat(
            [
                part.mean(dim=(1, 2, 3, 4), keepdim=True).expand(-1, -1, part.shape[2], -1, -1)
                for part in (estimate - real).abs().split(spans, dim=2)
            ],
            dim=2,
        )  # [B, 1, F, 1, 1]
        weights = frame_weights(chunk_frames, alpha, x0.device)[:, None, None]
        target = estimate - weights * (fake - real) / norm.clamp_min(norm_min)
    return 0.5 * (estimate - target).square().mean()


def flow_matching_loss(
    v: torch.Tensor, x_0: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of the velocity ``v`` against ``noise - x_0`` (rectified flow), a scalar.

    ``weights`` (broadcastable to ``v``, for example ``frame_weights(...)[:, None, None]``) multiply the squared error.
    Trains teacher, causal start and critic.
    """
    check_shape("v", v, x_0.shape)
    check_shape("noise", noise, x_0.shape)
    error = (v.float() - (noise.float() - x_0.float())).square()
    return (error if weights is None else error * weights).mean()


def _policy_shares(elements: Sequence[int], alpha: float, device: torch.device) -> torch.Tensor:
    """``w_j m_j / sum m`` per chunk, ``[N]``: the weight of a chunk's *mean* in a mean over all elements."""
    return _shares(tuple(int(m) for m in elements), float(alpha), torch.device(device))


@lru_cache(maxsize=64)
def _shares(elements: tuple[int, ...], alpha: float, device: torch.device) -> torch.Tensor:
    sizes = torch.tensor(elements, dtype=torch.float64)
    return (chunk_weights(elements, alpha).double() * sizes / sizes.sum()).float().to(device)


@lru_cache(maxsize=64)
def _sizes(elements: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(elements, dtype=torch.float32, device=device)


def _per_element(log_prob: torch.Tensor, elements: Sequence[int]) -> torch.Tensor:
    return log_prob / _sizes(tuple(int(m) for m in elements), log_prob.device)


def weighted_mean(values: torch.Tensor, elements: Sequence[int], alpha: float = -1.0) -> torch.Tensor:
    """Sums over chunks ``[B, N]`` to a chunk-weighted mean over elements ``[B]`` (``elements``: sizes of chunks)."""
    return (_per_element(values, elements) * _policy_shares(elements, alpha, values.device)).sum(dim=1)


def reinforce_loss(
    log_prob: torch.Tensor, advantages: torch.Tensor, elements: Sequence[int], alpha: float = -1.0, scale: float = 100.0
) -> torch.Tensor:
    """``-scale * mean over samples and elements of w * advantage * log_prob``, a scalar (CM-GRPO, on-policy).

    Args:
        log_prob: log-probability of the sampled step, summed over each chunk's elements, ``[B, N]``.
        advantages: ``[B]``, already clipped.
        elements: number of elements of each chunk (per sample), length N.
        alpha: of the chunk weights.
        scale: the paper multiplies its policy loss by 100.
    """
    check_shape("log_prob", log_prob, (len(advantages), len(elements)))
    return -scale * (advantages.detach() * weighted_mean(log_prob, elements, alpha)).mean()


def policy_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor, elements: Sequence[int]) -> torch.Tensor:
    """``exp`` of the per-element mean of the log-ratio of every chunk, ``[B, N]``.

    The mean, and not the sum, keeps the ratio's scale independent of resolution and length. Subtracting before dividing
    makes it exactly 1 when both log-probabilities have the same bits.
    """
    check_shape("old_log_prob", old_log_prob, log_prob.shape)
    return _per_element(log_prob - old_log_prob.detach(), elements).exp()


def clipped_ratio_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    elements: Sequence[int],
    clip: float = 1e-4,
    alpha: float = -1.0,
    scale: float = 100.0,
) -> torch.Tensor:
    """PPO's clipped objective per chunk, for updating on one rollout more than once; a scalar.

    At ratio 1 its gradient equals that of ``reinforce_loss``. ``clip`` applies to the ratio of per-element means, for
    which 1e-4 is the range used by Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818).
    """
    check_shape("log_prob", log_prob, (len(advantages), len(elements)))
    if clip <= 0:
        raise ValueError(f"clip: got {clip}, expected a positive number")
    ratio = policy_ratio(log_prob, old_log_prob, elements)
    gain = advantages.detach()[:, None]
    worst = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip))
    return scale * (worst * _policy_shares(elements, alpha, log_prob.device)).sum(dim=1).mean()


def consistency_kl(
    v: torch.Tensor,
    v_reference: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    chunk_frames: Sequence[int],
) -> torch.Tensor:
    """KL divergence of a consistency step from the reference's, summed over each chunk's elements: ``[B, N]`` float32.

    ``A(s)^2 |x0 - x0_ref|^2 / (2 B(s)^2)`` with ``A(s) = 1 - s``, ``B(s) = s``, and ``x0 - x0_ref = -t (v - v_ref)``
    since both start from the same ``x_t``. ``t`` and ``s > 0`` are ``[B]``; ``v_reference`` gets no gradient.
    """
    _check_chunks("v", v, chunk_frames)
    check_shape("v_reference", v_reference, v.shape)
    square = (v.float() - v_reference.detach().float()).square()
    per_chunk = torch.stack([part.sum(dim=(1, 2, 3, 4)) for part in square.split(list(chunk_frames), dim=2)], dim=1)
    return per_chunk * (((1 - s) * t / s).square() / 2)[:, None]
