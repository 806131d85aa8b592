"""Find the renderable picture that explains a given picture best.

Objects are found one after another: correlate what is not yet explained with every shape at every pixel
(through the FFT), take the place where some shape in some colour removes most energy, refine its centre by
Gauss-Newton for each shape, keep the best. Each object lies under those found before it; afterwards pairs are
refitted in both orders. Everything is batched over pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from raven.worlds.shapes.prompts import SHAPES
from raven.worlds.shapes.render import BACKGROUND, contrasts, coverage, draw, outward, signed_distance

SEARCHED = 0.15  # an object with a smaller share of its area in sight is not looked for
VISIBLE = 0.05  # and when a refinement ends with a smaller share than this, it is not there
ACCEPT = 0.1  # an object must remove this share of the energy that its visible part has when drawn perfectly
NEEDED = 0.02  # an object whose absence costs less than this share of its full energy is dropped
TOUCHING = 2.4  # centres closer than this many radii may overlap
STEPS = 4  # Gauss-Newton steps a refinement


@dataclass(frozen=True)
class Fit:
    """Objects of each picture, bottom one first, with whatever leading axes the pictures had.

    ``position [..., M, 2]`` float32 (x, y in pixels), ``shape``, ``colour`` ``[..., M]`` int64,
    ``found [..., M]`` bool; ``quality [...]`` float32 in [0, 1]: the share of the picture's content explained.
    """

    position: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    found: torch.Tensor
    quality: torch.Tensor
    size: int
    radius: float

    @staticmethod
    def cat(parts: Sequence[Fit]) -> Fit:
        """Fits of consecutive blocks of pictures as one."""
        tensors = [torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS]
        return Fit(*tensors, parts[0].size, parts[0].radius)

    def unflatten(self, batch: int, frames: int) -> Fit:
        """Split the leading axis into ``[batch, frames]``."""
        return Fit(*(getattr(self, name).unflatten(0, (batch, frames)) for name in _TENSORS), self.size, self.radius)

    def draw(self) -> torch.Tensor:
        """The explaining pictures, ``[..., 3, size, size]``."""
        return draw(self.position, self.shape, self.colour, self.found, self.size, self.radius)


_TENSORS = ("position", "shape", "colour", "found", "quality")


@dataclass
class _Layer:
    """One object slot of every picture ``[K]``; ``part`` is its coverage ``[K, size, size]``, 0 where not found."""

    position: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    found: torch.Tensor
    part: torch.Tensor

    def at(self, index: torch.Tensor) -> _Layer:
        return _Layer(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: torch.Tensor, other: _Layer) -> None:
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(other, field.name)

    def where(self, condition: torch.Tensor, other: _Layer) -> _Layer:
        """This layer where ``condition [K]`` holds, else ``other``."""
        picked = []
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            picked.append(torch.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b))
        return _Layer(*picked)


class Fitter:
    """The constants of a picture size on one device, and the search."""

    def __init__(self, size: int, radius: float, margin: float, max_shapes: int, device: torch.device):
        self.size, self.radius, self.max_shapes = size, radius, max_shapes
        self.low, self.high = margin - 0.5, size - margin + 0.5  # where a centre may be
        self.window = min(size, 2 * int(radius + 3) + 1)
        self.contrast = contrasts(device)  # [6, 3]
        self.energy = (self.contrast**2).sum(1)  # [6]
        self.span = torch.arange(self.window, device=device)
        self.centres = torch.arange(size, dtype=torch.float32, device=device) + 0.5
        # Templates centred on pixel (0, 0), wrapped around, so that a correlation's index is the centre's pixel.
        offset = torch.remainder(torch.arange(size, device=device) + size // 2, size) - size // 2
        dx, dy = offset[None, :].float(), offset[:, None].float()
        shapes = torch.arange(len(SHAPES), device=device)[:, None, None]
        template = coverage(shapes, dx, dy, radius)  # [3, size, size]
        self.template_f = torch.fft.rfft2(template).conj()
        self.square_f = torch.fft.rfft2(template**2).conj()
        self.area = (template**2).sum((1, 2))  # [3]
        inside = (self.centres >= self.low) & (self.centres <= self.high)
        index = inside.nonzero()
        self.first, self.last = int(index[0]), int(index[-1]) + 1
        self.floor = float(self.energy.min() * self.area.min())  # least energy of a picture that shows something

    def _search(self, unexplained: torch.Tensor, through: torch.Tensor, first: bool) -> torch.Tensor:
        """Best pixel ``[K, 2]`` (x, y) for one more object under those found (``through``: light that passes them)."""
        rows = slice(self.first, self.last)
        weighted = unexplained if first else unexplained * through[:, None]
        match = torch.fft.irfft2(torch.fft.rfft2(weighted)[:, :, None] * self.template_f, s=(self.size, self.size))[
            ..., rows, rows
        ]  # [K, 3 channels, 3 shapes, n, n]
        n = match.shape[-1]
        linear = 2 * torch.matmul(self.contrast, match.reshape(len(match), 3, -1))  # [K, 6, 3 * n * n]
        if first:
            area = self.area[:, None, None].expand(-1, n, n).reshape(1, -1)
        else:
            spectrum = torch.fft.rfft2(through**2)[:, None] * self.square_f
            area = torch.fft.irfft2(spectrum, s=(self.size, self.size))[..., rows, rows]
            area = torch.where(area > SEARCHED * self.area[:, None, None], area, torch.inf).reshape(len(match), -1)
        gain = linear - self.energy[:, None] * area[:, None]  # energy removed, [K, 6, 3 * n * n]
        best = gain.amax(1).argmax(1) % (n * n)
        return torch.stack([best % n, best // n], -1) + self.first

    def _crop(self, pictures: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """Windows ``[K, C, window, window]`` of ``pictures [K, C, size, size]`` whose top left pixel is ``corner``."""
        rows = corner[:, 1, None] + self.span
        columns = corner[:, 0, None] + self.span
        flat = (rows[:, :, None] * self.size + columns[:, None, :]).reshape(len(pictures), 1, -1)
        crop = pictures.flatten(2).gather(2, flat.expand(-1, pictures.shape[1], -1))
        return crop.unflatten(2, (self.window, self.window))

    def _refine(
        self, position: torch.Tensor, goal: torch.Tensor, under: torch.Tensor | None, through: torch.Tensor
    ) -> _Layer:
        """Fit one object near ``position [K, 2]``, all shapes and colours.

        The picture is modelled as ``through * (under * (1 - part) + contrast * part)`` in this object's place and
        ``goal`` is what remains of the real one without the object; ``under`` None stands for an empty ground.
        """
        corner = (position.round().long() - self.window // 2).clamp(0, self.size - self.window)
        through_w = self._crop(through[:, None], corner)[:, 0]  # [K, w, w]
        goal_w = self._crop(goal, corner)  # [K, 3, w, w]
        under_w = None if under is None else self._crop(under, corner)
        columns = (corner[:, 0, None] + self.span + 0.5)[:, None, :]
        rows = (corner[:, 1, None] + self.span + 0.5)[:, :, None]
        best_gain = best_position = best_shape = best_colour = best_visible = None
        for shape in range(len(SHAPES)):
            centre = position
            for step in range(STEPS + 1):
                dx, dy = columns - centre[:, 0, None, None], rows - centre[:, 1, None, None]
                distance = signed_distance(shape, dx, dy, self.radius)
                seen = (0.5 - distance).clamp(0, 1) * through_w  # [K, w, w]
                target = goal_w if under_w is None else goal_w + under_w * seen[:, None]
                mass = (seen * seen).sum((1, 2))  # [K]
                colour_sum = torch.einsum("kcij,kij->kc", target, seen)
                if step == STEPS:
                    break
                free = colour_sum / (mass[:, None] + 1e-6)  # the colour that fits best, palette or not
                edge = (distance.abs() < 0.5) * through_w
                normal = torch.stack(outward(shape, dx, dy, self.radius), 1) * edge[:, None]  # [K, 2, w, w]
                if under_w is None:
                    slope = torch.einsum("kcij,kc->kij", target, free) - (free * free).sum(1)[:, None, None] * seen
                    strength = (free * free).sum(1)[:, None, None].expand_as(seen)
                else:
                    lift = free[:, :, None, None] - under_w
                    slope = ((target - free[:, :, None, None] * seen[:, None]) * lift).sum(1)
                    strength = (lift * lift).sum(1)
                pull = torch.einsum("kaij,kij->ka", normal, slope)
                bend = torch.einsum("kaij,kbij->kab", normal, normal * strength[:, None])
                xx, yy, xy = bend[:, 0, 0] + 0.05, bend[:, 1, 1] + 0.05, bend[:, 0, 1]
                move = torch.stack([yy * pull[:, 0] - xy * pull[:, 1], xx * pull[:, 1] - xy * pull[:, 0]], -1)
                move = move / (xx * yy - xy * xy).clamp(min=1e-6)[:, None]
                centre = (centre + move.clamp(-0.7, 0.7)).clamp(self.low, self.high)
            gains = 2 * colour_sum @ self.contrast.T - self.energy * mass[:, None]  # [K, 6]
            gain, colour = gains.max(1)
            if under_w is not None:  # the energy without the object, less that with it
                gain = gain + (goal_w * goal_w).sum((1, 2, 3)) - (target * target).sum((1, 2, 3))
            if best_gain is None:
                best_gain, best_position, best_colour, best_visible = gain, centre, colour, mass
                best_shape = torch.zeros_like(colour)
            else:
                better = gain > best_gain
                best_gain = torch.where(better, gain, best_gain)
                best_position = torch.where(better[:, None], centre, best_position)
                best_colour = torch.where(better, colour, best_colour)
                best_visible = torch.where(better, mass, best_visible)
                best_shape = torch.where(better, shape, best_shape)
        dx = self.centres - best_position[:, 0, None, None]
        dy = self.centres[:, None] - best_position[:, 1, None, None]
        part = coverage(best_shape[:, None, None], dx, dy, self.radius)
        found = (best_gain > ACCEPT * self.energy[best_colour] * best_visible) & (
            best_visible > VISIBLE * self.area[best_shape]
        )
        part = part * found[:, None, None]
        return _Layer(best_position, best_shape, best_colour, found, part)

    def _light(self, layer: _Layer) -> torch.Tensor:
        return self.contrast[layer.colour][:, :, None, None] * layer.part[:, None]

    def _compose(self, layers: list[_Layer]) -> torch.Tensor:
        """What the layers (top first) add to an empty picture, ``[K, 3, size, size]``."""
        total = self._light(layers[-1])
        for layer in reversed(layers[:-1]):
            total = total * (1 - layer.part[:, None]) + self._light(layer)
        return total

    def _refit_pair(self, content: torch.Tensor, layers: list[_Layer], i: int) -> list[_Layer]:
        """Fit layers ``i`` and ``i + 1`` again in both orders and keep, per picture, what explains it best."""
        first, second = layers[i : i + 2]
        apart = (first.position - second.position).norm(dim=-1) > TOUCHING * self.radius
        # Exchanging what does not touch changes nothing, and lets every pair meet once in a bubble sort.
        layers = [*layers[:i], second.where(apart, first), first.where(apart, second), *layers[i + 2 :]]
        above, below = layers[:i], layers[i + 2 :]
        through, goal = torch.ones_like(content[:, 0]), content
        if above:
            for layer in above:
                through = through * (1 - layer.part)
            goal = content - self._compose(above)
        ground = self._compose(below) if below else None
        options = [(layers[i], layers[i + 1])]
        for top, bottom in ((layers[i], layers[i + 1]), (layers[i + 1], layers[i])):
            scene = self._compose([bottom, *below])
            top_new = self._refine(top.position, goal - through[:, None] * scene, scene, through)
            passing = through * (1 - top_new.part)
            rest = goal - through[:, None] * self._light(top_new)
            if ground is not None:
                rest = rest - passing[:, None] * ground
            bottom_new = self._refine(bottom.position, rest, ground, passing)
            options.append((top_new, bottom_new))
        best = options[0]
        least = ((content - self._compose([*above, *best, *below])) ** 2).sum((1, 2, 3))
        for option in options[1:]:
            energy = ((content - self._compose([*above, *option, *below])) ** 2).sum((1, 2, 3))
            better = energy < least
            least = torch.where(better, energy, least)
            best = tuple(new.where(better, old) for new, old in zip(option, best, strict=True))
        return [*above, *best, *below]

    def _explained(self, content: torch.Tensor, layers: list[_Layer]) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the energy of ``content`` that the layers explain, and that energy, both ``[K]``."""
        left = ((content - self._compose(layers)) ** 2).sum((1, 2, 3))
        total = (content**2).sum((1, 2, 3))
        return 1 - left / total.clamp(min=1e-6), total

    def _refit_overlaps(self, content: torch.Tensor, layers: list[_Layer]) -> None:
        """Settle, in place, who lies above whom in the pictures where objects touch; elsewhere it cannot matter.

        A slot without an object stays so where the others explain the picture well.
        """
        centres = torch.stack([layer.position for layer in layers], 1)  # [K, M, 2]
        gap = (centres[:, :, None] - centres[:, None]).norm(dim=-1)
        gap = gap + torch.eye(len(layers), device=gap.device) * self.size
        found = torch.stack([layer.found for layer in layers], 1)
        explained, _ = self._explained(content, layers)
        pair = found[:, :, None] & found[:, None] | (explained < 0.95)[:, None, None]
        touching = (pair & (gap < TOUCHING * self.radius)).flatten(1).any(1).nonzero()[:, 0]
        if not len(touching):
            return
        content, some = content[touching], [layer.at(touching) for layer in layers]
        for last in [*range(self.max_shapes - 1, 0, -1), 1]:  # a bubble sort, then the top pair again
            for i in range(last):
                some = self._refit_pair(content, some, i)
        for layer, new in zip(layers, some, strict=True):
            layer.put(touching, new)

    def _prune(self, content: torch.Tensor, layers: list[_Layer]) -> None:
        """Drop, in place, objects without which the rest explains a picture about as well: doubles below others."""
        for i, layer in enumerate(layers):
            without = [*layers[:i], *layers[i + 1 :]]
            with_it = ((content - self._compose(layers)) ** 2).sum((1, 2, 3))
            loss = ((content - self._compose(without)) ** 2).sum((1, 2, 3)) - with_it
            layer.found &= loss > NEEDED * self.energy[layer.colour] * self.area[layer.shape]
            layer.part = layer.part * layer.found[:, None, None]

    def __call__(self, pictures: torch.Tensor) -> Fit:
        """Fit ``pictures [K, 3, size, size]`` float32 in [-1, 1]."""
        content = pictures - BACKGROUND
        through = torch.ones_like(content[:, 0])
        goal, layers = content, []
        for m in range(self.max_shapes):
            start = self._search(goal, through, first=m == 0).float() + 0.5
            layer = self._refine(start, goal, None, through)
            layers.append(layer)
            goal = goal - through[:, None] * self._light(layer)
            through = through * (1 - layer.part)
        if self.max_shapes > 1:
            self._refit_overlaps(content, layers)
            self._prune(content, layers)
        explained, total = self._explained(content, layers)
        quality = (explained * total / total.clamp(min=self.floor)).clamp(0, 1)
        layers.reverse()
        stacked = [torch.stack([getattr(layer, name) for layer in layers], 1) for name in _TENSORS[:-1]]
        return Fit(*stacked, quality, self.size, self.radius)
