"""Anti-aliased drawing of flat shapes from their signed distances, vectorised over any batch."""

from __future__ import annotations

import torch

from raven.worlds.shapes.prompts import COLOURS, SHAPES

BACKGROUND = -0.84
# Near the corners of the colour cube, in [-1, 1], in the order of COLOURS: any two differ clearly in some channel.
PALETTE = (
    (0.90, -0.72, -0.72),
    (-0.70, 0.76, -0.64),
    (-0.66, -0.36, 0.96),
    (0.94, 0.80, -0.68),
    (-0.64, 0.80, 0.88),
    (0.76, -0.60, 0.90),
)
assert len(PALETTE) == len(COLOURS)

SQUARE = 0.88  # half side, in radii: the area of the circle
TRIANGLE = 0.9375  # half height, in radii, of an equilateral triangle that points up


def contrasts(device: torch.device | str | None = None) -> torch.Tensor:
    """``[6, 3]`` float32: each colour minus the background, which is what a shape adds to an empty picture."""
    return torch.tensor(PALETTE, dtype=torch.float32, device=device) - BACKGROUND


def signed_distance(shape: int, dx: torch.Tensor, dy: torch.Tensor, radius: float) -> torch.Tensor:
    """Pixels from ``(dx, dy)``, counted from the centre, to the outline of ``SHAPES[shape]``; negative inside."""
    if SHAPES[shape] == "circle":
        return torch.sqrt(dx * dx + dy * dy + 1e-12) - radius
    if SHAPES[shape] == "square":
        return torch.maximum(dx.abs(), dy.abs()) - SQUARE * radius
    half = TRIANGLE * radius
    return torch.maximum(0.75**0.5 * dx.abs() - 0.5 * (dy + half), dy - half)


def outward(shape: int, dx: torch.Tensor, dy: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of ``signed_distance`` in ``dx`` and ``dy``."""
    if SHAPES[shape] == "circle":
        inverse = torch.rsqrt(dx * dx + dy * dy + 1e-12)
        return dx * inverse, dy * inverse
    if SHAPES[shape] == "square":
        sideways = dx.abs() > dy.abs()
        return sideways * dx.sign(), ~sideways * dy.sign()
    half = TRIANGLE * radius
    slanted = 0.75**0.5 * dx.abs() - 0.5 * (dy + half) > dy - half
    return slanted * dx.sign() * 0.75**0.5, torch.where(slanted, -0.5, 1.0)


def coverage(shape: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: float) -> torch.Tensor:
    """Share of each pixel that a shape covers, in [0, 1]; ``shape`` (int64) broadcasts against the offsets."""
    distance = signed_distance(0, dx, dy, radius)
    for index in range(1, len(SHAPES)):
        distance = torch.where(shape == index, signed_distance(index, dx, dy, radius), distance)
    return (0.5 - distance).clamp(0, 1)


def draw(
    position: torch.Tensor,
    shape: torch.Tensor,
    colour: torch.Tensor,
    present: torch.Tensor,
    size: int,
    radius: float,
) -> torch.Tensor:
    """Pictures ``[..., 3, size, size]`` float32 in [-1, 1]; later shapes lie over earlier ones.

    ``position [..., M, 2]`` float32 in pixels (x, y; the top left pixel's centre is (0.5, 0.5)),
    ``shape [..., M]``, ``colour [..., M]`` int64, ``present [..., M]`` bool.
    """
    centres = torch.arange(size, dtype=torch.float32, device=position.device) + 0.5
    pictures = torch.full((*position.shape[:-2], 3, size, size), BACKGROUND, device=position.device)
    palette = torch.tensor(PALETTE, device=position.device)
    for m in range(position.shape[-2]):
        dx = centres - position[..., m, 0, None, None]  # [..., 1, size]
        dy = centres[:, None] - position[..., m, 1, None, None]  # [..., size, 1]
        alpha = coverage(shape[..., m, None, None], dx, dy, radius) * present[..., m, None, None]
        pictures = torch.lerp(pictures, palette[colour[..., m]][..., None, None], alpha[..., None, :, :])
    return pictures
