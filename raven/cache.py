"""KVCache: rotated keys and values of past chunks, in slots that are filled once and never moved.

A slot holds one chunk. Chunks below ``sink`` keep theirs; the others take turns in a ring of ``window + 1``, so that a
new chunk lands on the one that has just left its window. Keys are stored rotated, so their order in memory does not
matter to attention. All bookkeeping is in Python integers: nothing here reads from the device, and every forward that
happens between ``begin`` and ``commit`` does the same thing again (checkpoint recomputation, CUDA graphs).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from raven.reference.kv_append import dequantize
from raven.spans import Spans, check_int

__all__ = ["CachedChunk", "KVCache"]


@dataclass(frozen=True)
class CachedChunk:
    """A chunk in the cache: its index from the start of the video, its rows, and its latent frames."""

    chunk: int
    start: int
    length: int
    frame: int
    frames: int

    @property
    def end(self) -> int:
        """First row after the chunk's."""
        return self.start + self.length


class KVCache:
    """Keys and values of ``num_layers`` layers, ``k[layer]`` and ``v[layer]``: [B, S, H, D], allocated once.

    chunk_tokens: rows of a slot, so the most tokens a chunk may have. sink, window: in chunks; chunk i sees itself and
    the past chunks j with ``j < sink or i - j <= window``. window None: all of them, and ``max_chunks`` is needed.
    max_chunks: the most chunks of a video. heads: of the keys and values. dtype, device: as ``torch.empty`` defaults.
    spare: slots more than the ring needs; with one, two chunks can be open at once (``begin_next``) without a window
    losing a chunk. S = chunk_tokens * ``num_slots``; rows outside ``spans`` are uninitialised.

    dtype ``torch.float8_e4m3fn`` stores each head of a token with a scale of its own, amax / 448, in ``k_scale[layer]``
    and ``v_scale[layer]``: [B, S, H] float32, ``None`` for other dtypes. ``kv_append`` writes them, ``read`` applies
    them.

    ``begin`` opens the chunk in flight; ``slots`` and ``spans`` say where it writes and what it reads; ``commit`` makes
    it history. ``begin_next`` opens the chunk after it as well, for a forward over ``[clean i | noisy i + 1]`` in which
    the last pass of one chunk and the first of the next are one: ``commit`` then takes the older of the two. Raises
    ``ValueError`` for arguments out of range, ``RuntimeError`` for calls out of order.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        chunk_tokens: int,
        sink: int = 0,
        window: int | None = None,
        max_chunks: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        spare: int = 0,
    ) -> None:
        self.chunk_tokens = check_int("chunk_tokens", chunk_tokens, 1)
        self.sink = check_int("sink", sink, 0)
        self.window = None if window is None else check_int("window", window, 0)
        self.max_chunks = None if max_chunks is None else check_int("max_chunks", max_chunks, 1)
        self.spare = check_int("spare", spare, 0)
        if self.window is not None:
            ring = self.sink + self.window + 1 + self.spare
            self.num_slots = ring if self.max_chunks is None else min(ring, self.max_chunks)
        elif self.max_chunks is not None:
            self.num_slots = self.max_chunks
        else:
            raise ValueError("max_chunks: got None with window=None, expected the most chunks that will be cached")
        shape = (
            check_int("batch", batch, 1),
            self.num_slots * self.chunk_tokens,
            check_int("heads", heads, 1),
            check_int("head_dim", head_dim, 1),
        )
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            layers = range(check_int("num_layers", num_layers, 1))
            self.k = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in layers)
            self.v = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in layers)
            self.k_scale, self.v_scale = (
                tuple(
                    torch.empty(shape[:3], dtype=torch.float32, device=device) if dtype == torch.float8_e4m3fn else None
                    for _ in layers
                )
                for _ in range(2)
            )
        self._rows: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget every chunk. The buffers, and the addresses of ``slots``, stay."""
        self.num_committed = 0
        self._held: dict[int, CachedChunk] = {}
        self._open: tuple[CachedChunk, ...] = ()
        self._spans: Spans | None = None
        self._slots: torch.Tensor | None = None

    def begin(self, tokens: int, frame: int, frames: int) -> None:
        """Open chunk number ``num_committed``: ``tokens`` tokens that are latent frames [frame, frame + frames).

        Again with the same arguments while that chunk is open (alone, or as the older of two): does nothing. Raises
        ``ValueError`` when the chunk does not fit a slot, ``RuntimeError`` when another chunk is open or ``max_chunks``
        are committed.
        """
        self._check_chunk(tokens, frame, frames)
        if self._open:
            chunk = self._open[0]
            if (chunk.length, chunk.frame, chunk.frames) != (tokens, frame, frames):
                raise RuntimeError(
                    f"begin: got a chunk of tokens={tokens}, frame={frame}, frames={frames} while one of tokens="
                    f"{chunk.length}, frame={chunk.frame}, frames={chunk.frames} is open; commit() or cancel() that "
                    "first"
                )
            return
        self._set_open((self._new_chunk(self.num_committed, tokens, frame, frames),))

    def begin_next(self, tokens: int, frame: int, frames: int) -> None:
        """Open the chunk after the one in flight too; arguments as of ``begin``.

        ``slots`` then holds the rows of both chunks in order, and ``spans`` has a query range for each: the older sees
        what it saw, the newer its own window, the older chunk and itself. Again with the same arguments: does nothing.
        Raises ``ValueError`` when the chunk does not fit a slot, ``RuntimeError`` when no chunk is open, when another
        next one is, when ``max_chunks`` are reached, or when the slot is one that the older chunk still reads
        (``spare=0``).
        """
        self._check_chunk(tokens, frame, frames)
        first = self._require_open("begin_next")
        if len(self._open) == 2:
            chunk = self._open[1]
            if (chunk.length, chunk.frame, chunk.frames) != (tokens, frame, frames):
                raise RuntimeError(
                    f"begin_next: got a chunk of tokens={tokens}, frame={frame}, frames={frames} while one of tokens="
                    f"{chunk.length}, frame={chunk.frame}, frames={chunk.frames} is open; commit() or cancel() first"
                )
            return
        chunk = self._new_chunk(first.chunk + 1, tokens, frame, frames)
        taken = {c.start: c.chunk for c in (*self.history, first)}
        if chunk.start in taken:
            raise RuntimeError(
                f"begin_next: the slot of chunk {chunk.chunk} holds chunk {taken[chunk.start]}, which chunk "
                f"{first.chunk} still reads; expected a cache with spare=1"
            )
        self._set_open((first, chunk))

    def commit(self) -> None:
        """Make the chunk in flight history, of two the older. What its rows hold then is what later chunks see."""
        chunk = self._require_open("commit")
        self._held[self._slot(chunk.chunk)] = chunk
        self.num_committed += 1
        self._set_open(self._open[1:])

    def cancel(self) -> None:
        """Drop the chunk in flight, of two the newer; everything else is as before it was opened."""
        self._require_open("cancel")
        self._set_open(self._open[:-1])

    @property
    def slots(self) -> torch.Tensor:
        """int32 [tokens] on the cache's device: destination row of each token of the chunk in flight, or of both.

        One tensor per slot and length for the life of the cache, so a CUDA graph may keep its address.
        """
        self._require_open("slots")
        assert self._slots is not None
        return self._slots

    @property
    def spans(self) -> Spans:
        """What the chunk in flight reads: its own rows and those of the visible past, merged where they touch.

        With two chunks open, two query ranges, one after the other.
        """
        self._require_open("spans")
        assert self._spans is not None
        return self._spans

    def read(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer for attention, [B, S, H, D] in ``dtype``, which ``spans`` selects from.

        The buffers themselves, without a copy, when they have that dtype; float8 is scaled back, others are cast.
        """
        return tuple(
            x.to(dtype) if scale is None else dequantize(x, scale, dtype)
            for x, scale in ((self.k[layer], self.k_scale[layer]), (self.v[layer], self.v_scale[layer]))
        )

    @property
    def current(self) -> CachedChunk | None:
        """The chunk in flight, if one is open; of two the older."""
        return self._open[0] if self._open else None

    @property
    def following(self) -> CachedChunk | None:
        """The chunk after the one in flight, if both are open."""
        return self._open[1] if len(self._open) == 2 else None

    @property
    def can_merge(self) -> bool:
        """Whether two chunks that are open at once read the same past, so that one forward can hold both."""
        return True

    @property
    def state(self) -> Hashable:
        """Equal where a forward of the open chunks writes and reads the same rows: what a CUDA graph depends on."""
        self._require_open("state")
        return tuple((c.start, c.length, c.frames) for c in self._open), self.spans

    @property
    def history(self) -> tuple[CachedChunk, ...]:
        """The committed chunks that the chunk in flight (or, without one, the next) sees, oldest first."""
        return tuple(
            sorted((c for c in self._held.values() if self._sees(self.num_committed, c.chunk)), key=lambda c: c.chunk)
        )

    @property
    def visible_chunks(self) -> tuple[int, ...]:
        """The indices of ``history``."""
        return tuple(c.chunk for c in self.history)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, scales included."""
        buffers = (*self.k, *self.v, *self.k_scale, *self.v_scale)
        return sum(t.numel() * t.element_size() for t in buffers if t is not None)

    def __repr__(self) -> str:
        batch, rows, heads, head_dim = self.k[0].shape
        return (
            f"KVCache({len(self.k)} layers, batch {batch}, {self.num_slots} slots of {self.chunk_tokens} tokens, "
            f"{heads} heads of {head_dim}, sink={self.sink}, window={self.window}, {self.num_committed} committed)"
        )

    def _slot(self, chunk: int) -> int:
        if self.window is None or chunk < self.sink:
            return chunk
        return self.sink + (chunk - self.sink) % (self.window + 1 + self.spare)

    def _sees(self, query: int, key: int) -> bool:
        return key < self.sink or self.window is None or query - key <= self.window

    def _check_chunk(self, tokens: int, frame: int, frames: int) -> None:
        if check_int("tokens", tokens, 1) > self.chunk_tokens:
            raise ValueError(f"tokens: got {tokens}, expected at most chunk_tokens={self.chunk_tokens}")
        check_int("frame", frame, 0)
        check_int("frames", frames, 1)

    def _new_chunk(self, chunk: int, tokens: int, frame: int, frames: int) -> CachedChunk:
        if self.max_chunks is not None and chunk >= self.max_chunks:
            raise RuntimeError(
                f"begin: the cache is full, all max_chunks={self.max_chunks} chunks are committed or open; "
                "reset() it, or make one with a larger max_chunks" + (", or a window" if self.window is None else "")
            )
        return CachedChunk(chunk, self._slot(chunk) * self.chunk_tokens, tokens, frame, frames)

    def _set_open(self, chunks: tuple[CachedChunk, ...]) -> None:
        """Work out where the open chunks write and what each of them reads."""
        self._open = chunks
        self._spans = self._slots = None
        if not chunks:
            return
        rows, begin = [], 0
        for i, chunk in enumerate(chunks):
            # A chunk whose slot is taken over has left the window before, so ``_sees`` leaves it out.
            past = [c for c in (*self._held.values(), *chunks[:i]) if self._sees(chunk.chunk, c.chunk)]
            rows.append(((begin, begin + chunk.length), [(c.start, c.end) for c in (*past, chunk)]))
            begin += chunk.length
        self._spans = Spans.build(rows)
        places = tuple((c.start, c.end) for c in chunks)
        if places not in self._rows:
            device = self.k[0].device
            with torch.inference_mode(False):
                self._rows[places] = torch.cat(
                    [torch.arange(*place, dtype=torch.int32, device=device) for place in places]
                )
        self._slots = self._rows[places]

    def _require_open(self, name: str) -> CachedChunk:
        if not self._open:
            raise RuntimeError(f"{name}: no chunk is open; call begin(tokens, frame, frames) first")
        return self._open[0]
