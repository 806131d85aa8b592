"""From fitted objects to tracks, and from tracks to measured motion, reflections at the walls included."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import torch
from torch.nn.functional import one_hot

from raven.worlds.shapes.fit import Fit
from raven.worlds.shapes.prompts import COLOURS, SHAPES
from raven.worlds.shapes.scenes import fold

MEMORY = 0.8  # weight of a track's past colours and shapes against the newest
HYPOTHESES = 80  # speeds tried per direction when the bounces of a track are located


@dataclass(frozen=True)
class Tracks:
    """Objects followed through the frames of each video, in no particular order.

    ``position [B, F, M, 2]``, interpolated where the track was not found; ``shape``, ``colour``, ``found``, ``hidden``
    ``[B, F, M]``. A track is hidden in a frame when it was not found there and another object covers its place.
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
    (saturating at ``reach`` pixels), colour and shape is taken. A track keeps its last sighting while it is lost,
    and its colour is a fading memory of all sightings, so that one misread frame does not change who is who.
    """
    batch, frames, count = fit.found.shape
    device = fit.found.device
    orders = _orders(count, device)
    slots = torch.arange(count, device=device)
    labels = torch.cat([one_hot(fit.colour, len(COLOURS)), 0.25 * one_hot(fit.shape, len(SHAPES))], -1)
    labels = labels * fit.found[..., None]  # [B, F, M, 9]
    place, seen, past = fit.position[:, 0], fit.found[:, 0], labels[:, 0]
    picks = [slots.expand(batch, -1)]
    for f in range(1, frames):
        new_place, new, new_label = fit.position[:, f], fit.found[:, f], labels[:, f]
        way = (place[:, :, None] - new_place[:, None]).norm(dim=-1)
        habit = past / past[..., : len(COLOURS)].sum(-1, keepdim=True).clamp(min=1e-6)
        change = (way / reach).clamp(max=1) + 0.5 * (habit[:, :, None] - new_label[:, None]).abs().sum(-1)
        change = torch.where(seen[:, :, None], change, 1.2)  # opening a track: dearer than keeping one in sight
        change = torch.where(new[:, None], change, 1.0)
        cost = change[:, slots, orders].sum(-1)  # [B, M!]
        pick = orders[cost.argmin(1)]  # [B, M]
        picks.append(pick)
        arrived = new.gather(1, pick)[..., None]
        place = torch.where(arrived, new_place.gather(1, pick[..., None].expand(-1, -1, 2)), place)
        past = MEMORY * past + new_label.gather(1, pick[..., None].expand(-1, -1, labels.shape[-1]))
        seen = seen | arrived[..., 0]
    pick = torch.stack(picks, 1)  # [B, F, M]
    position = fit.position.gather(2, pick[..., None].expand(-1, -1, -1, 2))
    found = fit.found.gather(2, pick)
    position, hidden = _hidden(position, found, 0.9 * fit.radius)
    return Tracks(position, fit.shape.gather(2, pick), fit.colour.gather(2, pick), found, hidden)


def _hidden(position: torch.Tensor, found: torch.Tensor, near: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions interpolated where a track is lost, and where it then lies within ``near`` pixels of a found object."""
    frames = found.shape[1]
    time = torch.arange(frames, device=found.device)[None, :, None].expand_as(found)
    before = torch.where(found, time, -1).cummax(1).values
    after = torch.where(found, time, frames).flip(1).cummin(1).values.flip(1)
    real = found.float().mean(1, keepdim=True) > 0.25  # what flashed up once is not hidden ever after
    before, after = torch.where(before < 0, after, before), torch.where(after >= frames, before, after)
    before, after = before.clamp(0, frames - 1), after.clamp(0, frames - 1)
    a = position.gather(1, before[..., None].expand_as(position))
    b = position.gather(1, after[..., None].expand_as(position))
    share = (time - before) / (after - before).clamp(min=1)
    guess = torch.lerp(a, b, share[..., None].to(a.dtype))
    gap = (guess[:, :, :, None] - position[:, :, None]).norm(dim=-1)  # [B, F, lost, other]
    covered = ((gap < near) & found[:, :, None]).any(-1)
    return torch.where(found[..., None], position, guess), covered & ~found & real


@dataclass(frozen=True)
class Motion:
    """``velocity [B, N, M, 2]``: pixels per frame at the start of each window, unfolded at the walls.

    ``known [B, N, M]``: enough sightings to tell.
    """

    velocity: torch.Tensor
    known: torch.Tensor


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
    return Motion(torch.where(known[..., None], slope, 0.0), known)
