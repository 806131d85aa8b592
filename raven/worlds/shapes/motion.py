"""From fitted objects to tracks, and from tracks to measured motion, reflections at the walls included."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch

from raven.worlds.shapes.fit import Fit
from raven.worlds.shapes.scenes import fold

HYPOTHESES = 80  # speeds tried per direction when the bounces of a track are located


@dataclass(frozen=True)
class Tracks:
    """Objects followed through the frames of each video, in no particular order.

    ``position [B, F, M, 2]``, ``shape``, ``colour``, ``found``, ``hidden`` ``[B, F, M]``. A track is hidden in a
    frame when it was not found there and another object covers the place where it should be.
    """

    position: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    found: torch.Tensor
    hidden: torch.Tensor


def _orders(count: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(list(permutations(range(count))), device=device)  # [M!, M]


def follow(fit: Fit, reach: float) -> Tracks:
    """Link the objects of ``fit`` (``[B, F, M]``) frame by frame.

    Of all assignments of a frame's objects to the tracks so far, the one with the least change of place
    (saturating at ``reach`` pixels), colour and shape is taken. A track keeps its last sighting while it is lost.
    """
    batch, frames, count = fit.found.shape
    device = fit.found.device
    orders = _orders(count, device)
    slots = torch.arange(count, device=device)
    place, colour, shape, seen = (x[:, 0] for x in (fit.position, fit.colour, fit.shape, fit.found))
    picks = [slots.expand(batch, -1)]
    for f in range(1, frames):
        new_place, new_colour, new_shape, new = (x[:, f] for x in (fit.position, fit.colour, fit.shape, fit.found))
        way = (place[:, :, None] - new_place[:, None]).norm(dim=-1)
        change = (way / reach).clamp(max=1) + 1.0 * (colour[:, :, None] != new_colour[:, None])
        change = change + 0.25 * (shape[:, :, None] != new_shape[:, None])
        change = torch.where(seen[:, :, None], change, 1.2)  # opening a track: dearer than keeping one in sight
        change = torch.where(new[:, None], change, 1.0)
        cost = change[:, slots, orders].sum(-1)  # [B, M!]
        pick = orders[cost.argmin(1)]  # [B, M]
        picks.append(pick)
        arrived = new.gather(1, pick)
        place = torch.where(arrived[..., None], new_place.gather(1, pick[..., None].expand(-1, -1, 2)), place)
        colour = torch.where(arrived, new_colour.gather(1, pick), colour)
        shape = torch.where(arrived, new_shape.gather(1, pick), shape)
        seen = seen | arrived
    pick = torch.stack(picks, 1)  # [B, F, M]
    position = fit.position.gather(2, pick[..., None].expand(-1, -1, -1, 2))
    found = fit.found.gather(2, pick)
    hidden = _hidden(position, found, 0.9 * fit.radius)
    return Tracks(position, fit.shape.gather(2, pick), fit.colour.gather(2, pick), found, hidden)


def _hidden(position: torch.Tensor, found: torch.Tensor, near: float) -> torch.Tensor:
    """Where a lost track, interpolated between its sightings, lies within ``near`` pixels of a found object."""
    frames = found.shape[1]
    time = torch.arange(frames, device=found.device)[None, :, None].expand_as(found)
    before = torch.where(found, time, -1).cummax(1).values
    after = torch.where(found, time, frames).flip(1).cummin(1).values.flip(1)
    ever = found.any(1, keepdim=True)
    before, after = torch.where(before < 0, after, before), torch.where(after >= frames, before, after)
    before, after = before.clamp(0, frames - 1), after.clamp(0, frames - 1)
    a = position.gather(1, before[..., None].expand_as(position))
    b = position.gather(1, after[..., None].expand_as(position))
    share = (time - before) / (after - before).clamp(min=1)
    guess = torch.lerp(a, b, share[..., None].to(a.dtype))
    gap = (guess[:, :, :, None] - position[:, :, None]).norm(dim=-1)  # [B, F, lost, other]
    covered = ((gap < near) & found[:, :, None]).any(-1)
    return covered & ~found & ever


@dataclass(frozen=True)
class Motion:
    """``velocity [B, N, M, 2]``: pixels per frame at the start of each window, unfolded at the walls.

    ``known [B, N, M]``: enough sightings to tell. ``anchor [B, N, M, 2]``: the first sighting in the window.
    """

    velocity: torch.Tensor
    known: torch.Tensor
    anchor: torch.Tensor


def measure(
    tracks: Tracks, windows: torch.Tensor, inside: torch.Tensor, walls: tuple[float, float], top: float
) -> Motion:
    """Constant speed with reflections, fitted to each track in each window of frames.

    ``windows [N, W]`` int64 frame indices, ``inside [N, W]`` bool (padding is false), ``walls`` (margin, extent),
    ``top`` the highest speed tried. Two steps per axis: the hypothesis (direction, speed) whose reflected path
    from the first sighting is nearest the others locates the bounces; then the path is unfolded there and its
    slope comes from least squares, so that jitter averages out instead of counting as speed.
    """
    margin, extent = walls
    position = (tracks.position[:, windows] - margin).clamp(0, extent)  # [B, N, W, M, 2]
    weight = (tracks.found[:, windows] & inside[None, :, :, None]).to(position.dtype)[..., None]  # [B, N, W, M, 1]
    known = weight.sum(2)[..., 0] >= 2
    time = windows.to(position.dtype)[None, :, :, None, None]
    first = weight.argmax(2, keepdim=True)  # ties go to the first
    anchor = position.gather(2, first.expand(-1, -1, -1, -1, 2))  # [B, N, 1, M, 2]
    elapsed = time - time.expand(len(position), -1, -1, position.shape[3], -1).gather(2, first)
    speeds = torch.linspace(-top, top, 2 * HYPOTHESES + 1, device=position.device)
    path = anchor[..., None] + speeds * elapsed[..., None]  # [B, N, W, M, 2, 161]
    error = ((fold(path, extent) - position[..., None]) ** 2 * weight[..., None]).sum(2)
    # A hair in favour of slowness, so that a still object is still rather than bouncing at the wall it touches.
    speed = speeds[(error + 1e-4 * speeds.abs()).argmin(-1)][:, :, None]  # [B, N, 1, M, 2]
    branch = torch.floor((anchor + speed * elapsed) / extent)
    unfolded = branch * extent + torch.where(branch % 2 == 0, position, extent - position)
    mass = weight.sum(2, keepdim=True).clamp(min=1)
    lag = (elapsed - (elapsed * weight).sum(2, keepdim=True) / mass) * weight
    slope = (lag * unfolded).sum(2) / (lag * elapsed).sum(2).clamp(min=1e-6)
    return Motion(torch.where(known[..., None], slope, 0.0), known, anchor[:, :, 0])
