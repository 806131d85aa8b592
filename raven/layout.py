"""ChunkLayout: which chunks of which videos lie where in a packed sequence, and who sees whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from raven.spans import Range, Spans, check_int, merge_ranges

if TYPE_CHECKING:
    from os import PathLike

    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["ChunkLayout", "Document", "Segment", "Spans", "merge_ranges"]

ROLES = ("noisy", "clean")
_NO_LIMIT = 2**62


@dataclass(frozen=True)
class Segment:
    """A run of packed tokens that belong together: one chunk of one video, noisy or clean.

    start, length: in packed tokens. role: "noisy" or "clean". chunk: index in its document, from 0. frame, frames:
    first latent frame of the chunk in its document, and their number; the noisy and the clean segment of one chunk
    share both, hence their rotary positions. document: index in ``ChunkLayout.documents``.
    """

    start: int
    length: int
    role: str
    chunk: int
    frame: int
    frames: int
    document: int

    @property
    def end(self) -> int:
        """First packed token after the segment."""
        return self.start + self.length

    @property
    def label(self) -> str:
        """z1, z2, .. for noisy and x1, x2, .. for clean chunks, counted from 1 as in the paper."""
        return f"{'z' if self.role == 'noisy' else 'x'}{self.chunk + 1}"


@dataclass(frozen=True)
class Document:
    """One video in the packed sequence, and its visibility rule.

    start, length: in packed tokens. tokens_per_frame: tokens of a latent frame. chunk_frames: latent frames of each
    chunk. history: the role of the segments that later chunks see. sink, window: in chunks. local_frames: in latent
    frames, counted back from the end of the query's own chunk. ``None``: no limit.
    """

    start: int
    length: int
    tokens_per_frame: int
    chunk_frames: tuple[int, ...]
    history: str = "clean"
    sink: int = 0
    window: int | None = None
    local_frames: int | None = None

    def visible(self, query: Segment, key: Segment) -> Range:
        """The ``[begin, end)`` part of ``key`` that ``query`` sees, in packed tokens; both of this document."""
        begin, end = self._visible(_columns([query]), _columns([key]))
        return int(begin[0, 0]), int(end[0, 0])

    def _visible(self, query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``visible`` of ``_columns`` of q and of k segments: begins and ends, int64 [q, k] each."""
        query = query[:, :, None]
        distance = query[_CHUNK] - key[_CHUNK]
        near = (key[_CHUNK] < self.sink) | (distance <= (_NO_LIMIT if self.window is None else self.window))
        past = near & (key[_CLEAN] == (self.history == "clean")) & (distance > 0)
        own = (query == key[:, None]).all(0)
        begin = np.broadcast_to(key[_START], distance.shape)
        if self.local_frames is not None:
            # The border is a frame, not a chunk: it may cut the oldest visible chunk.
            first = query[_FRAME] + query[_FRAMES] - self.local_frames
            hidden = np.clip(first - key[_FRAME], 0, key[_FRAMES])
            begin = np.where(own, begin, begin + hidden * self.tokens_per_frame)
        return begin, np.where(own | past, key[_START] + key[_LENGTH], key[_START])


_START, _LENGTH, _CLEAN, _CHUNK, _FRAME, _FRAMES = range(6)
_PAIRS = 2**20  # (query, key) segments that are looked at in one step


def _columns(segments: Sequence[Segment]) -> np.ndarray:
    """int64 [6, n]: start, length, whether clean, chunk, frame, frames."""
    rows = [(s.start, s.length, s.role == "clean", s.chunk, s.frame, s.frames) for s in segments]
    return np.array(rows, dtype=np.int64).reshape(-1, 6).T


class _Tokens(NamedTuple):
    """The rule's variables for every packed token, int64 [L] each."""

    segment: torch.Tensor
    document: torch.Tensor
    chunk: torch.Tensor
    frame: torch.Tensor
    is_history: torch.Tensor
    sink: torch.Tensor
    window: torch.Tensor
    first_frame: torch.Tensor

    def visible(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether token ``q`` sees token ``k``; index tensors that broadcast."""
        distance = self.chunk[q] - self.chunk[k]
        near = (self.chunk[k] < self.sink[q]) | (distance <= self.window[q])
        past = (self.document[q] == self.document[k]) & (self.is_history[k] > 0) & (distance > 0)
        return (self.segment[q] == self.segment[k]) | (past & near & (self.frame[k] >= self.first_frame[q]))


@dataclass(frozen=True, repr=False)
class ChunkLayout:
    """Segments in packed order, and the documents whose rules they follow. Immutable, hashable, equal by content.

    Every segment sees itself in full. It also sees the history segments of earlier chunks of its own document: clean
    chunk j is visible to chunk i when ``j < i and (j < sink or i - j <= window)`` (RAVEN, arXiv 2605.15190). A noisy
    segment is a key for itself only, except in ``blockwise``. Make one with a constructor below.

    length: L, the number of packed tokens. spans: the visible key ranges of each segment, merged: what the attention
    op consumes.
    """

    segments: tuple[Segment, ...]
    documents: tuple[Document, ...]
    # Set once here and not on first use: torch.compile traces plain attributes, not cached properties.
    length: int = field(init=False, compare=False)
    spans: Spans = field(init=False, compare=False)

    def __post_init__(self) -> None:
        members: list[list[Segment]] = [[] for _ in self.documents]
        start = 0
        for s in self.segments:
            if s.start != start:
                raise ValueError(f"segments: got one at {s.start}, expected it at {start}, right after the one before")
            members[s.document].append(s)
            start = s.end
        object.__setattr__(self, "length", start)
        object.__setattr__(self, "spans", _spans(self.documents, members))

    @classmethod
    def repacked(
        cls,
        chunk_frames: Sequence[int],
        tokens_per_frame: int,
        sink: int = 0,
        window: int | None = None,
        order: str = "interleaved",
    ) -> ChunkLayout:
        """Noisy chunks z_1..z_n and their clean end points x_1..x_{n-1}, as RAVEN trains them.

        chunk_frames: latent frames of each chunk. order: "interleaved" = z_1 x_1 z_2 x_2 .. z_n, or "clean_first" =
        x_1 .. x_{n-1} z_1 .. z_n, whose visible history is contiguous. sink, window: in chunks.
        """
        sizes = _chunk_frames(chunk_frames)
        noisy = [("noisy", i) for i in range(len(sizes))]
        clean = [("clean", i) for i in range(len(sizes) - 1)]
        if order == "interleaved":
            parts = sorted(noisy + clean, key=lambda part: (part[1], part[0] == "clean"))
        elif order == "clean_first":
            parts = clean + noisy
        else:
            raise ValueError(f"order: got {order!r}, expected 'interleaved' or 'clean_first'")
        return cls._single(parts, sizes, tokens_per_frame, "clean", sink, window)

    @classmethod
    def teacher_forcing(
        cls, chunk_frames: Sequence[int], tokens_per_frame: int, sink: int = 0, window: int | None = None
    ) -> ChunkLayout:
        """All clean chunks x_1..x_n, then all noisy ones z_1..z_n; the visibility of ``repacked``."""
        sizes = _chunk_frames(chunk_frames)
        parts = [(role, i) for role in ("clean", "noisy") for i in range(len(sizes))]
        return cls._single(parts, sizes, tokens_per_frame, "clean", sink, window)

    @classmethod
    def prefill(
        cls, chunk_frames: Sequence[int], tokens_per_frame: int, sink: int = 0, window: int | None = None
    ) -> ChunkLayout:
        """Clean chunks x_1..x_n alone: encodes a history in one pass, as when a cache is computed anew."""
        sizes = _chunk_frames(chunk_frames)
        return cls._single([("clean", i) for i in range(len(sizes))], sizes, tokens_per_frame, "clean", sink, window)

    @classmethod
    def blockwise(
        cls, chunk_frames: Sequence[int], tokens_per_frame: int, local_frames: int | None = None
    ) -> ChunkLayout:
        """One stream of noisy chunks, each seeing itself and all earlier ones (diffusion forcing, CausVid).

        local_frames: a query sees keys of frames from ``end of its own chunk - local_frames`` on, so its own chunk
        counts, and the border may cut a chunk. Raises ``ValueError`` when it is shorter than a chunk.
        """
        sizes = _chunk_frames(chunk_frames)
        if local_frames is not None and check_int("local_frames", local_frames, 1) < max(sizes):
            raise ValueError(f"local_frames: got {local_frames}, expected at least the longest chunk, {max(sizes)}")
        parts = [("noisy", i) for i in range(len(sizes))]
        return cls._single(parts, sizes, tokens_per_frame, "noisy", 0, None, local_frames)

    @classmethod
    def bidirectional(cls, frames: int, tokens_per_frame: int) -> ChunkLayout:
        """One noisy segment of ``frames`` latent frames in which every token sees every token."""
        return cls._single([("noisy", 0)], (check_int("frames", frames, 1),), tokens_per_frame, "clean", 0, None)

    @classmethod
    def concat(cls, layouts: Iterable[ChunkLayout]) -> ChunkLayout:
        """The layouts one after the other, as documents that never see each other.

        Each keeps its own rule, chunk sizes and tokens per frame; chunks and frames are counted from 0 in each.
        """
        segments: list[Segment] = []
        documents: list[Document] = []
        for layout in layouts:
            start, document = (documents[-1].start + documents[-1].length if documents else 0), len(documents)
            for s in layout.segments:
                segments.append(replace(s, start=s.start + start, document=s.document + document))
            documents.extend(replace(d, start=d.start + start) for d in layout.documents)
        return cls(tuple(segments), tuple(documents))

    @staticmethod
    def chunks(frames: int, chunk: int, first: int | None = None) -> tuple[int, ...]:
        """Chunk sizes that cover ``frames``: ``first`` (if given), then equal ones of ``chunk`` latent frames."""
        check_int("frames", frames, 1)
        check_int("chunk", chunk, 1)
        head = () if first is None else (check_int("first", first, 1),)
        rest = frames - sum(head)
        if rest < 0 or rest % chunk:
            after = "" if first is None else f" after a first chunk of {first}"
            raise ValueError(f"frames: got {frames}, expected a multiple of chunk={chunk}{after}")
        return head + (chunk,) * (rest // chunk)

    @classmethod
    def _single(
        cls,
        parts: Sequence[tuple[str, int]],
        sizes: tuple[int, ...],
        tokens_per_frame: int,
        history: str,
        sink: int,
        window: int | None,
        local_frames: int | None = None,
    ) -> ChunkLayout:
        tokens_per_frame = check_int("tokens_per_frame", tokens_per_frame, 1)
        sink = check_int("sink", sink, 0)
        window = None if window is None else check_int("window", window, 0)
        segments, start = [], 0
        for role, chunk in parts:
            length = sizes[chunk] * tokens_per_frame
            segments.append(Segment(start, length, role, chunk, sum(sizes[:chunk]), sizes[chunk], 0))
            start += length
        document = Document(0, start, tokens_per_frame, sizes, history, sink, window, local_frames)
        return cls(tuple(segments), (document,))

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame. Raises ``ValueError`` when the documents differ in it (or there are none)."""
        values = sorted({d.tokens_per_frame for d in self.documents})
        if len(values) != 1:
            raise ValueError(f"layout: got tokens_per_frame {values}, expected one value; ask each of .documents")
        return values[0]

    def by_role(self, role: str, document: int | None = None) -> tuple[Segment, ...]:
        """Segments of one role, by (document, chunk); of one document when ``document`` is given."""
        if role not in ROLES:
            raise ValueError(f"role: got {role!r}, expected 'noisy' or 'clean'")
        found = [s for s in self.segments if s.role == role and document in (None, s.document)]
        return tuple(sorted(found, key=lambda s: (s.document, s.chunk)))

    def tokens(self, role: str, document: int | None = None) -> torch.Tensor:
        """int64: packed indices of the tokens of one role, by (document, chunk), so in the order of the video."""
        ranges = [torch.arange(s.start, s.end) for s in self.by_role(role, document)]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def segment_index(self) -> torch.Tensor:
        """int64 [L]: index in ``segments`` of each token, to gather a table with one row per segment."""
        lengths = torch.tensor([s.length for s in self.segments], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def segment_ids(self) -> torch.Tensor:
        """int32 [L]: ``segment_index`` in the integer type that kernels read."""
        return self.segment_index().to(torch.int32)

    def positions(self, rows: int | Sequence[int], cols: int | Sequence[int]) -> torch.Tensor:
        """int32 [L, 3]: (frame, row, column) of each token; rows * cols = tokens of a latent frame.

        rows, cols: an int for all documents, or one for each. Raises ``ValueError`` when they do not multiply to
        ``tokens_per_frame``.
        """
        grids = list(zip(self._per_document("rows", rows), self._per_document("cols", cols), strict=True))
        for document, (r, c) in zip(self.documents, grids, strict=True):
            if r * c != document.tokens_per_frame:
                raise ValueError(f"rows, cols: got {r} x {c}, expected {document.tokens_per_frame} tokens in a frame")
        parts = [torch.empty(0, 3, dtype=torch.int32)]
        for s in self.segments:
            r, c = grids[s.document]
            axes = (torch.arange(s.frame, s.frame + s.frames), torch.arange(r), torch.arange(c))
            parts.append(torch.cartesian_prod(*axes).to(torch.int32))
        return torch.cat(parts)

    def _per_document(self, name: str, value: int | Sequence[int]) -> list[int]:
        values = list(value) if isinstance(value, Sequence) else [value] * len(self.documents)
        if len(values) != len(self.documents):
            raise ValueError(f"{name}: got {len(values)} values, expected one or {len(self.documents)}")
        return [check_int(name, v, 1) for v in values]

    def flops(self, heads: int, head_dim: int, backward: bool = False) -> int:
        """Floating-point operations of attention on one sequence: two products of 2 * head_dim per visible pair and
        head in the forward pass, and 2.5 times that (five products) in the backward pass."""
        forward = 4 * check_int("head_dim", head_dim, 1) * check_int("heads", heads, 1) * self.spans.pairs
        return forward * 5 // 2 if backward else forward

    def dense_mask(self) -> torch.Tensor:
        """bool [L, L], true where the query (row) sees the key (column); from the rule, token by token."""
        index = torch.arange(self.length)
        return self._tokens().visible(index[:, None], index[None, :])

    def _tokens(self, device: torch.device | str = "cpu") -> _Tokens:
        index = self.segment_index()
        frames = [
            torch.arange(s.frame, s.frame + s.frames).repeat_interleave(self.documents[s.document].tokens_per_frame)
            for s in self.segments
        ]
        table = []
        for i, s in enumerate(self.segments):
            d = self.documents[s.document]
            first = 0 if d.local_frames is None else s.frame + s.frames - d.local_frames
            window = _NO_LIMIT if d.window is None else d.window
            table.append((i, s.document, s.chunk, int(s.role == d.history), d.sink, window, first))
        columns = torch.tensor(table, dtype=torch.int64).reshape(-1, 7)[index].to(device).unbind(1)
        frame = torch.cat(frames or [index]).to(device)
        return _Tokens(*columns[:3], frame, *columns[3:])

    def to_flex(self, device: torch.device | str = "cpu", block_size: int = 128) -> BlockMask:
        """The same mask for ``torch.nn.attention.flex_attention``; never forms an [L, L] tensor."""
        from torch.nn.attention.flex_attention import BlockMask

        from raven._flex import block_tables

        tokens = self._tokens(device)
        tables = block_tables(self.spans, self.length, check_int("block_size", block_size, 1))
        return BlockMask.from_kv_blocks(
            *(table[None, None].to(device) for table in tables),
            BLOCK_SIZE=block_size,
            mask_mod=lambda b, h, q, k: tokens.visible(q, k),
            seq_lengths=(self.length, self.length),
        )

    def plot(self, path: str | PathLike[str], title: str | None = None) -> None:
        """Draw the mask to an image file: rows are queries, columns keys, filled where the row sees the column."""
        from raven._plot import plot_layout

        plot_layout(self, path, title)

    def __repr__(self) -> str:
        names = " ".join(s.label for s in self.segments[:16])
        more = " .." if len(self.segments) > 16 else ""
        return f"ChunkLayout({self.length} tokens, {len(self.documents)} document(s): {names}{more})"


def _spans(documents: Sequence[Document], members: Sequence[Sequence[Segment]]) -> Spans:
    """What the segments of each document see, in the fewest ranges.

    Neighbouring segments never see the same: each sees itself, and of two at most one sees the other.
    """
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for document, segments in zip(documents, members, strict=True):
        table = _columns([s for s in segments if s.length])
        step = max(1, _PAIRS // max(1, table.shape[1]))
        for first in range(0, table.shape[1], step):
            query = table[:, first : first + step]
            begin, end = document._visible(query, table)
            row, column = np.nonzero(begin < end)
            begin, end = begin[row, column], end[row, column]
            joined = (row[1:] == row[:-1]) & (begin[1:] == end[:-1])
            heads, tails = (np.flatnonzero(~x) for x in (np.append(False, joined), np.append(joined, False)))
            queries.append(np.stack([query[_START], query[_START] + query[_LENGTH]], axis=1))
            keys.append(np.stack([begin[heads], end[tails]], axis=1))
            counts.append(np.bincount(row[heads], minlength=query.shape[1]))
    if not queries:
        return Spans.build([])
    q, kv, count = np.concatenate(queries), np.concatenate(keys), np.concatenate(counts)
    order = np.argsort(q[:, 0], kind="stable")  # documents may lie inside each other
    if (order[1:] < order[:-1]).any():
        kv = kv[np.argsort(np.argsort(order)[np.repeat(np.arange(len(q)), count)], kind="stable")]
        q, count = q[order], count[order]
    indptr = np.append(0, np.cumsum(count))
    return Spans(*(torch.from_numpy(x) for x in (q, indptr, kv)))


def _chunk_frames(sizes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, (int, str)):
        raise TypeError(f"chunk_frames: got {sizes!r}, expected a sequence of integers; see ChunkLayout.chunks")
    checked = tuple(check_int("chunk_frames", size, 1) for size in sizes)
    if not checked:
        raise ValueError("chunk_frames: got no chunk, expected at least one")
    return checked
