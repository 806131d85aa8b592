"""What samplers share: noise from generators, noise levels, guidance; and sampling with a bidirectional model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven.models.wan import CausalWan, Context, TextCache
from raven.schedule import sampling_levels

Generators = torch.Generator | Sequence[torch.Generator] | None
SAMPLERS = ("consistency", "ode")


def draw(shape: Sequence[int], generator: Generators, model: CausalWan) -> torch.Tensor:
    """Standard normal latents ``[B, ...]``, drawn where the generator lives; a list has one generator a sample."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    if generator is None or isinstance(generator, torch.Generator):
        where = model.device if generator is None else generator.device
        # Pinned, so that the copy need not wait until the GPU has finished what came before.
        pinned = where.type == "cpu" and model.device.type == "cuda"
        noise = torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype, pin_memory=pinned)
        return noise.to(model.device, non_blocking=pinned)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: got {len(generator)} generators, expected one or {shape[0]}")
    return torch.cat([draw((1, *shape[1:]), g, model) for g in generator])


def checked_levels(levels: torch.Tensor | Sequence[float] | None, sampler: str = "consistency") -> list[float]:
    """Noise levels as numbers, checked once: descending, in (0, 1]. The sampler's name is checked with them."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    values = [float(t) for t in (sampling_levels(4) if levels is None else levels)]
    falling = all(a > b for a, b in zip(values, [*values[1:], 0.0], strict=False))
    if not values or values[0] > 1 or not falling:
        shown = values if len(values) <= 8 else f"{len(values)} of them, the last ones {values[-3:]}"
        raise ValueError(f"levels: got {shown}, expected descending levels in (0, 1]")
    return values


def guided(v: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance of a batch that holds the prompts, then the negative prompts."""
    cond, uncond = v.chunk(2)
    return uncond + guidance * (cond - uncond)


@torch.no_grad()
def sample_bidirectional(
    model: CausalWan,
    context: Context,
    negative_context: Context | None,
    shape: Sequence[int],
    steps: int = 50,
    guidance: float = 5.0,
    shift: float = 5.0,
    generator: Generators = None,
) -> torch.Tensor:
    """Sample whole videos ``[B, C, F, H, W]`` with a bidirectional model: Euler steps of the probability-flow ODE.

    ``shape`` is (C, F, H, W); B is the number of prompts. ``negative_context`` (as many prompts) switches on
    classifier-free guidance; both halves run in one forward.
    """
    text = model.encode_text(context)
    batch = len(text)
    if negative_context is not None:
        text = TextCache.cat([text, model.encode_text(negative_context)])
        if len(text) != 2 * batch:
            raise ValueError(f"negative_context: got {len(text) - batch} prompts, expected {batch}")
    x = draw((batch, *shape), generator, model)
    levels = checked_levels(sampling_levels(steps, shift))
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        v = model(x, t, text) if negative_context is None else guided(model(torch.cat([x, x]), t, text), guidance)
        x = x + (s - t) * v
    return x
