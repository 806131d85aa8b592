"""Oracles in float64 for sizes at which a dense mask does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raven.reference import chunk_attention as reference

if TYPE_CHECKING:
    from raven.layout import ChunkLayout
    from raven.spans import Spans

# Queries of one step: a score matrix of 2048 x 60,840 in float64 is one gigabyte a head.
_ROWS = 2048


def attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ChunkLayout | Spans,
    scale: float | None = None,
    grad_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention over ``layout`` in float64, in slices of queries: ``(out, lse)``, and dq, dk, dv with ``grad_out``.

    q, grad_out ``[B, Lq, H, D]``, k, v ``[B, Lk, Hkv, D]`` of any floating dtype and device. To check a large job, pass
    a few of its heads: heads do not touch each other.
    """
    spans = getattr(layout, "spans", layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.detach().double() for x in (q, k, v))
    ranges = _sliced(spans)
    out, lse = reference.chunk_attention_forward(q, k, v, *ranges, scale)
    if grad_out is None:
        return out, lse
    grad_out = grad_out.detach().double()
    return out, lse, *reference.chunk_attention_backward(grad_out, None, q, k, v, out, lse, *ranges, scale)


def _sliced(spans: Spans) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same pairs with long query ranges cut into slices."""
    q_ranges: list[list[int]] = []
    kv_ranges: list[list[int]] = []
    indptr = [0]
    keys = spans.kv_ranges.tolist()
    pointers = spans.kv_indptr.tolist()
    for i, (begin, end) in enumerate(spans.q_ranges.tolist()):
        for start in range(begin, end, _ROWS):
            q_ranges.append([start, min(start + _ROWS, end)])
            kv_ranges += keys[pointers[i] : pointers[i + 1]]
            indptr.append(len(kv_ranges))
    pairs = (torch.tensor(x, dtype=torch.int32).reshape(-1, 2) for x in (q_ranges, kv_ranges))
    return next(pairs), torch.tensor(indptr, dtype=torch.int32), next(pairs)
