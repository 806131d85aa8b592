"""Rows of a cache as attention takes them, in plain PyTorch: scaled back, and rotated where keys are stored raw."""

from __future__ import annotations

import torch
from torch import Tensor

from raven.reference.qk_norm_rope import cos_sin, rotate


def read_rows(
    cache: Tensor,
    rows: Tensor,
    out: Tensor,
    scale: Tensor | None = None,
    positions: Tensor | None = None,
    theta: float = 10000.0,
) -> None:
    """Write ``out[:, rows]``; arguments as in ``raven.ops.read_rows``. Computed in float32, in float64 for such."""
    dtype = torch.float64 if torch.float64 in (cache.dtype, out.dtype) else torch.float32
    kept = (rows >= 0).nonzero().squeeze(-1)
    index = rows[kept].long()
    # Not every PyTorch build selects rows of float8, but all select bytes.
    bits = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    value = bits[:, index].view(cache.dtype).to(dtype)
    if scale is not None:
        value = value * scale[:, index].unsqueeze(-1).to(dtype)
    if positions is not None:
        value = rotate(value, *cos_sin(positions[kept], value.shape[-1], theta, dtype))
    out[:, index] = value.to(out.dtype)
