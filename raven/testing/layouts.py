"""Seeded random masks for fuzzing: every constructor of `ChunkLayout`, cached decoding, and spans that fit no tile."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from raven.layout import ChunkLayout
from raven.spans import Range, Spans

_FRAME_TOKENS = (1, 2, 7, 16, 23, 31, 43, 64)


@dataclass(frozen=True)
class RandomMask:
    """A mask of ``q_len`` queries and ``kv_len`` keys; ``layout`` is what ``chunk_attention`` takes."""

    kind: str
    layout: ChunkLayout | Spans
    q_len: int
    kv_len: int

    @property
    def spans(self) -> Spans:
        return getattr(self.layout, "spans", self.layout)

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """bool [q_len, kv_len], true where the query sees the key."""
        return self.spans.dense_mask(self.q_len, self.kv_len).to(device)


def random_mask(seed: int, max_tokens: int = 700) -> RandomMask:
    """The mask of a seed; kinds take turns, so ``len(KINDS)`` seeds in a row give each once.

    ``many_segments`` has 1,040 to 1,300 segments, whatever ``max_tokens`` says; the others have at most ``max_tokens``
    queries and keys.
    """
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    made = _MAKERS[kind](rng, max_tokens)
    if isinstance(made, ChunkLayout):
        return RandomMask(kind, made, made.length, made.length)
    spans, q_len, kv_len = made
    return RandomMask(kind, spans, q_len, kv_len)


def _sizes(rng: random.Random, max_tokens: int) -> tuple[tuple[int, ...], int]:
    """Chunk sizes and tokens per frame such that every chunk twice has at most ``max_tokens`` tokens."""
    tokens = rng.choice([t for t in _FRAME_TOKENS if 2 * t <= max_tokens])
    left = max_tokens // (2 * tokens)
    sizes: list[int] = []
    while left and len(sizes) < 7:
        sizes.append(rng.randint(1, min(3, left)))
        left -= sizes[-1]
        if rng.random() < 0.2:
            break
    return tuple(sizes), tokens


def _history(rng: random.Random) -> dict[str, int | None]:
    return {"sink": rng.choice([0, 0, 1, 2]), "window": rng.choice([None, None, 0, 1, 2, 3])}


def _repacked(rng: random.Random, max_tokens: int) -> ChunkLayout:
    return ChunkLayout.repacked(*_sizes(rng, max_tokens), **_history(rng), order="interleaved")


def _clean_first(rng: random.Random, max_tokens: int) -> ChunkLayout:
    return ChunkLayout.repacked(*_sizes(rng, max_tokens), **_history(rng), order="clean_first")


def _teacher_forcing(rng: random.Random, max_tokens: int) -> ChunkLayout:
    return ChunkLayout.teacher_forcing(*_sizes(rng, max_tokens), **_history(rng))


def _prefill(rng: random.Random, max_tokens: int) -> ChunkLayout:
    return ChunkLayout.prefill(*_sizes(rng, max_tokens), **_history(rng))


def _blockwise(rng: random.Random, max_tokens: int) -> ChunkLayout:
    sizes, tokens = _sizes(rng, max_tokens)
    return ChunkLayout.blockwise(sizes, tokens, local_frames=rng.choice([None, max(sizes), max(sizes) + 1]))


def _bidirectional(rng: random.Random, max_tokens: int) -> ChunkLayout:
    tokens = rng.choice(_FRAME_TOKENS)
    return ChunkLayout.bidirectional(rng.randint(1, max(1, min(8, max_tokens // tokens))), tokens)


def _documents(rng: random.Random, max_tokens: int) -> ChunkLayout:
    count = rng.randint(2, 5)
    makers = (_repacked, _clean_first, _teacher_forcing, _blockwise, _one_token)
    return ChunkLayout.concat(rng.choice(makers)(rng, max_tokens // count) for _ in range(count))


def _one_token(rng: random.Random, max_tokens: int) -> ChunkLayout:
    count = rng.randint(1, min(40, max(1, max_tokens // 2)))
    return ChunkLayout.repacked((1,) * count, 1, **_history(rng), order=rng.choice(["interleaved", "clean_first"]))


def _many_segments(rng: random.Random, max_tokens: int) -> ChunkLayout:
    chunks = rng.randint(521, 650)
    if rng.random() < 0.5:
        return ChunkLayout.repacked((1,) * chunks, 1, sink=1, window=rng.choice([0, 3, 200]), order="clean_first")
    alone, pairs = ChunkLayout.bidirectional(1, 1), ChunkLayout.repacked((1, 1), 1)
    return ChunkLayout.concat([alone] * chunks + [ChunkLayout.bidirectional(1, 100)] + [pairs] * (chunks // 3))


def _cached(rng: random.Random, max_tokens: int) -> tuple[Spans, int, int]:
    """A chunk in flight that reads some slots of a ring: in any order, not merged, the last of them cut."""
    tokens = rng.randint(1, max(1, max_tokens // 8))
    slots = rng.randint(1, 8)
    ranges = [
        (slot * tokens, slot * tokens + rng.choice([tokens, tokens, rng.randint(1, tokens)]))
        for slot in rng.sample(range(slots), rng.randint(1, slots))
    ]
    return _spans([((0, tokens), ranges)]), tokens, slots * tokens


def _scattered(rng: random.Random, max_tokens: int) -> tuple[Spans, int, int]:
    """Gaps, empty query ranges, queries without keys, empty key ranges, keys in any order and cut anywhere."""
    q_len, kv_len = (rng.choice([max_tokens, rng.randint(1, max_tokens)]) for _ in range(2))
    lengths = rng.choice([[1], [0, 1, 2, 5, 63, 64, 65], [0, 1, 63, 64, 65, 127, 128, 129, 300]])
    rows: list[tuple[Range, list[Range]]] = []
    at = 0
    while at < q_len and len(rows) < 60:
        at += rng.choice([0, 0, 1, 7])
        end = min(q_len, at + rng.choice(lengths))
        if at > end:
            break
        cuts = sorted(rng.sample(range(kv_len + 1), min(kv_len + 1, rng.choice([0, 2, 4, 8])) // 2 * 2))
        ranges = list(zip(cuts[::2], cuts[1::2], strict=True))
        if rng.random() < 0.3:
            empty = rng.randint(0, kv_len)
            ranges.append((empty, empty))
        rng.shuffle(ranges)
        rows.append(((at, end), ranges))
        at = end
    return _spans(rows), q_len, kv_len


def _spans(rows: list[tuple[Range, list[Range]]]) -> Spans:
    """Exactly these ranges: ``Spans.build`` would sort and merge them."""
    indptr = [0]
    for _, ranges in rows:
        indptr.append(indptr[-1] + len(ranges))
    keys = [r for _, ranges in rows for r in ranges]
    queries, keys = (torch.tensor(x, dtype=torch.int32).reshape(-1, 2) for x in ([q for q, _ in rows], keys))
    return Spans(queries, torch.tensor(indptr), keys)


_MAKERS: dict[str, Callable[[random.Random, int], ChunkLayout | tuple[Spans, int, int]]] = {
    "interleaved": _repacked,
    "clean_first": _clean_first,
    "teacher_forcing": _teacher_forcing,
    "prefill": _prefill,
    "blockwise": _blockwise,
    "bidirectional": _bidirectional,
    "documents": _documents,
    "one_token": _one_token,
    "many_segments": _many_segments,
    "cached": _cached,
    "scattered": _scattered,
}
KINDS = tuple(_MAKERS)
