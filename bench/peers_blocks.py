"""A mask of key ranges for FlashAttention 4: block lists on the device, and the visibility of one pair in CuTe."""

from __future__ import annotations

import importlib

import torch

from raven.spans import Spans

Lists = tuple[torch.Tensor, torch.Tensor]


def range_table(spans: Spans, block: int) -> torch.Tensor:
    """Begin and end of each key range of each query, int32 ``[L, 2 R]``.

    L is ``spans.q_end`` rounded up to whole blocks, R the most ranges that a query has; missing ones are empty.
    """
    rows = spans.rows()
    width = max(len(keys) for _, keys in rows)
    table = torch.zeros(-(-spans.q_end // block) * block, 2 * width, dtype=torch.int32)
    for (begin, end), keys in rows:
        table[begin:end, : 2 * len(keys)] = torch.tensor(keys, dtype=torch.int32).flatten()
    return table


def block_lists(table: torch.Tensor, kv_len: int, block: int, by_keys: bool = False) -> tuple[Lists, Lists]:
    """Which blocks are seen in part, and which wholly: each a count int32 ``[1, 1, n]`` and indices ``[1, 1, n, m]``.

    For each block of queries the blocks of keys, or with ``by_keys`` for each block of keys those of queries. Keys
    beyond ``kv_len`` and the rows beyond the last query make a block partial: they are masked as any other.
    """
    edges = torch.arange(0, kv_len, block, device=table.device, dtype=torch.int64)
    begin, end = table.long().unflatten(1, (-1, 2)).unbind(2)
    # Of each query and block of keys the number of visible keys; ranges of one query are disjoint.
    seen = torch.zeros(len(table) // block, len(edges), device=table.device, dtype=torch.int64)
    for first, last in zip(begin.unbind(1), end.unbind(1), strict=True):
        inside = (last[:, None].clamp(max=kv_len).minimum(edges + block) - first[:, None].maximum(edges)).clamp(min=0)
        seen += inside.unflatten(0, (-1, block)).sum(1)
    if by_keys:
        seen = seen.T
    whole = seen == block * block
    return _listed((seen > 0) & ~whole), _listed(whole)


def _listed(chosen: torch.Tensor) -> Lists:
    """Counts, and the indices of what is chosen before those of the rest, ascending."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()


def cute_mask(ranges: int):
    """Whether a query sees a key, for a table of ``range_table`` with so many ranges; needs nvidia-cutlass-dsl."""
    cutlass = importlib.import_module("cutlass")
    cute = importlib.import_module("cutlass.cute")
    # The module and not its function: compiled kernels are stored by the repr of what is captured here.
    utils = importlib.import_module("flash_attn.cute.utils")

    @cute.jit
    def visible(batch, head, query, key, seqlen_info, aux_tensors):
        table = aux_tensors[0]
        row = query[0]
        first = utils.scalar_to_ssa(table[row, 0], cutlass.Int32)
        last = utils.scalar_to_ssa(table[row, 1], cutlass.Int32)
        seen = (key >= first) & (key < last)
        for i in cutlass.range_constexpr(1, ranges):
            first = utils.scalar_to_ssa(table[row, 2 * i], cutlass.Int32)
            last = utils.scalar_to_ssa(table[row, 2 * i + 1], cutlass.Int32)
            seen = seen | ((key >= first) & (key < last))
        return seen

    return visible
