"""The world ``shapes``: coloured shapes that move and bounce, prompts that say so, and metrics that check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from raven.errors import check_shape
from raven.worlds import pictures
from raven.worlds.shapes import metrics
from raven.worlds.shapes import prompts as language
from raven.worlds.shapes import scenes as staging
from raven.worlds.shapes.fit import Fit, Fitter
from raven.worlds.shapes.metrics import Scores
from raven.worlds.shapes.prompts import Clause
from raven.worlds.shapes.render import draw
from raven.worlds.shapes.scenes import Scenes

__all__ = ["Batch", "Clause", "Fit", "Scenes", "Scores", "Shapes"]

CHUNK = 3  # frames a chunk when the caller names none


@dataclass(frozen=True)
class Batch:
    """Videos with their prompts. ``video [B, 3, F, size, size]`` float32 in [-1, 1]; ``scenes`` is what they show."""

    video: torch.Tensor
    prompts: list[str]
    scenes: Scenes


@lru_cache(maxsize=8)
def _fitter(size: int, radius: float, margin: float, max_shapes: int, device: torch.device) -> Fitter:
    return Fitter(size, radius, margin, max_shapes, device)


def _seed(seed: int | torch.Generator) -> int:
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (), generator=seed, device=seed.device))
    return int(seed)


@dataclass(frozen=True)
class Shapes:
    """Configuration and entry point of the world.

    ``size``: width and height in pixels. A prompt has ``min_shapes`` to ``max_shapes`` clauses. ``text_len``:
    rows of the encoded prompt. Everything is a function of the seed alone: sample ``i`` is the same in any batch,
    and on any device up to the rounding of its arithmetic.
    """

    size: int = 32
    max_shapes: int = 2
    min_shapes: int = 1
    text_len: int = 24

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(f"size: got {self.size}, expected at least 16")
        if not 1 <= self.max_shapes <= 3:
            raise ValueError(f"max_shapes: got {self.max_shapes}, expected 1 to 3")
        if not 1 <= self.min_shapes <= self.max_shapes:
            raise ValueError(f"min_shapes: got {self.min_shapes}, expected 1 to max_shapes ({self.max_shapes})")
        if self.text_len < language.CLAUSE_ROWS * self.max_shapes:
            raise ValueError(
                f"text_len: got {self.text_len}, expected at least {language.CLAUSE_ROWS * self.max_shapes} "
                f"for {self.max_shapes} shapes"
            )

    @property
    def radius(self) -> float:
        """Radius of a circle in pixels; the other shapes have about its size."""
        return 0.16 * self.size

    @property
    def walls(self) -> tuple[float, float]:
        """Centres move between ``margin`` and ``margin + extent`` pixels: ``(margin, extent)``."""
        margin = 1.1 * self.radius
        return margin, self.size - 2 * margin

    @property
    def speeds(self) -> tuple[float, float]:
        """Pixels per frame of slow and fast."""
        return self.size / 32, self.size / 16

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words a prompt may use."""
        return language.VOCABULARY

    @property
    def text_dim(self) -> int:
        """Width of a row of ``encode``."""
        return language.text_dim(self.text_len)

    def parse(self, prompt: str) -> list[Clause]:
        """Clauses of a prompt; ``ValueError`` for an unknown word, a malformed sentence, too many shapes."""
        return language.parse(prompt, self.max_shapes)

    def encode(
        self,
        prompts: Sequence[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Context ``[B, text_len, text_dim]`` of prompts, a fixed code without weights; "" gives zeros."""
        return language.encode(prompts, self.text_len, self.max_shapes, device, dtype)

    def prompts(self, n: int, seed: int | torch.Generator = 0, first: int = 0) -> list[str]:
        """The prompts that ``sample`` with the same ``n``, ``seed`` and ``first`` shows."""
        drawn = staging.draw_clauses(_seed(seed), first, n, self.min_shapes, self.max_shapes)
        return [language.to_prompt(clauses) for clauses in drawn]

    def scenes(self, prompts: Sequence[str], seed: int | torch.Generator = 0, first: int = 0) -> Scenes:
        """One scene per prompt: where everything starts is drawn, the rest is what the prompt says."""
        clauses = [self.parse(prompt) for prompt in prompts]
        return staging.place(
            clauses,
            self.max_shapes,
            _seed(seed),
            first,
            size=self.size,
            radius=self.radius,
            margin=self.walls[0],
            speeds=self.speeds,
        )

    def render(self, scene: Scenes, frames: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Videos ``[B, 3, frames, size, size]`` float32 in [-1, 1] of scenes."""
        position = scene.positions(frames).to(device)

        def every_frame(x: torch.Tensor) -> torch.Tensor:
            return x.to(device)[:, None].expand(-1, frames, -1)

        labels = [every_frame(x) for x in (scene.shape, scene.colour, scene.present)]
        return draw(position, *labels, self.size, self.radius).transpose(1, 2).contiguous()

    def sample(
        self,
        n: int,
        frames: int,
        seed: int | torch.Generator = 0,
        device: torch.device | str | None = None,
        first: int = 0,
        prompts: Sequence[str] | None = None,
    ) -> Batch:
        """Draw samples ``first`` to ``first + n`` of the endless list that ``seed`` stands for.

        With ``prompts`` (``n`` of them) only the starts are drawn. A ``torch.Generator`` gives a fresh seed.
        """
        seed = _seed(seed)
        chosen = self.prompts(n, seed, first) if prompts is None else list(prompts)
        if len(chosen) != n:
            raise ValueError(f"prompts: got {len(chosen)}, expected n = {n}")
        scene = self.scenes(chosen, seed, first)
        return Batch(self.render(scene, frames, device), chosen, scene)

    def _frames(self, video: torch.Tensor) -> torch.Tensor:
        check_shape("video", video, ("B", 3, "F", self.size, self.size))
        if not video.numel():
            raise ValueError(f"video: got shape {tuple(video.shape)}, expected at least one frame")
        if not video.is_floating_point():
            raise TypeError(f"video: got dtype {str(video.dtype).removeprefix('torch.')}, expected a floating type")
        return video.detach().float().nan_to_num(-1.0).clamp(-1, 1).transpose(1, 2)

    @torch.no_grad()
    def fit(self, video: torch.Tensor) -> Fit:
        """The objects of every frame of ``video [B, 3, F, size, size]``: fields ``[B, F, M]``, see ``Fit``."""
        pictures_in = self._frames(video)
        batch, frames = pictures_in.shape[:2]
        fitter = _fitter(self.size, self.radius, self.walls[0], self.max_shapes, video.device)
        block = (1024 if video.is_cuda else 64) * 32 * 32 * 4 // self.size**2 + 1  # pictures that fit the caches
        with torch.autocast(video.device.type, enabled=False):  # a caller's bfloat16 is too coarse for centres
            fits = [fitter(part) for part in pictures_in.flatten(0, 1).split(block)]
        return Fit.cat(fits).unflatten(batch, frames)

    @torch.no_grad()
    def score(
        self, video: torch.Tensor, prompts: Sequence[str], chunk_frames: int | Sequence[int] | None = None
    ) -> Scores:
        """Quality, semantic and dynamic of ``video [B, 3, F, size, size]`` (values in [-1, 1], any float dtype).

        ``chunk_frames``: frames of each chunk (they add up to F), or of every chunk (the last may be shorter);
        3 when None. Motion is measured chunk by chunk. Raises ``ValueError`` for fewer than 2 frames, for
        prompts that do not parse or are empty, and for chunks that do not add up.
        """
        frames = video.shape[2] if video.ndim == 5 else 0
        check_shape("video", video, (len(prompts), 3, "F", self.size, self.size))
        if frames < 2:
            raise ValueError(f"video: got {frames} frames, expected at least 2 to see motion")
        clauses = [self.parse(prompt) for prompt in prompts]
        for i, row in enumerate(clauses):
            if not row:
                raise ValueError(f"prompts: got an empty prompt at index {i}, expected {language.GRAMMAR}")
        sizes = _chunk_sizes(chunk_frames, frames)
        table, present = staging.clause_table(clauses, self.max_shapes)
        fit = self.fit(video)
        return metrics.score(fit, table.to(video.device), present.to(video.device), sizes, self.walls, self.speeds)

    @staticmethod
    def to_uint8(video: torch.Tensor) -> torch.Tensor:
        """``[B, 3, F, H, W]`` in [-1, 1] as ``[B, F, H, W, 3]`` uint8 on the CPU, what image writers take."""
        return pictures.to_uint8(video)


def _chunk_sizes(chunk_frames: int | Sequence[int] | None, frames: int) -> list[int]:
    if chunk_frames is None or isinstance(chunk_frames, int):
        step = CHUNK if chunk_frames is None else chunk_frames
        if step < 1:
            raise ValueError(f"chunk_frames: got {step}, expected at least 1")
        sizes = [step] * (frames // step)
        return sizes + [frames % step] if frames % step else sizes
    sizes = [int(size) for size in chunk_frames]
    if sum(sizes) != frames or min(sizes, default=0) < 1:
        raise ValueError(f"chunk_frames: got {sizes}, expected positive numbers that add up to {frames} frames")
    return sizes
