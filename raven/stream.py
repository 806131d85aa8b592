"""Chunk-by-chunk generation on a key/value cache, and sampling with a bidirectional model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from raven.cache import KVCache
from raven.errors import check_shape
from raven.models.wan import CausalWan, Context, TextCache
from raven.ops import consistency_step
from raven.schedule import sampling_levels
from raven.spans import check_int

Generators = torch.Generator | Sequence[torch.Generator] | None
SAMPLERS = ("consistency", "ode")


def _draw(shape: Sequence[int], generator: Generators, model: CausalWan) -> torch.Tensor:
    """Standard normal latents ``[B, ...]``, drawn where the generator lives; a list has one generator a sample."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    if generator is None or isinstance(generator, torch.Generator):
        where = model.device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(model.device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: got {len(generator)} generators, expected one or {shape[0]}")
    return torch.cat([_draw((1, *shape[1:]), g, model) for g in generator])


def _schedule(levels: torch.Tensor | Sequence[float] | None, sampler: str = "consistency") -> list[float]:
    """Noise levels as numbers, checked once: descending, in (0, 1]. The sampler's name is checked with them."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    values = [float(t) for t in (sampling_levels(4) if levels is None else levels)]
    falling = all(a > b for a, b in zip(values, [*values[1:], 0.0], strict=False))
    if not values or values[0] > 1 or not falling:
        raise ValueError(f"levels: got {values}, expected descending levels in (0, 1]")
    return values


def _guided(v: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance of a batch that holds the prompts, then the negative prompts."""
    cond, uncond = v.chunk(2)
    return uncond + guidance * (cond - uncond)


class Stream:
    """A batch of videos in the making, one chunk at a time.

    ``context`` gives the batch (one prompt a video; see ``CausalWan.encode_text``), ``latent_shape`` is (C, H, W).
    ``chunk_frames`` is the size of every chunk in latent frames, or a list of sizes whose last one repeats. ``sink``
    and ``window`` count chunks of history; without a window the cache holds everything, and ``max_frames`` (or a list
    of chunk sizes) says how much that can be. With ``negative_context``, velocities are guided by ``guidance``
    (classifier-free), on a cache of twice the batch.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: CausalWan,
        context: Context,
        latent_shape: Sequence[int],
        chunk_frames: int | Sequence[int] = 3,
        sink: int = 0,
        window: int | None = None,
        max_frames: int | None = None,
        generator: Generators = None,
        negative_context: Context | None = None,
        guidance: float = 1.0,
    ) -> None:
        if len(latent_shape) != 3:
            raise ValueError(f"latent_shape: got {tuple(latent_shape)}, expected (C, H, W)")
        channels, height, width = latent_shape
        _, ph, pw = model.config.patch_size
        if channels != model.config.in_dim or height % ph or width % pw or min(height, width) < 1:
            want = f"({model.config.in_dim}, a multiple of {ph}, a multiple of {pw})"
            raise ValueError(f"latent_shape: got {tuple(latent_shape)}, expected {want}")
        sizes = (chunk_frames,) if isinstance(chunk_frames, int) else tuple(chunk_frames)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"chunk_frames: got {chunk_frames}, expected positive sizes")
        if guidance != 1.0 and negative_context is None:
            raise ValueError(f"guidance: got {guidance} without a negative_context, expected 1")
        check_int("sink", sink, 0)
        if window is not None:
            check_int("window", window, 0)
        if max_frames is not None:
            check_int("max_frames", max_frames, 1)
        self.model = model
        self.text = model.encode_text(context)
        self.batch = len(self.text)
        self.guidance = guidance if negative_context is not None else None
        if negative_context is not None:
            negative = model.encode_text(negative_context)
            if len(negative) != self.batch:
                raise ValueError(f"negative_context: got {len(negative)} prompts, expected {self.batch}")
            self.text = TextCache.cat([self.text, negative])
        self.latent_shape = (channels, height, width)
        self.tokens_per_frame = (height // ph) * (width // pw)
        self.sizes = sizes
        self.sink, self.window = sink, window
        self.generator = generator
        self.max_frames = sum(sizes) if max_frames is None and not isinstance(chunk_frames, int) else max_frames
        if window is not None and max_frames is None:
            self.max_frames = None  # a ring has no end
        self.frame = 0
        self.chunk = 0
        self._cache: KVCache | None = None

    @property
    def chunk_frames(self) -> int:
        """Latent frames of the chunk in flight."""
        return self.sizes[min(self.chunk, len(self.sizes) - 1)]

    @property
    def cache(self) -> KVCache:
        """The key/value cache, allocated on first use; ``ValueError`` when nothing bounds it."""
        if self._cache is None:
            if self.window is None and self.max_frames is None:
                raise ValueError("max_frames: got None, expected the length of the video (window is None as well)")
            config = self.model.config
            self._cache = KVCache(
                config.num_layers,
                len(self.text),
                config.num_heads,
                config.head_dim,
                max(self.sizes) * self.tokens_per_frame,
                sink=self.sink,
                window=self.window,
                max_chunks=self._chunks_in(self.max_frames) if self.window is None else None,
                dtype=self.model.compute_dtype,
                device=self.model.device,
            )
        return self._cache

    def _chunks_in(self, frames: int) -> int:
        """How many chunks a video of ``frames`` latent frames has."""
        chunks, rest = 0, frames
        while rest > 0:
            rest -= self.sizes[min(chunks, len(self.sizes) - 1)]
            chunks += 1
        return chunks

    def _forward(self, x: torch.Tensor, t: torch.Tensor | float, write_only: bool) -> torch.Tensor | None:
        check_shape("x", x, (self.batch, self.latent_shape[0], self.chunk_frames, *self.latent_shape[1:]))
        if self.max_frames is not None and self.frame + self.chunk_frames > self.max_frames:
            limit = f"expected at most {self.max_frames} frames"
            raise ValueError(f"max_frames: got a chunk of {self.chunk_frames} at frame {self.frame}, {limit}")
        if self.guidance is not None:
            x = torch.cat([x, x])
            t = torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.ndim > 0 and t.shape[0] > 1 else t
        return self.model(x, t, self.text, cache=self.cache, frame=self.frame, write_only=write_only)

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """Velocity ``[B, C, f, H, W]`` of the chunk in flight at level ``t`` (a number or ``[B]``, in [0, 1]).

        Repeatable: every call overwrites the chunk's own place in the cache, and history only grows by ``commit``.
        """
        v = self._forward(x_t, t, write_only=False)
        return v if self.guidance is None else _guided(v, self.guidance)

    @torch.no_grad()
    def commit(self, x_0: torch.Tensor) -> None:
        """Make the finished chunk ``x_0`` ``[B, C, f, H, W]`` history: one pass at level 0; the next chunk begins."""
        self._forward(x_0, 0.0, write_only=True)
        self.cache.commit()
        self.frame += self.chunk_frames
        self.chunk += 1

    def noise(self, generator: Generators = None) -> torch.Tensor:
        """Standard normal latents for the chunk in flight, float32 (float64 for a float64 model)."""
        shape = (self.batch, self.latent_shape[0], self.chunk_frames, *self.latent_shape[1:])
        return _draw(shape, generator if generator is not None else self.generator, self.model)

    @torch.no_grad()
    def denoise(
        self,
        levels: torch.Tensor | Sequence[float] | None = None,
        generator: Generators = None,
        sampler: str = "consistency",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Denoise the chunk in flight without committing it.

        ``levels`` descend from 1 (default: ``sampling_levels(4)``); after the last comes 0. ``sampler`` is
        "consistency" (fresh noise at every step) or "ode" (Euler steps). Returns the clean chunk ``[B, C, f, H, W]``
        and its states at every level ``[K, B, C, f, H, W]``.
        """
        steps = _schedule(levels, sampler)
        x = self.noise(generator)
        states = []
        for t, s in zip(steps, [*steps[1:], 0.0], strict=True):
            states.append(x)
            v = self.velocity(x, t)
            if sampler == "ode":
                x = x + (s - t) * v
            elif s == 0:
                x = x - t * v
            else:
                x = consistency_step(v, x, t, s, noise=self.noise(generator))
        return x, torch.stack(states)

    def generate(
        self,
        frames: int | None = None,
        levels: torch.Tensor | Sequence[float] | None = None,
        generator: Generators = None,
        return_trajectory: bool = False,
        sampler: str = "consistency",
    ) -> Iterator[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        """Yield finished chunks ``[B, C, f, H, W]`` until ``frames`` more latent frames are done.

        ``frames=None`` goes on to ``max_frames``, or without end when the window is limited. With
        ``return_trajectory`` each item is (chunk, states ``[K, B, C, f, H, W]``). Noise is drawn in a fixed order, so a
        seed is a video; a list of generators, one a sample, makes it independent of the batch.
        Raises ``ValueError`` when ``frames`` does not end with a chunk.
        """
        _schedule(levels, sampler)
        if frames is not None:
            check_int("frames", frames, 1)
        end = self.max_frames if frames is None else self.frame + frames
        if self._cache is None and self.max_frames is None and self.window is None:
            self.max_frames = end
        if end is not None:
            covered, chunk = self.frame, self.chunk
            while covered < end:
                covered += self.sizes[min(chunk, len(self.sizes) - 1)]
                chunk += 1
            if covered != end:
                raise ValueError(f"frames: got {end} frames in all, expected the end of a chunk, such as {covered}")
        return self._generate(end, levels, generator, return_trajectory, sampler)

    def _generate(self, end, levels, generator, return_trajectory, sampler):
        while end is None or self.frame < end:
            x_0, states = self.denoise(levels, generator, sampler)
            self.commit(x_0)
            yield (x_0, states) if return_trajectory else x_0


@dataclass(frozen=True)
class Rollout:
    """What a roll-out leaves for training: K levels, the noisy states there, and the clean end points.

    ``levels`` ``[K]`` float32, ``x_t`` ``[K, B, C, F, H, W]``, ``x_0`` ``[B, C, F, H, W]``.
    """

    levels: torch.Tensor
    x_t: torch.Tensor
    x_0: torch.Tensor

    @property
    def x_next(self) -> torch.Tensor:
        """The state sampled after each level, ``[K, B, C, F, H, W]``; after the last one the clean end point."""
        return torch.cat([self.x_t[1:], self.x_0[None]])


@torch.no_grad()
def rollout(
    model: CausalWan,
    context: Context,
    latent_shape: Sequence[int],
    chunk_frames: Sequence[int],
    levels: torch.Tensor | Sequence[float] | None = None,
    sink: int = 0,
    window: int | None = None,
    generator: Generators = None,
) -> Rollout:
    """Generate a video of chunks ``chunk_frames`` and keep every state, without gradient.

    One consistency step a level, history on the cache; the last chunk's clean pass is left out, because nothing
    follows it. Arguments as in ``Stream``.
    """
    stream = Stream(model, context, latent_shape, tuple(chunk_frames), sink, window, generator=generator)
    chunks, trajectory = [], []
    for i in range(len(stream.sizes)):
        x_0, states = stream.denoise(levels)
        if i + 1 < len(stream.sizes):
            stream.commit(x_0)
        chunks.append(x_0)
        trajectory.append(states)
    kept = torch.tensor(_schedule(levels), dtype=torch.float32, device=model.device)
    return Rollout(kept, torch.cat(trajectory, dim=3), torch.cat(chunks, dim=2))


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
    x = _draw((batch, *shape), generator, model)
    levels = _schedule(sampling_levels(steps, shift))
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        v = model(x, t, text) if negative_context is None else _guided(model(torch.cat([x, x]), t, text), guidance)
        x = x + (s - t) * v
    return x
