"""Rows in float8 with a scale each, in plain PyTorch; GELU first where it is asked for."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from raven.reference.kv_append import quantize
from raven.reference.qk_norm_rope import compute_dtype


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """``x [..., C]`` in float8 e4m3 and its scales ``[...]`` float32, by the rule of float8 storage in the cache.

    gelu: of the numbers first, in its tanh form (arXiv 1606.08415), without a rounding in between.
    """
    value = x.to(compute_dtype(x))
    return quantize(F.gelu(value, approximate="tanh") if gelu else value)
