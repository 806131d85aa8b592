"""Chunks of a stream as CUDA graphs, on buffers of fixed addresses and in one memory pool."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch.cuda.memory import _cuda_endAllocateToPool

from raven.models.packing import frame_positions
from raven.ops import consistency_step

if TYPE_CHECKING:
    from raven.stream import Stream


class GraphSet:
    """Runs functions as CUDA graphs: as they are at a key's first call, captured at the second, replayed from then on.

    The first call is the warm-up that a capture needs: kernels are compiled, plans and tables uploaded. A function
    reads and writes tensors at addresses that stay, waits for nothing, and does the same work whenever it is called
    with an equal key. All graphs share one pool, so results have to lie in buffers from outside: the next graph
    overwrites whatever lies in the pool. While ``warming``, nothing is replayed: a call is the first one and the
    capture in one.

    When a capture fails, ``failure`` says why, a warning is given once, and everything runs without graphs from then
    on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.warming = False
        self.failure: str | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._side = torch.cuda.Stream()

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, fn: Callable[[], object]) -> None:
        """Do the work of ``fn``, on the current stream of the device."""
        with torch.cuda.device(self.device):
            first = key not in self._graphs
            if first:
                fn()
                self._graphs[key] = None
            if self.failure is None and self._graphs[key] is None and (self.warming or not first):
                self._graphs[key] = self._capture(fn)
            if self.warming or first:
                return
            graph = self._graphs[key]
            if graph is None:
                fn()
            else:
                graph.replay()

    def clear(self) -> None:
        """Forget every graph."""
        torch.cuda.synchronize(self.device)  # none of them is running
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph

    def _capture(self, fn: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        graph, recording = torch.cuda.CUDAGraph(), False
        collecting = gc.isenabled()
        gc.disable()  # collecting another graph during a capture would spoil it
        self._side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._side):
                # Of other threads (a decoder, a writer) nothing is forbidden meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                recording = True
                try:
                    fn()
                finally:
                    graph.capture_end()
                    recording = False
        except RuntimeError as error:
            self._give_up(error, recording)
            return None
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._side)
        return graph

    def _give_up(self, error: RuntimeError, recording: bool) -> None:
        cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # what broke it comes first
        lines = str(cause).strip().splitlines()
        self.failure = lines[0] if lines else type(cause).__name__
        if recording:  # the end of a broken capture leaves its pool open, and memory that other streams use is kept
            _cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self.clear()
        message = f"a CUDA graph could not be captured, going on without graphs: {self.failure}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def latents(stream: Stream, frames: int, *count: int) -> torch.Tensor:
    """Uninitialised latents ``[B, C, frames, H, W]`` of a stream, float32 (float64 if its model is), or several."""
    dtype = torch.float64 if stream.model.dtype == torch.float64 else torch.float32
    shape = (*count, stream.batch, stream.latent_shape[0], frames, *stream.latent_shape[1:])
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=stream.model.device)


class CapturedChunks:
    """The passes of one stream's chunks, replayed as graphs.

    A chunk is two of them: its first step, which also encodes the chunk before it where the stream merges the two, and
    the other steps. What differs from chunk to chunk with one key (noise, positions, text) is copied into buffers
    before the replay; the slots that are written and the ranges that are read come with the key: ``KVCache.state``.
    """

    def __init__(self, device: torch.device) -> None:
        self.graphs = GraphSet(device)
        self._read: tuple[int, ...] = ()
        self._buffers: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self._positions: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.graphs)

    @property
    def failure(self) -> str | None:
        """Why there are no graphs, or ``None``."""
        return self.graphs.failure

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Capture at the first call."""
        self.graphs.warming = True
        try:
            yield
        finally:
            self.graphs.warming = False

    def open(self, stream: Stream, chunks: tuple[int, ...], end: int) -> torch.Tensor:
        """Open the chunk or two of these frames, which end at frame ``end``; their positions int32 ``[L, 3]``.

        Positions lie at a fixed address: those of the newest chunk from the middle of the buffer on. Graphs of weights
        or texts that have moved since (to another dtype, into other layers) are forgotten.
        """
        model, text = stream.model, stream.text
        read = tuple(x.data_ptr() for x in chain(model.parameters(), model.buffers(), text.k, text.v))
        if read != self._read:
            if len(self):
                self.graphs.clear()
            self._read = read
        cache, per_frame, device = stream.cache, stream.tokens_per_frame, stream.model.device
        frame = end - sum(chunks)
        cache.begin(chunks[0] * per_frame, frame, chunks[0])
        if len(chunks) > 1:
            cache.begin_next(chunks[1] * per_frame, frame + chunks[0], chunks[1])
        most = max(stream.sizes) * per_frame
        if self._positions is None:
            with torch.inference_mode(False):
                self._positions = torch.empty((2 * most, 3), dtype=torch.int32, device=device)
        rows = self._positions[most - sum(chunks[:-1]) * per_frame : most + chunks[-1] * per_frame]
        return rows.copy_(frame_positions(cache.query_frame, sum(chunks), *stream.grid, device))

    def encode(self, stream: Stream, finished: torch.Tensor) -> None:
        """The clean pass of a finished chunk alone; ``finished`` lies at a fixed address."""
        positions = self.open(stream, (finished.shape[2],), stream.frame)
        self.graphs.run(("encode", stream.cache.state), lambda: stream._encode(finished, positions))

    def denoise(
        self, stream: Stream, levels: Sequence[float], noise: Callable[[], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Stream.denoise``; without ``noise`` (one call a level, in order) the buffers stay as they are."""
        frames, steps = stream.chunk_frames, len(levels)
        if (frames, steps) not in self._buffers:
            made = (latents(stream, frames, steps), latents(stream, frames, steps), latents(stream, frames))
            self._buffers[frames, steps] = made
        states, noises, x_0 = self._buffers[frames, steps]
        for buffer in (states[0], *noises[1:]) if noise is not None else ():
            buffer.copy_(noise())

        def step(k: int, positions: torch.Tensor, finished: torch.Tensor | None = None) -> None:
            v = stream._velocity(states[k], levels[k], finished, positions)
            if k + 1 == steps:
                x_0.copy_(states[k] - levels[k] * v)
            else:
                states[k + 1].copy_(consistency_step(v, states[k], levels[k], levels[k + 1], noise=noises[k + 1]))

        finished = stream._pending
        past = () if finished is None else (finished.shape[2],)
        positions = self.open(stream, (*past, frames), stream.frame + frames)
        key = (tuple(levels), stream.guidance)
        self.graphs.run(("first", *key, stream.cache.state), lambda: step(0, positions, finished))
        if finished is not None:
            stream._close()
        if steps > 1:
            own = positions[-frames * stream.tokens_per_frame :]

            def others() -> None:
                for k in range(1, steps):
                    step(k, own)

            self.graphs.run(("others", *key, stream.cache.state), others)
        return x_0.clone(), states.clone()
