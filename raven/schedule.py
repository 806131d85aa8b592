"""Noise levels and the two stochastic steps: consistency, and Euler-Maruyama.

Rectified flow: ``x_t = A(t) x_0 + B(t) eps`` with ``A = 1 - t``, ``B = t``, and the velocity ``v = eps - x_0``, so that
``x_0 = x_t - t v``. Levels are in [0, 1] everywhere; the network's embedding receives ``1000 t``.

A level is a number, a tensor ``[B]`` (one per sample), ``[B, F]`` (one per latent frame), ``[B, N]`` together with
``chunk_frames`` (one per chunk), or has already one dimension per dimension of the tensor it goes with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven.errors import check_level, check_shape

Level = torch.Tensor | float


def shift_level(u: Level, shift: float = 5.0) -> Level:
    """Move levels towards noise: ``shift u / (1 + (shift - 1) u)``. 0 and 1 stay; ``shift = 1`` changes nothing."""
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, expected a positive number")
    check_level("u", u)
    return shift * u / (1 + (shift - 1) * u)


def sampling_levels(steps: int = 4, shift: float = 5.0, device: torch.device | str | None = None) -> torch.Tensor:
    """Levels at which the network is evaluated, ``[steps]`` float32, falling from 1; the step after the last ends at 0.

    Equal steps, shifted, rounded to 1/1000 as the embedding's table of a thousand entries asks:
    4 steps at shift 5 give 1.000, 0.938, 0.833, 0.625 (RAVEN, arXiv 2605.15190).
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    levels = [round(1000 * shift_level(1 - k / steps, shift)) / 1000 for k in range(steps)]
    return torch.tensor(levels, dtype=torch.float32, device=device)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 when one of the tensors is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def check_chunk_frames(chunk_frames: Sequence[int], like: torch.Tensor) -> tuple[int, ...]:
    """``chunk_frames`` as a tuple; ``ValueError`` unless the sizes are positive and sum to ``like.shape[2]``."""
    sizes = tuple(int(f) for f in chunk_frames)
    if like.dim() < 3:
        raise ValueError(
            f"chunk_frames: got {sizes} for a tensor of shape {tuple(like.shape)}, expected [B, C, F, ...]"
        )
    if not sizes or min(sizes) < 1 or sum(sizes) != like.shape[2]:
        raise ValueError(f"chunk_frames: got {sizes}, expected positive sizes with sum {like.shape[2]}")
    return sizes


def level_table(
    name: str, level: Level, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A level as ``[rows, columns]`` of ``dtype``, mostly a view; its range is not checked.

    Takes a number, a tensor without dimensions (of any device), ``[rows]`` or ``[rows, columns]``.
    """
    if not isinstance(level, torch.Tensor):
        return torch.full((1, 1), level, dtype=dtype, device=device).expand(rows, columns)
    if not level.is_floating_point():
        raise TypeError(f"{name}: got dtype {str(level.dtype).removeprefix('torch.')}, expected a floating point level")
    if level.dim() == 0:
        return level.to(device, dtype).expand(rows, columns)
    if level.device != device:
        raise ValueError(f"{name}: got device {level.device}, expected {device}")
    if level.dim() == 1 and level.shape[0] == rows:
        return level.to(dtype)[:, None].expand(rows, columns)
    if level.dim() == 2 and tuple(level.shape) == (rows, columns):
        return level.to(dtype)
    takes = f"a number, [{rows}]" + (f" or [{rows}, {columns}]" if columns > 1 else "")
    raise ValueError(f"{name}: got shape {tuple(level.shape)}, expected {takes}")


def expand_level(
    level: Level, like: torch.Tensor, chunk_frames: Sequence[int] | None = None, name: str = "level"
) -> torch.Tensor:
    """A level in the shape that broadcasts against ``like``, in float32 (float64 for float64 ``like``).

    Args:
        level: a number, ``[B]``, ``[B, F]`` with one level per latent frame, ``[B, N]`` when ``chunk_frames`` is given,
            or a tensor with as many dimensions as ``like`` that already broadcasts against it.
        like: ``[B, ...]``; frames are dimension 2 of ``[B, C, F, ...]``.
        chunk_frames: frames of each of the N chunks; they sum to F.
        name: how error messages call the level.

    Returns:
        ``[B, 1, ...]``, or ``[B, 1, F, 1, ...]``, of ``like.dim()`` dimensions. No device synchronisation.

    Raises:
        ValueError: shape, device, chunk sizes, a level outside [0, 1] (a CUDA tensor is not read back).
    """
    check_level(name, level)
    rows, dims = like.shape[0], like.dim()
    if isinstance(level, torch.Tensor) and level.dim() == dims and dims > 1 and (dims > 2 or level.shape[1] == 1):
        if any(got not in (1, size) for got, size in zip(level.shape, like.shape, strict=True)):
            raise ValueError(
                f"{name}: got shape {tuple(level.shape)}, expected one that broadcasts to {tuple(like.shape)}"
            )
        return level.to(compute_dtype(like))
    per_chunk = None if chunk_frames is None else check_chunk_frames(chunk_frames, like)
    place = (like.device, compute_dtype(like))
    if not isinstance(level, torch.Tensor) or level.dim() < 2:
        return level_table(name, level, rows, 1, *place).reshape((rows,) + (1,) * (dims - 1))
    if dims < 3:
        raise ValueError(f"{name}: got shape {tuple(level.shape)}, expected a number or [{rows}]")
    table = level_table(name, level, rows, like.shape[2] if per_chunk is None else len(per_chunk), *place)
    if per_chunk is not None:
        # Pieces and not repeat_interleave with a tensor: that one reads the counts back from the device.
        table = torch.cat([table[:, n : n + 1].expand(rows, f) for n, f in enumerate(per_chunk)], dim=1)
    return table.reshape((rows, 1, table.shape[1]) + (1,) * (dims - 3))


def _check_pair(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    check_shape(name, x, tuple(other.shape))
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, expected {other.device} like {other_name}")


def add_noise(
    x_0: torch.Tensor, noise: torch.Tensor, t: Level, chunk_frames: Sequence[int] | None = None
) -> torch.Tensor:
    """``(1 - t) x_0 + t noise``, shape and dtype of ``x_0``; computed in float32 at least."""
    _check_pair("noise", noise, "x_0", x_0)
    t = expand_level(t, x_0, chunk_frames, "t")
    return ((1 - t) * x_0 + t * noise).to(x_0.dtype)


def x0_from_velocity(
    v: torch.Tensor, x_t: torch.Tensor, t: Level, chunk_frames: Sequence[int] | None = None
) -> torch.Tensor:
    """The clean video that a velocity implies, ``x_t - t v``, shape and dtype of ``x_t``."""
    _check_pair("v", v, "x_t", x_t)
    return (x_t - expand_level(t, x_t, chunk_frames, "t") * v).to(x_t.dtype)


def velocity_from_x0(
    x_0: torch.Tensor, x_t: torch.Tensor, t: Level, chunk_frames: Sequence[int] | None = None
) -> torch.Tensor:
    """The velocity that a clean video implies, ``(x_t - x_0) / t``, shape and dtype of ``x_t``; t = 0 has none."""
    _check_pair("x_0", x_0, "x_t", x_t)
    check_level("t", t, exclusive=True)
    return ((x_t - x_0) / expand_level(t, x_t, chunk_frames, "t")).to(x_t.dtype)


def consistency_kernel(
    v: torch.Tensor, x_t: torch.Tensor, t: Level, s: Level, chunk_frames: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the consistency step from level t to s (RAVEN, arXiv 2605.15190).

    ``mean = (1 - s)(x_t - t v)`` like ``x_t``, ``std = s``, broadcastable against it; both float32 (float64 for
    float64 inputs), because densities are made of them. ``s = 0`` gives the clean video and a standard deviation of 0.
    """
    _check_pair("v", v, "x_t", x_t)
    t, s = expand_level(t, x_t, chunk_frames, "t"), expand_level(s, x_t, chunk_frames, "s")
    return (1 - s) * (x_t - t * v), s


def euler_maruyama_kernel(
    v: torch.Tensor,
    x_t: torch.Tensor,
    t: Level,
    s: Level,
    noise_level: float,
    chunk_frames: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of one Euler-Maruyama step of the reverse SDE (Flow-GRPO, arXiv 2505.05470).

    With ``dt = s - t < 0``, ``g = noise_level`` and ``sigma^2 = g^2 t / (1 - t)``:
    ``mean = x_t (1 + sigma^2 dt / (2 t)) + v (1 + sigma^2 (1 - t) / (2 t)) dt``, ``std = sigma sqrt(-dt)``.
    At t = 1 that ``1 - t`` under sigma is taken at the next level instead: ``sigma^2 = g^2 / (1 - s)``.
    ``noise_level = 0`` is the Euler step of the ODE.

    Returns ``mean`` like ``x_t`` and ``std`` broadcastable against it, float32 (float64 for float64 inputs).
    Raises ``ValueError`` for a negative ``noise_level``, and for numbers or CPU tensors that break ``0 <= s < t``;
    CUDA tensors are not read back, such a level gives NaN there.
    """
    _check_pair("v", v, "x_t", x_t)
    if not noise_level >= 0:
        raise ValueError(f"noise_level: got {noise_level}, expected a number of at least 0")
    check_level("t", t, exclusive=True)
    t, s = expand_level(t, x_t, chunk_frames, "t"), expand_level(s, x_t, chunk_frames, "s")
    if not (t.is_cuda or t.is_meta or torch.compiler.is_compiling()) and bool((s >= t).any()):
        raise ValueError("s: got a level that is not below t, expected s < t everywhere")
    dt = s - t
    # sigma^2 / t: the factor t of sigma^2 cancels in the mean.
    rate = noise_level**2 / (1 - torch.where(t == 1, s, t))
    mean = x_t * (1 + rate * dt / 2) + v * (1 + rate * (1 - t) / 2) * dt
    return mean, (rate * t * -dt).sqrt()
