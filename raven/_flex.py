"""Block tables for FlexAttention, counted from spans instead of from a dense mask."""

from __future__ import annotations

import torch

from raven.spans import Spans


def block_tables(spans: Spans, length: int, block_size: int) -> tuple[torch.Tensor, ...]:
    """int32 (partial counts [n], partial blocks [n, n], full counts [n], full blocks [n, n]), n blocks a side.

    A block is full when each of its ``block_size ** 2`` pairs is visible; one that reaches past ``length`` never is.
    """
    n = -(-length // block_size)
    visible = torch.zeros(n, n, dtype=torch.int64)
    for q, keys in spans.rows():
        columns = sum((_overlap(k, n, block_size) for k in keys), torch.zeros(n, dtype=torch.int64))
        visible += _overlap(q, n, block_size)[:, None] * columns
    full = visible == block_size**2
    return (*_ordered((visible > 0) & ~full), *_ordered(full))


def _overlap(span: tuple[int, int], n: int, block_size: int) -> torch.Tensor:
    """int64 [n]: how many tokens of each block lie in ``span``."""
    begin = torch.arange(n) * block_size
    return ((begin + block_size).clamp(max=span[1]) - begin.clamp(min=span[0])).clamp(min=0)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row, the number of true columns, and all column indices with the true ones first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32), order.to(torch.int32).contiguous()
