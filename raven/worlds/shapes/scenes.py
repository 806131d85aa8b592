"""What happens in a video: which shapes, where they start, how they move. All numbers are drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raven.worlds.shapes.prompts import COLOURS, DIRECTIONS, SHAPES, SPEEDS, Clause

_MASK64 = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64-bit words that scatters counters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, first: int, count: int, draws: int, stream: int = 0) -> np.ndarray:
    """``[count, draws]`` float64 numbers in [0, 1); row ``i`` depends on ``seed``, ``stream``, ``first + i`` only.

    Counter-based, so a sample is the same alone or in a batch, and on every device.
    """
    key = _mix(np.array([(seed * 2 + 1) & _MASK64, (stream * 2 + 1) & _MASK64], dtype=np.uint64))
    rows = np.arange(first, first + count, dtype=np.uint64)
    columns = np.arange(1, draws + 1, dtype=np.uint64)
    row_key = _mix(_mix(rows + key[0]) ^ key[1])
    words = _mix(row_key[:, None] + columns[None, :] * np.uint64(0x9E3779B97F4A7C15))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_clauses(seed: int, first: int, count: int, min_shapes: int, max_shapes: int) -> list[list[Clause]]:
    """Clauses of ``count`` random prompts; the colours within a prompt differ."""
    u = uniforms(seed, first, count, 1 + len(COLOURS) + 3 * max_shapes)
    how_many = min_shapes + (u[:, 0] * (max_shapes - min_shapes + 1)).astype(np.int64)
    colours = np.argsort(u[:, 1 : 1 + len(COLOURS)], axis=1)
    rest = u[:, 1 + len(COLOURS) :].reshape(count, max_shapes, 3)
    picks = (rest * np.array([len(SHAPES), len(DIRECTIONS), len(SPEEDS)])).astype(np.int64)
    return [
        [
            Clause(COLOURS[colours[b, m]], SHAPES[picks[b, m, 0]], DIRECTIONS[picks[b, m, 1]], SPEEDS[picks[b, m, 2]])
            for m in range(how_many[b])
        ]
        for b in range(count)
    ]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes on the CPU. M is ``max_shapes``; slots beyond a sample's shapes have ``present`` false.

    ``colour``, ``shape``, ``direction``, ``speed``: int64 ``[B, M]``, indices into the word lists.
    ``present``: bool ``[B, M]``. ``start``: float32 ``[B, M, 2]``, first centre (x, y) in pixels.
    ``velocity``: float32 ``[B, M, 2]``, pixels per frame before the first bounce.
    ``margin``, ``extent``: a centre moves between ``margin`` and ``margin + extent`` on both axes.
    """

    colour: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor
    speed: torch.Tensor
    present: torch.Tensor
    start: torch.Tensor
    velocity: torch.Tensor
    margin: float
    extent: float

    def positions(self, frames: int, first_frame: int = 0) -> torch.Tensor:
        """Centres ``[B, F, M, 2]`` float32 in pixels, reflected at the walls."""
        time = torch.arange(first_frame, first_frame + frames, dtype=torch.float64)[None, :, None, None]
        path = self.start[:, None].double() - self.margin + self.velocity[:, None].double() * time
        return (fold(path, self.extent) + self.margin).float()


def fold(path: torch.Tensor, extent: float) -> torch.Tensor:
    """Reflect a straight path into ``[0, extent]``."""
    return extent - (torch.remainder(path, 2 * extent) - extent).abs()


def clause_table(clauses: Sequence[Sequence[Clause]], max_shapes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, M, 4]`` int64 indices (colour, shape, direction, speed) and ``[B, M]`` bool: which slots are used."""
    table = np.zeros((len(clauses), max_shapes, 4), dtype=np.int64)
    present = np.zeros((len(clauses), max_shapes), dtype=bool)
    for b, row in enumerate(clauses):
        for m, clause in enumerate(row):
            table[b, m] = clause.indices
            present[b, m] = True
    return torch.from_numpy(table), torch.from_numpy(present)


def place(
    clauses: Sequence[Sequence[Clause]],
    max_shapes: int,
    seed: int,
    first: int,
    *,
    size: int,
    radius: float,
    margin: float,
    speeds: tuple[float, float],
    candidates: int = 8,
) -> Scenes:
    """Give every clause a start. Shapes start apart, and at least a quarter of the picture away from the wall ahead.

    The room ahead makes the prompted direction visible before the first bounce. Of ``candidates`` drawn starts
    the first that overlaps no earlier shape is taken, or else the one farthest from them.
    """
    count, extent = len(clauses), size - 2 * margin
    table, present = clause_table(clauses, max_shapes)
    direction, speed = table[..., 2], table[..., 3]
    axis = torch.where(direction < 2, 0, 1)
    sign = torch.where(direction % 2 == 0, -1.0, 1.0)  # left and up are towards smaller coordinates
    u = uniforms(seed, first, count, max_shapes * candidates * 2, stream=1)
    u = torch.from_numpy(u).reshape(count, max_shapes, candidates, 2)
    ahead = size / 4 + u[..., 0] * (extent - size / 4)
    along = torch.where(sign[..., None] > 0, extent - ahead, ahead)
    across = u[..., 1] * extent
    on_x = (axis == 0)[..., None]
    options = margin + torch.stack([torch.where(on_x, along, across), torch.where(on_x, across, along)], -1)
    start = torch.zeros(count, max_shapes, 2, dtype=torch.float64)
    start[:, 0] = options[:, 0, 0]
    for m in range(1, max_shapes):
        apart = (options[:, m, :, None] - start[:, None, :m]).norm(dim=-1).amin(-1)  # [B, candidates]
        best = apart.clamp(max=2.2 * radius).argmax(1)  # ties go to the first
        start[:, m] = options[torch.arange(count), m, best]
    step = sign * torch.tensor(speeds, dtype=torch.float64)[speed]
    velocity = torch.stack([torch.where(axis == 0, step, 0.0), torch.where(axis == 1, step, 0.0)], -1)
    return Scenes(
        table[..., 0], table[..., 1], direction, speed, present, start.float(), velocity.float(), margin, extent
    )
