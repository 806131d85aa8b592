"""RMS norm and SiLU of rows, or only the sum before them, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raven.reference.qk_norm_rope import compute_dtype

EPS = 1e-24  # under the root: only a row of zeros feels it


def norm_silu(
    x: Tensor, out: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    """Write ``out``; arguments as in ``raven.ops.norm_silu``. Computed in float32, in float64 for such."""
    dtype = compute_dtype(x)
    value = x.to(dtype)
    for term in (bias, residual):
        value = value if term is None else value + term.to(dtype)
    if weight is not None:
        root = torch.rsqrt(value.square().mean(-1, keepdim=True) + EPS)
        value = F.silu(value * root * weight.to(dtype))
    out[..., : x.shape[-1]] = value.to(out.dtype)
    out[..., x.shape[-1] :] = 0
