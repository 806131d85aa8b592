"""Quality, semantic and dynamic of videos: what was fitted to the frames, held against the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from raven.worlds.shapes.fit import Fit
from raven.worlds.shapes.motion import Motion, Tracks, follow, measure


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of videos, all float32 in [0, 1] and 1 for what the renderer itself makes.

    ``quality``, ``semantic``, ``dynamic``: ``[B]``, the mean over frames. ``per_chunk``: the same names, ``[B, N]``.
    ``attributes``: semantic in parts, ``colour``, ``shape``, ``direction``, ``speed``, ``count``, ``[B, N]`` each.
    """

    quality: torch.Tensor
    semantic: torch.Tensor
    dynamic: torch.Tensor
    per_chunk: dict[str, torch.Tensor]
    attributes: dict[str, torch.Tensor]


def _windows(sizes: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames ``[N, W]`` from which each chunk's motion is measured, and which of them are no padding.

    A chunk's own frames and the two before, so that the step into the chunk counts; at least three if there are.
    """
    frames, rows, end = sum(sizes), [], 0
    for size in sizes:
        begin, end = end, end + size
        low = max(0, begin - 2)
        rows.append(list(range(low, min(frames, max(end, low + 3)))))
    width = max(len(row) for row in rows)
    index = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], device=device)
    inside = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return index, inside


def _chunk_mean(values: torch.Tensor, weight: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Weighted mean of ``values [B, F, ...]`` over the frames of each chunk, ``[B, N, ...]``; 1 without any weight."""
    means = []
    for v, w in zip(values.split(list(sizes), 1), weight.split(list(sizes), 1), strict=True):
        mass = w.sum(1)
        means.append(torch.where(mass > 0, (v * w).sum(1) / mass.clamp(min=1e-6), 1.0))
    return torch.stack(means, 1)


def _direction_holds(
    motion: Motion,
    tracks: Tracks,
    direction: torch.Tensor,
    windows: torch.Tensor,
    walls: tuple[float, float],
    speeds: tuple[float, float],
) -> torch.Tensor:
    """``[B, N, tracks, clauses]`` bool: does the track move as the clause (``direction [B, M]``) says?

    It must move along the prompted axis. Its sense must be the prompted one until it first comes near a wall;
    from then on only the sense it started with counts, since every bounce turns it round.
    """
    margin, extent = walls
    near = speeds[1] + 0.016 * (extent + 2 * margin)  # a bounce shows at most half a step away; twice that is allowed
    axis = (direction >= 2).long()[:, None, None]  # [B, 1, 1, clauses]
    sign = torch.where(direction % 2 == 0, -1.0, 1.0)[:, None, None]
    batch, chunks, count = motion.known.shape
    shape = (batch, chunks, count, direction.shape[1])
    along = motion.velocity.gather(3, axis.expand(shape))
    across = motion.velocity.gather(3, (1 - axis).expand(shape))
    on_axis = (along.abs() > across.abs()) & (along.abs() > 0.25 * speeds[0]) & motion.known[..., None]
    agrees = along * sign > 0

    place = tracks.position - margin  # [B, F, tracks, 2]
    close = near + speeds[1] * (~tracks.found[..., None])  # a bounce may have gone unseen
    at_wall = (torch.minimum(place, extent - place) < close).cummax(1).values
    touched = at_wall[:, windows[:, 0]].gather(3, axis.expand(shape))  # by the window's first frame
    first = (motion.known.float()).argmax(1)[:, None, :, None].expand(-1, 1, -1, shape[3])
    begun_well = agrees.gather(1, first)
    return on_axis & torch.where(touched, begun_well, agrees)


def score(
    fit: Fit,
    table: torch.Tensor,
    present: torch.Tensor,
    sizes: Sequence[int],
    walls: tuple[float, float],
    speeds: tuple[float, float],
) -> Scores:
    """Scores of fitted videos: ``fit [B, F, M]``, and of the prompts ``table [B, M, 4]``, ``present [B, M]``.

    Objects are followed first and matched to clauses afterwards, each video by the assignment under which most
    attributes hold. Per clause: colour, shape (share of the frames), direction, speed (nearest of slow and fast);
    one attribute more for the number of shapes. Frames in which a track is hidden behind another do not count.
    """
    device = fit.found.device
    count = fit.found.shape[-1]
    tracks = follow(fit, reach=3 * speeds[1])
    windows, inside = _windows(sizes, device)
    motion = measure(tracks, windows, inside, walls, top=2 * speeds[1])
    colour, shape, direction, speed = table.unbind(-1)

    counts = (~tracks.hidden).float()  # [B, F, tracks]
    found = tracks.found.float()
    same_colour = found[..., None] * (tracks.colour[..., None] == colour[:, None, None])
    same_shape = found[..., None] * (tracks.shape[..., None] == shape[:, None, None])
    colour_holds = _chunk_mean(same_colour, counts[..., None], sizes)  # [B, N, tracks, clauses]
    shape_holds = _chunk_mean(same_shape, counts[..., None], sizes)

    wanted = torch.tensor(speeds, device=device)[speed][:, None, None]  # [B, 1, 1, clauses]
    pace = motion.velocity.norm(dim=-1)[..., None]  # [B, N, tracks, 1]
    ratio = torch.minimum(pace / wanted, wanted / pace.clamp(min=1e-6))
    border = (speeds[0] * speeds[1]) ** 0.5
    right_class = (pace > border) == (wanted > border)
    speed_holds = right_class & (pace > 0.5 * speeds[0]) & (pace < 2 * speeds[1])
    direction_holds = _direction_holds(motion, tracks, direction, windows, walls, speeds)
    # Motion that cannot be seen because the track is hidden says nothing: it has no weight.
    unseen = ~motion.known & (tracks.hidden[:, windows] & inside[None, :, :, None]).any(2)  # [B, N, tracks]
    moves = (~unseen).float()[..., None].expand_as(colour_holds)

    held = torch.stack([colour_holds, shape_holds, direction_holds * moves, speed_holds * moves], -1)
    weight = torch.stack([torch.ones_like(moves), torch.ones_like(moves), moves, moves], -1)
    worth = held.sum((1, 4))  # [B, tracks, clauses]
    orders = torch.tensor(list(permutations(range(count))), device=device)  # track of each clause
    clauses = torch.arange(count, device=device)
    total = (worth[:, orders, clauses] * present[:, None]).sum(-1)  # [B, M!]
    pick = orders[total.argmax(1)]  # [B, clauses]

    def matched(values: torch.Tensor) -> torch.Tensor:  # [B, N, tracks, clauses, ...] -> [B, N, clauses, ...]
        index = pick[:, None, None].reshape(len(pick), 1, 1, count, *[1] * (values.ndim - 4))
        return values.gather(2, index.expand(-1, values.shape[1], -1, -1, *values.shape[4:]))[:, :, 0]

    exists = present.float()[:, None, :, None]
    held, weight = matched(held) * exists, matched(weight) * exists  # [B, N, clauses, 4]
    here = (tracks.found | tracks.hidden).sum(2)
    right_count = (here == present.sum(1)[:, None]).float()
    count_holds = _chunk_mean(right_count, torch.ones_like(right_count), sizes)
    semantic = (held.sum((2, 3)) + count_holds) / (weight.sum((2, 3)) + 1)
    paces = matched(ratio * motion.known[..., None] * moves) * exists[..., 0]
    moving = (matched(moves) * exists[..., 0]).sum(2)
    dynamic = torch.where(moving > 0, paces.sum(2) / moving.clamp(min=1e-6), 0.0)
    quality = _chunk_mean(fit.quality, torch.ones_like(fit.quality), sizes)

    names = ("colour", "shape", "direction", "speed")
    mass = weight.sum(2)
    parts = torch.where(mass > 0, held.sum(2) / mass.clamp(min=1e-6), 0.0)
    attributes = {name: parts[..., i] for i, name in enumerate(names)} | {"count": count_holds}
    per_chunk = {"quality": quality, "semantic": semantic, "dynamic": dynamic}
    share = torch.tensor(sizes, dtype=torch.float32, device=device) / sum(sizes)
    means = {name: (values * share).sum(1) for name, values in per_chunk.items()}
    return Scores(**means, per_chunk=per_chunk, attributes=attributes)
