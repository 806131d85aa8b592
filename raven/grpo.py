"""Group-relative policy optimisation of few-step video models: advantages, rollouts, replay and the update's loss.

CM-GRPO (RAVEN, arXiv 2605.15190) takes a consistency step for what it is, a Gaussian policy
``pi(x_s | x_t) = N(x_s; A(s) x0_hat, B(s)^2 I)``. A group is rolled out on the cache, and one random step of every
trajectory is replayed through the repacked forward, so that the gradient also reaches the history's keys and values.
Flow-GRPO (arXiv 2505.05470), which discretises an SDE instead, is the baseline.

House letters: B batch (prompts x group), N chunks, K sampling levels, R rewards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raven.errors import check_shape
from raven.losses import chunk_weights, clipped_ratio_loss, consistency_kl, policy_ratio, reinforce_loss, weighted_mean
from raven.ops import gaussian_log_prob, policy_loss
from raven.repack import repacked_forward
from raven.rollout import Rollout
from raven.schedule import euler_maruyama_kernel, x0_from_velocity
from raven.stream import Stream

KERNELS = ("consistency", "euler_maruyama")


def prompt_ids(prompts: Sequence[str]) -> torch.Tensor:
    """A 63-bit id per prompt, ``[B]`` int64, the same on every rank and in every run."""
    digests = [hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in prompts]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def _standardize(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``(value - mean) / (max(std, 1e-4) + 1e-5)`` within equal ids, float64; exactly 0 where a group is constant."""
    _, group, counts = ids.unique(return_inverse=True, return_counts=True)
    zeros = values.new_zeros(len(counts))
    mean = zeros.index_add(0, group, values) / counts
    centred = values - mean[group]
    std = (zeros.index_add(0, group, centred.square()) / counts).sqrt()
    low = zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    high = zeros.scatter_reduce(0, group, values, "amax", include_self=False)
    scaled = centred / (std.clamp_min(1e-4) + 1e-5)[group]
    return torch.where((low == high)[group], torch.zeros_like(scaled), scaled)


def group_advantages(
    rewards: Mapping[str, torch.Tensor] | torch.Tensor,
    prompts: torch.Tensor | Sequence[str],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    clip: float = 5.0,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rank: int = 0,
) -> torch.Tensor:
    """Advantages of a batch of samples, ``[B]`` float32 in ``[-clip, clip]`` on the rewards' device.

    Each reward is normalised within the samples of its prompt (biased std, at least 1e-4, plus 1e-5), then weighted and
    summed; the sum is normalised the same way once more, per prompt over all ranks (RAVEN, arXiv 2605.15190). A group
    of one sample, or of equal rewards, gets zeros.

    Args:
        rewards: name -> ``[B]``, or ``[R, B]``; finite.
        prompts: what each sample was asked for, ``B`` strings or ``[B]`` int64 ids.
        weights: name -> weight, or R numbers; default 1 each. A name that no reward has is an error, and so is a reward
            without a weight.
        gather: concatenates a ``[B]`` tensor over all ranks (``raven.train.distributed.gather``), which must all have
            the same B; this process's part is number ``rank``. Default: this process alone.
    """
    table, names = _reward_table(rewards)
    factors = _reward_factors(names, weights, isinstance(rewards, Mapping)).to(table.device)
    ids = prompts if isinstance(prompts, torch.Tensor) else prompt_ids(prompts)
    check_shape("prompts", ids, (table.shape[1],))
    if clip <= 0:
        raise ValueError(f"clip: got {clip}, expected a positive number")
    ids = ids.to(table.device)
    total = sum(f * _standardize(row, ids) for f, row in zip(factors, table, strict=True))
    if gather is None:
        return _standardize(total, ids).clamp(-clip, clip).float()
    advantages = _standardize(gather(total), gather(ids))
    start = rank * len(ids)
    return advantages[start : start + len(ids)].clamp(-clip, clip).float()


def _reward_table(rewards: Mapping[str, torch.Tensor] | torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    if isinstance(rewards, Mapping):
        if not rewards:
            raise ValueError("rewards: got none, expected at least one")
        names = list(rewards)
        size = len(rewards[names[0]])
        for name in names:
            check_shape(f"rewards[{name!r}]", rewards[name], (size,))
        table = torch.stack([rewards[name].detach().double() for name in names])
    else:
        check_shape("rewards", rewards, ("R", "B"))
        names = [str(row) for row in range(len(rewards))]
        table = rewards.detach().double()
    bad = (~table.isfinite()).nonzero()
    if len(bad):
        row, sample = bad[0].tolist()
        raise ValueError(
            f"rewards: got {table[row, sample].item()} for {names[row]!r} of sample {sample}, expected finite"
        )
    return table, names


def _reward_factors(
    names: list[str], weights: Mapping[str, float] | Sequence[float] | None, named: bool
) -> torch.Tensor:
    if weights is None:
        return torch.ones(len(names), dtype=torch.float64)
    if isinstance(weights, Mapping):
        if not named or set(weights) != set(names):
            raise ValueError(f"weights: got {sorted(weights)}, expected one for each of {sorted(names)}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"weights: got {len(weights)} numbers, expected {len(names)}")
    return torch.tensor(list(weights), dtype=torch.float64)


def draw_steps(
    samples: int, levels: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """One random step for every trajectory, ``[B]`` int64 in ``[0, levels - 1)``: the last has no policy."""
    if levels < 2:
        raise ValueError(f"levels: got {levels}, expected at least 2 (the last step is a point mass)")
    return torch.randint(levels - 1, (samples,), generator=generator, device=device)


@dataclass(frozen=True)
class Transition:
    """One sampling step of each trajectory: ``x_t -> x_s`` ``[B, C, F, H, W]`` float32, levels ``t``, ``s`` ``[B]``."""

    x_t: torch.Tensor
    x_s: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    x_0: torch.Tensor


def transition(rollout: Rollout, steps: torch.Tensor) -> Transition:
    """Pick step ``steps[b]`` of trajectory ``b``; ``steps`` ``[B]`` int64 below ``K - 1`` (see ``draw_steps``)."""
    samples = torch.arange(len(steps), device=rollout.x_0.device)
    check_shape("steps", steps, (rollout.x_0.shape[0],))
    if not steps.is_cuda and bool(((steps < 0) | (steps >= len(rollout.levels) - 1)).any()):
        raise ValueError(f"steps: got {steps.tolist()}, expected values in [0, {len(rollout.levels) - 1})")
    levels = rollout.levels.to(rollout.x_0.device)
    return Transition(
        x_t=rollout.x_t[steps, samples],
        x_s=rollout.x_t[steps + 1, samples],
        t=levels[steps],
        s=levels[steps + 1],
        x_0=rollout.x_0,
    )


def chunk_elements(x: torch.Tensor, chunk_frames: Sequence[int]) -> list[int]:
    """Elements of each chunk in one sample of ``x`` ``[B, C, F, H, W]``."""
    per_frame = x.shape[1] * x.shape[3] * x.shape[4]
    return [frames * per_frame for frames in chunk_frames]


def step_log_prob(
    v: torch.Tensor,
    step: Transition,
    chunk_frames: Sequence[int],
    kernel: str = "consistency",
    noise_level: float = 0.7,
) -> torch.Tensor:
    """Log-probability of the sampled step under velocity ``v``, summed over each chunk, ``[B, N]`` float32."""
    if kernel == "consistency":
        return gaussian_log_prob(v, step.x_t, step.x_s, step.t, step.s, chunk_frames=tuple(chunk_frames))
    if kernel != "euler_maruyama":
        raise ValueError(f"kernel: got {kernel!r}, expected one of {', '.join(KERNELS)}")
    mean, std = euler_maruyama_kernel(v.float(), step.x_t, step.t, step.s, noise_level)
    density = -0.5 * ((step.x_s - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.stack([part.sum(dim=(1, 2, 3, 4)) for part in density.split(list(chunk_frames), dim=2)], dim=1)


def replay(
    model: torch.nn.Module,
    step: Transition,
    context: Any,
    chunk_frames: Sequence[int],
    *,
    sink: int = 0,
    window: int | None = None,
    kernel: str = "consistency",
    noise_level: float = 0.7,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate a step through the repacked forward: log-probability ``[B, N]`` and velocity ``[B, C, F, H, W]``.

    Deterministic for a given batch: the same weights and the same ``step`` give the same bits, with or without
    gradients. Old log-probabilities taken from here therefore make the first ratio exactly 1, which those recorded by
    the cached rollout (another batch shape, another summation order) would not.
    """
    v = repacked_forward(model, step.x_t, step.x_0, step.t, context, tuple(chunk_frames), sink=sink, window=window)
    return step_log_prob(v, step, chunk_frames, kernel, noise_level), v


def cm_grpo_loss(
    model: torch.nn.Module,
    step: Transition,
    advantages: torch.Tensor,
    context: Any,
    chunk_frames: Sequence[int],
    *,
    sink: int = 0,
    window: int | None = None,
    alpha: float = -1.0,
    scale: float = 100.0,
    clip: float | None = None,
    old_log_prob: torch.Tensor | None = None,
    kl: float = 0.0,
    reference: torch.nn.Module | None = None,
    kernel: str = "consistency",
    noise_level: float = 0.7,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Replay one step of every trajectory and return the loss to descend, with metrics (0-d tensors, detached).

    REINFORCE by default: on-policy, no ratio. With ``clip`` the PPO ratio against ``old_log_prob`` ``[B, N]`` (from
    ``replay`` under ``no_grad``, same batch). ``kl > 0`` adds that multiple of the KL divergence from ``reference``
    (same normalisation and chunk weights; the paper uses none). ``kernel="euler_maruyama"`` with ``clip`` is Flow-GRPO.
    """
    if (clip is None) != (old_log_prob is None):
        got = "None" if old_log_prob is None else "one"
        raise ValueError(f"old_log_prob: got {got} with clip {clip}, expected it with a clip (PPO ratio) and only then")
    if kl < 0 or (kl > 0 and reference is None):
        raise ValueError(
            f"kl: got {kl} with reference {type(reference).__name__}, expected 0, or more with a reference"
        )
    if kl > 0 and kernel != "consistency":
        raise ValueError(f"kl: got {kl} with kernel {kernel!r}, expected kernel 'consistency'")
    visible = {"sink": sink, "window": window}
    elements, frames = chunk_elements(step.x_t, chunk_frames), tuple(chunk_frames)
    if old_log_prob is None and kernel == "consistency":
        v = repacked_forward(model, step.x_t, step.x_0, step.t, context, frames, **visible)
        weights = chunk_weights(frames, alpha).tolist()
        loss, log_prob = policy_loss(v, step.x_t, step.x_s, step.t, step.s, advantages, frames, weights, scale)
    else:
        log_prob, v = replay(model, step, context, frames, kernel=kernel, noise_level=noise_level, **visible)
        if old_log_prob is None:
            loss = reinforce_loss(log_prob, advantages, elements, alpha, scale)
        else:
            loss = clipped_ratio_loss(log_prob, old_log_prob, advantages, elements, clip, alpha, scale)
    metrics = {"log_prob": (log_prob.detach().sum(dim=1) / sum(elements)).mean()}
    if old_log_prob is not None:
        ratio = policy_ratio(log_prob.detach(), old_log_prob, elements)
        metrics |= {"ratio": ratio.mean(), "clipped": ((ratio - 1).abs() > clip).float().mean()}
    if kl > 0:
        with torch.no_grad():
            v_reference = repacked_forward(
                reference, step.x_t, step.x_0, step.t, context, tuple(chunk_frames), **visible
            )
        divergence = consistency_kl(v, v_reference, step.t, step.s, chunk_frames)
        penalty = weighted_mean(divergence, elements, alpha).mean()
        loss = loss + kl * scale * penalty
        metrics["kl"] = penalty.detach()
    return loss, metrics


@torch.no_grad()
def sde_rollout(
    model: torch.nn.Module,
    context: Any,
    latent_shape: tuple[int, int, int],
    chunk_frames: Sequence[int],
    levels: torch.Tensor,
    sink: int = 0,
    window: int | None = None,
    generator: torch.Generator | None = None,
    noise_level: float = 0.7,
) -> Rollout:
    """Sample a batch on the cache with Euler-Maruyama steps (Flow-GRPO, arXiv 2505.05470) instead of consistency steps.

    The last step goes to level 0 without noise. Arguments and result as ``raven.stream.rollout``.
    """
    stream = Stream(model, context, latent_shape, tuple(chunk_frames), sink, window, generator=generator)
    values = [float(level) for level in levels]
    states: list[list[torch.Tensor]] = [[] for _ in values]
    finished = []
    for i in range(len(stream.sizes)):
        x = stream.noise()
        for k, t in enumerate(values):
            states[k].append(x)
            v = stream.velocity(x, t)
            if k + 1 == len(values):
                x = x0_from_velocity(v, x, t)
            else:
                mean, std = euler_maruyama_kernel(v, x, t, values[k + 1], noise_level)
                x = mean + std * stream.noise()
        if i + 1 < len(stream.sizes):
            stream.commit(x, defer=True)
        finished.append(x)
    x_t = torch.stack([torch.cat(chunks, dim=2) for chunks in states])
    x_0 = torch.cat(finished, dim=2)
    return Rollout(levels=torch.tensor(values, device=x_0.device), x_t=x_t, x_0=x_0)
