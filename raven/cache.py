"""KVCache: keys and values of past chunks, in slots that are filled once and never moved.

A slot holds one chunk. Chunks below ``sink`` keep theirs; the others take turns in a ring of ``window + 1``, so that a
new chunk lands on the one that has just left its window. Keys are rotated before attention sees them, so their order in
memory does not matter to it. All bookkeeping is in Python integers: nothing here reads from the device, and every
forward that happens between ``begin`` and ``commit`` does the same thing again (checkpoint recomputation, CUDA graphs).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from raven.cache_rules import EmaSink, ReadTable, check_ema, check_grid
from raven.ops.read_rows import read_rows
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

    keys: "rotated", stored at their chunk's own frames, or "raw", stored without rotation and rotated by ``read``: the
    frames that a chunk sees count 0, 1, 2, ... from the oldest on, and its own follow, so that no position exceeds what
    fits the cache, however long the video. ``grid``, with raw keys, is (rows, columns) of a frame's tokens. ema: with
    raw keys, one sink chunk and a window, what leaves the window is blended into the sink
    (``raven.cache_rules.EmaSink``).

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
        keys: str = "rotated",
        ema: float | None = None,
        grid: Sequence[int] | None = None,
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
        if keys not in ("rotated", "raw"):
            raise ValueError(f"keys: got {keys!r}, expected rotated or raw")
        self.keys, self.ema = keys, check_ema(ema, keys, self.sink, self.window, dtype)
        self.grid = check_grid(grid) if keys == "raw" else None
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
        self._tables: dict[tuple[tuple[int, int, int], ...], ReadTable] = {}
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._blend = None if ema is None else EmaSink(ema, self.k, self.v, self.chunk_tokens)
        self.reset()

    def reset(self) -> None:
        """Forget every chunk. The buffers, and the addresses of ``slots``, stay."""
        self.num_committed = 0
        self._held: dict[int, CachedChunk] = {}
        self._open: tuple[CachedChunk, ...] = ()
        self._spans: Spans | None = None
        self._slots: torch.Tensor | None = None
        self._table: ReadTable | None = None
        self._view: tuple[tuple[int, int, int], ...] = ()
        self._reopened: tuple[CachedChunk, ...] | None = None
        if self._blend is not None:
            self._blend.reset()

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
        if not self.can_merge or self._reopened is not None:
            raise RuntimeError("begin_next: got a cache of raw keys, or a reopened chunk, expected one that can_merge")
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
        if chunk.chunk == self.num_committed:
            self.num_committed += 1
            self._evict()
        self._set_open(self._open[1:])

    def _evict(self) -> None:
        """Blend the chunk that the next one no longer sees into the sink: once, and before its rows are reused."""
        if self._blend is None or self.window is None:
            return
        gone = self.num_committed - 1 - self.window
        if gone >= self.sink:
            self._blend(self._held[0], self._held[self._slot(gone)])

    def reopen(self, chunk: int, history: Iterable[int] = ()) -> None:
        """Open committed chunk number ``chunk`` to be encoded anew; it sees the chunks ``history`` and itself.

        For a prompt that changes: see ``Stream.switch``. ``commit`` closes it; nothing is evicted. Raises
        ``ValueError`` for a chunk whose rows are gone, ``RuntimeError`` when a chunk is open.
        """
        if self._open:
            raise RuntimeError("reopen: a chunk is open; commit() or cancel() that first")
        found = []
        for name, number in (("chunk", chunk), *(("history", j) for j in sorted(history))):
            held = self._held.get(self._slot(check_int(name, number, 0)))
            if held is None or held.chunk != number:
                raise ValueError(f"{name}: got {number}, expected one of the chunks {self.held_chunks}")
            found.append(held)
        self._set_open((found[0],), tuple(found[1:]))

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

        The buffers themselves, without a copy, when they have that dtype, else casts of them. The rows of ``spans`` are
        computed into ``scratch`` where more is to do, and the next layer's overwrite them there: float8 is scaled
        back, raw keys are rotated.
        """
        if self.keys == "rotated" and self.k_scale[layer] is None:
            return self.k[layer].to(dtype), self.v[layer].to(dtype)
        table = self._table or ReadTable(((0, self.k[0].shape[1], 0),), None, self.k[0].device)
        result = []
        for name, x, scale in (("k", self.k[layer], self.k_scale[layer]), ("v", self.v[layer], self.v_scale[layer])):
            positions = table.positions if name == "k" else None
            if scale is None and positions is None:
                result.append(x.to(dtype))
            else:
                result.append(self.scratch(name, dtype))
                read_rows(x, table.rows, result[-1], scale, positions)
        return result[0], result[1]

    def scratch(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The buffer [B, S, H, D] that ``read`` computes "k" or "v" into: one for all layers, made on first use."""
        if (name, dtype) not in self._scratch:
            with torch.inference_mode(False):
                self._scratch[name, dtype] = torch.empty_like(self.k[0], dtype=dtype)
        return self._scratch[name, dtype]

    @property
    def query_frame(self) -> int:
        """Where the first frame in flight is rotated to: its number; with raw keys, how many frames it looks back."""
        chunk = self._require_open("query_frame")
        return chunk.frame if self.keys == "rotated" else sum(frames for *_, frames in self._view[:-1])

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
        """Whether two chunks that are open at once read the same past, so that one forward can hold both.

        Not with raw keys: the two see the sink at different distances, and a blended one in different states.
        """
        return self.keys == "rotated"

    @property
    def state(self) -> Hashable:
        """Equal where a forward of the open chunks writes and reads the same rows: what a CUDA graph depends on."""
        self._require_open("state")
        return tuple((c.start, c.length, c.frames) for c in self._open), self.spans, self._view

    @property
    def history(self) -> tuple[CachedChunk, ...]:
        """The committed chunks that the chunk in flight (or, without one, the next) sees, oldest first."""
        if self._reopened is not None:
            return self._reopened
        return tuple(
            sorted((c for c in self._held.values() if self._sees(self.num_committed, c.chunk)), key=lambda c: c.chunk)
        )

    @property
    def visible_chunks(self) -> tuple[int, ...]:
        """The indices of ``history``."""
        return tuple(c.chunk for c in self.history)

    @property
    def held_chunks(self) -> tuple[int, ...]:
        """The committed chunks whose rows are still there, also those that nothing sees any more."""
        return tuple(sorted(c.chunk for c in self._held.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers: scales, what a blended sink keeps, and the scratch once it is there."""
        blend = () if self._blend is None else self._blend.lost
        buffers = (*self.k, *self.v, *self.k_scale, *self.v_scale, *self._scratch.values(), *blend)
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
        if self.ema is not None and 0 in self._held and tokens != self._held[0].length:
            raise ValueError(
                f"tokens: got {tokens}, expected {self._held[0].length} as the sink it is to be blended into"
            )
        if self.grid is not None and tokens != frames * self.grid[0] * self.grid[1]:
            rows, columns = self.grid
            raise ValueError(f"tokens: got {tokens} for {frames} frames, expected {rows}x{columns} a frame as in grid")

    def _new_chunk(self, chunk: int, tokens: int, frame: int, frames: int) -> CachedChunk:
        if self.max_chunks is not None and chunk >= self.max_chunks:
            raise RuntimeError(
                f"begin: the cache is full, all max_chunks={self.max_chunks} chunks are committed or open; "
                "reset() it, or make one with a larger max_chunks" + (", or a window" if self.window is None else "")
            )
        return CachedChunk(chunk, self._slot(chunk) * self.chunk_tokens, tokens, frame, frames)

    def _set_open(self, chunks: tuple[CachedChunk, ...], history: tuple[CachedChunk, ...] | None = None) -> None:
        """Work out where the open chunks write and what each of them reads; ``history`` only for a reopened one."""
        self._open, self._reopened = chunks, history
        self._spans = self._slots = self._table = None
        self._view = ()
        if not chunks:
            return
        rows, begin, seen = [], 0, set()
        for i, chunk in enumerate(chunks):
            # A chunk whose slot is taken over has left the window before, so ``_sees`` leaves it out.
            held = (*self._held.values(), *chunks[:i]) if history is None else history
            past = [c for c in held if history is not None or self._sees(chunk.chunk, c.chunk)]
            rows.append(((begin, begin + chunk.length), [(c.start, c.end) for c in (*past, chunk)]))
            begin += chunk.length
            seen |= {*past, chunk}
        self._spans = Spans.build(rows)
        if self.keys == "raw" or self.k_scale[0] is not None:
            view = tuple((c.start, c.length, c.frames) for c in sorted(seen, key=lambda c: c.chunk))
            if view not in self._tables:
                self._tables[view] = ReadTable(view, self.grid, self.k[0].device)
            self._view, self._table = view, self._tables[view]
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
