"""Where the segments of a packed row lie, as GPU kernels read it; it depends on the shapes alone, on no GPU's size.

``lengths`` are the tokens of each segment, ``None`` where all have one length and a division finds the segment. What
is on the device is built on first use, so a CUDA graph is captured after one call outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from raven.graphs import held_by_graphs


def segment_of_tokens(lengths: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """The segment of each token, int32 ``[L]``."""
    return None if lengths is None else held_by_graphs(_segment_of_tokens(tuple(lengths), device))


@lru_cache(maxsize=64)
def _segment_of_tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        segments = torch.arange(len(lengths), dtype=torch.int32)
        return segments.repeat_interleave(torch.tensor(lengths)).to(device)


class Blocks(NamedTuple):
    """How the tokens of every batch entry are cut into blocks of at most ``rows`` that lie in one segment.

    count: blocks of a segment where all have one length, else of a batch entry.
    total: blocks in all; longest: of the longest segment.
    items: (segment, first token, tokens) of each block of a batch entry, int32 ``[count, 3]``; starts: the number of
        the first block of each segment and the count, int32 ``[N + 1]``. ``None`` for segments of one length.
    """

    rows: int
    count: int
    total: int
    longest: int
    items: Tensor | None
    starts: Tensor | None


def cut_into_blocks(
    batch: int, tokens: int, segments: int, lengths: Sequence[int] | None, device: torch.device, blocks: int
) -> Blocks:
    """The smallest rows that make at most ``blocks`` blocks, or one for each segment if those are more."""
    if lengths is None:
        length = tokens // segments
        rows = _rows(batch * segments, (length,), blocks)
        count = -(-length // rows)
        return Blocks(rows, count, batch * segments * count, count, None, None)
    rows = _rows(batch, tuple(lengths), blocks)
    items, starts = held_by_graphs(_ragged(tuple(lengths), rows, device))
    return Blocks(rows, len(items), batch * len(items), -(-max(lengths) // rows), items, starts)


@lru_cache(maxsize=256)
def _rows(repeats: int, lengths: tuple[int, ...], blocks: int) -> int:
    low, high = 1, max(1, *lengths)
    while low < high:
        rows = (low + high) // 2
        if repeats * sum(-(-length // rows) for length in lengths) <= blocks:
            high = rows
        else:
            low = rows + 1
    return low


@lru_cache(maxsize=64)
def _ragged(lengths: tuple[int, ...], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    items, starts, first = [], [0], 0
    for segment, length in enumerate(lengths):
        items += [(segment, first + i, min(rows, length - i)) for i in range(0, length, rows)]
        starts.append(len(items))
        first += length
    with torch.inference_mode(False):
        return tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (items, starts))
