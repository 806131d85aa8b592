"""Chunk-by-chunk generation on a key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from raven.cache import KVCache
from raven.captured import CapturedChunks, latents
from raven.errors import check_shape
from raven.models.wan import CausalWan, Context, TextCache
from raven.ops import consistency_step
from raven.recache import RecentChunks
from raven.sampling import Generators, checked_levels, draw, guided
from raven.spans import check_int


class Stream:
    """A batch of videos in the making, one chunk at a time.

    ``context`` gives the batch (one prompt a video; see ``CausalWan.encode_text``), ``latent_shape`` is (C, H, W).
    ``chunk_frames`` is the size of every chunk in latent frames, or a list of sizes whose last one repeats. ``sink``
    and ``window`` count chunks of history; without a window the cache holds everything, and ``max_frames`` (or a list
    of chunk sizes) says how much that can be. With ``negative_context``, velocities are guided by ``guidance``
    (classifier-free), on a cache of twice the batch.

    merge: the pass that encodes a finished chunk and the first one of the next chunk run as one forward, where the
    cache allows it; the values are those of two. graphs: replay each chunk as CUDA graphs (see ``warm_up``); ``None``
    means on a CUDA device, unless the model is sharded. ``mode`` says what holds. cache_dtype, keys, ema: of
    ``KVCache``; the dtype is the model's unless it is given. recache: how many of the newest chunks ``switch`` encodes
    again under a new prompt, and with ``recache_sink`` the sink too; the stream keeps their latents. ``raven.presets``
    has published settings by name.
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
        *,
        merge: bool = True,
        graphs: bool | None = None,
        cache_dtype: torch.dtype | None = None,
        keys: str = "rotated",
        ema: float | None = None,
        recache: int = 0,
        recache_sink: bool = False,
    ) -> None:
        if len(latent_shape) != 3:
            raise ValueError(f"latent_shape: got {tuple(latent_shape)}, expected (C, H, W)")
        channels, height, width = latent_shape
        _, ph, pw = model.config.patch_size
        if channels != model.config.in_dim or height % ph or width % pw or min(height, width) < 1:
            want = f"({model.config.in_dim}, a multiple of {ph}, a multiple of {pw})"
            raise ValueError(f"latent_shape: got {tuple(latent_shape)}, expected {want}")
        sizes = (chunk_frames,) if isinstance(chunk_frames, int) else tuple(chunk_frames)
        if not sizes:
            raise ValueError(f"chunk_frames: got {chunk_frames}, expected positive sizes")
        for size in sizes:
            check_int("chunk_frames", size, 1)
        if guidance != 1.0 and negative_context is None:
            raise ValueError(f"guidance: got {guidance} without a negative_context, expected 1")
        check_int("sink", sink, 0)
        if window is not None:
            check_int("window", window, 0)
        if max_frames is not None:
            check_int("max_frames", max_frames, 1)
        on_gpu = model.device.type == "cuda"
        if graphs and not on_gpu:
            raise ValueError(f"graphs: got True for a model on {model.device}, expected one on a CUDA device")
        self.model = model
        if graphs is None:
            graphs = on_gpu and not hasattr(model, "unshard")  # FSDP gathers weights beside the stream of a capture
        self._graphs = CapturedChunks(model.device) if graphs else None
        self.guidance = guidance if negative_context is not None else None
        self.text = self._encode_text(context, negative_context)
        if self.text is context and self._graphs is not None:  # its place is fixed from here on, its content is not
            self.text = TextCache(*(tuple(x.clone() for x in layers) for layers in (context.k, context.v)))
        self.batch = len(self.text) // (1 if self.guidance is None else 2)
        self.latent_shape = (channels, height, width)
        self.tokens_per_frame = (height // ph) * (width // pw)
        self.sizes = sizes
        self.sink, self.window = sink, window
        self.generator = generator
        self.max_frames = sum(sizes) if max_frames is None and not isinstance(chunk_frames, int) else max_frames
        if window is not None and max_frames is None:
            self.max_frames = None  # a ring has no end
        self.merge = merge
        if recache_sink and (ema is not None or not recache):
            raise ValueError(f"recache_sink: got True with recache={recache}, ema={ema}, expected recache alone")
        self._recent = RecentChunks(recache, sink, recache_sink) if check_int("recache", recache, 0) else None
        self._cache_dtype = cache_dtype
        self._cache_options = {"keys": keys, "ema": ema}
        self.grid = (height // ph, width // pw)
        self.frame = 0
        self.chunk = 0
        self._cache: KVCache | None = None
        self._pending: torch.Tensor | None = None  # finished, but not yet encoded
        self._finished: dict[int, torch.Tensor] = {}  # where such a chunk lies, by its frames

    def _encode_text(self, context: Context, negative_context: Context | None) -> TextCache:
        """Keys and values of the prompts, then of the negative ones."""
        text = self.model.encode_text(context)
        if self.guidance is not None:
            negative = self.text[self.batch :] if negative_context is None else self.model.encode_text(negative_context)
            if len(negative) != len(text):
                raise ValueError(f"negative_context: got {len(negative)} prompts, expected {len(text)}")
            return TextCache.cat([text, negative])
        return text

    @torch.no_grad()
    def set_text(self, context: Context, negative_context: Context | None = None) -> None:
        """Change the prompts (as many as before) from the chunk in flight on; the history stays what it is.

        Negative prompts stay unless new ones are given. Captured graphs read the new ones.
        """
        if negative_context is not None and self.guidance is None:
            raise ValueError("negative_context: got one for a stream without, expected None")
        text = self.model.encode_text(context)
        if len(text) != self.batch:
            raise ValueError(f"context: got {len(text)} prompts, expected {self.batch}")
        text = self._encode_text(text, negative_context)
        self.settle()
        if self._graphs is None:
            self.text = text
        else:
            torch._foreach_copy_([*self.text.k, *self.text.v], [*text.k, *text.v])

    @torch.no_grad()
    def switch(self, context: Context, negative_context: Context | None = None, recache: bool | None = None) -> None:
        """``set_text``, then encode the newest chunks again under the new prompts, if the stream was made to.

        ``recache`` says otherwise for this switch; True needs a stream with ``recache``. See ``raven.recache``.
        """
        if recache and self._recent is None:
            raise ValueError(
                "recache: got True for a stream made with recache=0, expected how many chunks to keep there"
            )
        self.set_text(context, negative_context)
        if self._recent is not None and recache is not False:
            self._recent.encode(self)

    def reset(self, context: Context | None = None, negative_context: Context | None = None) -> None:
        """Begin new videos, with new prompts if given, on the same cache, buffers and graphs."""
        self._pending = None
        self.frame = self.chunk = 0
        if self._cache is not None:
            self._cache.reset()
        if self._recent is not None:
            self._recent.clear()
        if context is not None:
            self.set_text(context, negative_context)

    @property
    def mode(self) -> str:
        """What chunks run as: "graphs", or "eager" (and why, where a capture failed)."""
        if self._graphs is None:
            return "eager"
        return "graphs" if self._graphs.failure is None else f"eager ({self._graphs.failure})"

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
            rotated = self._cache_options["keys"] == "rotated"
            self._cache = KVCache(
                config.num_layers,
                len(self.text),
                config.num_heads,
                config.head_dim,
                max(self.sizes) * self.tokens_per_frame,
                sink=self.sink,
                window=self.window,
                max_chunks=self._chunks_in(self.max_frames) if self.window is None else None,
                dtype=self._cache_dtype or self.model.compute_dtype,
                device=self.model.device,
                spare=self._spare_slots(),
                grid=None if rotated else self.grid,
                **self._cache_options,
            )
        return self._cache

    def _spare_slots(self) -> int:
        """Slots for a chunk that is open beside the one in flight, and for what is encoded again but no longer seen."""
        two = int(self.merge and self._cache_options["keys"] == "rotated")
        if self._recent is None or self.window is None:
            return two
        return max(two, self._recent.count - self.window - 1)

    def _chunks_in(self, frames: int) -> int:
        """How many chunks a video of ``frames`` latent frames has."""
        chunks, rest = 0, frames
        while rest > 0:
            rest -= self.sizes[min(chunks, len(self.sizes) - 1)]
            chunks += 1
        return chunks

    def _check_chunk(self, x: torch.Tensor) -> None:
        check_shape("x", x, (self.batch, self.latent_shape[0], self.chunk_frames, *self.latent_shape[1:]))
        self._check_room()

    def _check_room(self) -> None:
        if self.max_frames is not None and self.frame + self.chunk_frames > self.max_frames:
            limit = f"expected at most {self.max_frames} frames"
            raise ValueError(f"max_frames: got a chunk of {self.chunk_frames} at frame {self.frame}, {limit}")

    def _twice(self, x: torch.Tensor) -> torch.Tensor:
        """For the prompts and the negative prompts."""
        return x if self.guidance is None else torch.cat([x, x])

    def _velocity(
        self,
        x: torch.Tensor,
        t: torch.Tensor | float,
        finished: torch.Tensor | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of the chunk in flight; with ``finished``, the one before it is encoded on the way and remains open."""
        if self.guidance is not None and isinstance(t, torch.Tensor) and t.ndim > 0 and t.shape[0] > 1:
            t = torch.cat([t, t])
        x_0 = None if finished is None else self._twice(finished)
        v = self.model(self._twice(x), t, self.text, x_0=x_0, cache=self.cache, frame=self.frame, positions=positions)
        return v if self.guidance is None else guided(v, self.guidance)

    def _encode(self, finished: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Write keys and values of the finished chunk, which ends where the chunk in flight begins."""
        frame = self.frame - finished.shape[2]
        x_0 = self._twice(finished)
        self.model(x_0, 0.0, self.text, cache=self.cache, frame=frame, write_only=True, positions=positions)

    def _close(self) -> None:
        """What was finished is encoded now."""
        self.cache.commit()
        self._pending = None

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """Velocity ``[B, C, f, H, W]`` of the chunk in flight at level ``t`` (a number or ``[B]``, in [0, 1]).

        Repeatable: every call overwrites the chunk's own place in the cache, and history only grows by ``commit``.
        """
        self._check_chunk(x_t)
        v = self._velocity(x_t, t, self._pending)
        if self._pending is not None:
            self._close()
        return v

    @torch.no_grad()
    def commit(self, x_0: torch.Tensor, defer: bool = False) -> None:
        """Make the finished chunk ``x_0`` ``[B, C, f, H, W]`` history: one pass at level 0; the next chunk begins.

        With ``defer``, that pass waits for the next chunk's first and runs in the same forward (see ``merge``), or for
        ``settle``; the cache counts the chunk only then.
        """
        self._check_chunk(x_0)
        self.settle()
        frames = x_0.shape[2]
        if frames not in self._finished:
            self._finished[frames] = latents(self, frames)
        self._pending = self._finished[frames].copy_(x_0)
        if self._recent is not None:
            self._recent.keep(self.chunk, self._pending)
        self.frame += self.chunk_frames
        self.chunk += 1
        if not (defer and self.merge and self.cache.can_merge):
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Encode a chunk whose ``commit`` was deferred, now and on its own."""
        if self._pending is None:
            return
        if self.cache.following is not None:  # left open by a merged pass that was broken off
            self.cache.cancel()
        if (graphs := self._usable_graphs()) is None:
            self._encode(self._pending)
        else:
            graphs.encode(self, self._pending)
        self._close()

    def noise(self, generator: Generators = None) -> torch.Tensor:
        """Standard normal latents for the chunk in flight, float32 (float64 for a float64 model)."""
        shape = (self.batch, self.latent_shape[0], self.chunk_frames, *self.latent_shape[1:])
        return draw(shape, generator if generator is not None else self.generator, self.model)

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
        steps = checked_levels(levels, sampler)
        if sampler == "consistency" and (graphs := self._usable_graphs()) is not None:
            self._check_room()
            return graphs.denoise(self, steps, lambda: self.noise(generator))
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

    def _usable_graphs(self) -> CapturedChunks | None:
        """Autocast keeps copies of the weights that come and go, so nothing is captured under it."""
        return None if torch.is_autocast_enabled(self.model.device.type) else self._graphs

    @torch.no_grad()
    def warm_up(
        self,
        frames: int | None = None,
        levels: torch.Tensor | Sequence[float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Capture the chunks of a video of ``frames`` latent frames as CUDA graphs, so that its first one is fast.

        A limited window repeats itself, so ``frames=None`` covers videos of any length; without a window it means
        ``max_frames``. Kernels are compiled on the way. ``levels`` as in ``denoise``. ``progress(done, total)`` is
        called after each chunk. Returns how many graphs there are (0 in eager mode). Without it, a chunk is captured
        when its like comes up for the second time, in this video or, after ``reset``, in the next.
        Raises ``RuntimeError`` in the middle of a video, ``ValueError`` when nothing bounds it.
        """
        steps = checked_levels(levels)
        if self.frame or self._pending is not None:
            raise RuntimeError(f"warm_up: got a video at frame {self.frame}, expected its beginning; reset() it first")
        if (graphs := self._usable_graphs()) is None:
            return 0
        end = self.max_frames if frames is None else check_int("frames", frames, 1)
        if self.max_frames is not None and end > self.max_frames:
            raise ValueError(f"frames: got {end}, expected at most max_frames = {self.max_frames}")
        if self.window is None and self.max_frames is None:
            self.max_frames = end
        # From the chunk on whose whole past has the last size and fills the window, the ring goes round.
        window = self.window or 0
        around = max(self.sink, len(self.sizes) - 1) + 2 * (window + 1) + self.cache.spare
        total = around if end is None else self._chunks_in(end)
        total = total if self.window is None else min(total, around)
        try:
            with graphs.warming():
                for i in range(total):
                    x_0, _ = graphs.denoise(self, steps)
                    if i + 1 < total:
                        self.commit(x_0, defer=True)
                    if progress is not None:
                        progress(i + 1, total)
        finally:
            self.reset()
        return len(graphs)

    def generate(
        self,
        frames: int | None = None,
        levels: torch.Tensor | Sequence[float] | None = None,
        generator: Generators = None,
        return_trajectory: bool = False,
        sampler: str = "consistency",
        switches: Sequence[tuple[int, Context]] = (),
    ) -> Iterator[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        """Yield finished chunks ``[B, C, f, H, W]`` until ``frames`` more latent frames are done.

        ``frames=None`` goes on to ``max_frames``, or without end when the window is limited. With
        ``return_trajectory`` each item is (chunk, states ``[K, B, C, f, H, W]``). Noise is drawn in a fixed order, so a
        seed is a video; a list of generators, one a sample, makes it independent of the batch. ``switches`` are
        (frame, prompts), in order: ``switch`` is called before the first chunk that begins at that frame or later.
        Raises ``ValueError`` when ``frames`` does not end with a chunk, or switches are out of order.
        """
        checked_levels(levels, sampler)
        if frames is not None:
            check_int("frames", frames, 1)
        starts = [check_int("switches", frame, 0) for frame, _ in switches]
        if starts != sorted(starts):
            raise ValueError(f"switches: got frames {starts}, expected ascending ones")
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
        return self._generate(end, levels, generator, return_trajectory, sampler, list(switches))

    def _generate(self, end, levels, generator, return_trajectory, sampler, switches):
        while end is None or self.frame < end:
            while switches and switches[0][0] <= self.frame:
                self.switch(switches.pop(0)[1])
            x_0, states = self.denoise(levels, generator, sampler)
            self.commit(x_0, defer=True)
            yield (x_0, states) if return_trajectory else x_0
