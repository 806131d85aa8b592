"""Attention with queries and keys in float8, in plain PyTorch: what was rounded is multiplied in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from raven.reference.chunk_attention import chunk_attention_forward
from raven.reference.kv_append import dequantize


def chunk_attention_float8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    kv_indptr: Tensor,
    kv_ranges: Tensor,
    scale: float,
) -> Tensor:
    """``q [B, Lq, H, D]`` and ``k [B, Lk, Hkv, D]`` float8 with scales ``[B, L, H]``; the result has the dtype of v."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k = dequantize(q, q_scale, dtype), dequantize(k, k_scale, dtype)
    return chunk_attention_forward(q, k, v.to(dtype), q_ranges, kv_indptr, kv_ranges, scale)[0].to(v.dtype)
