"""Norm, rotary and the write into the cache, in plain PyTorch; and the rule of float8 storage."""

from __future__ import annotations

import torch
from torch import Tensor

from raven.reference.qk_norm_rope import compute_dtype, cos_sin, norm, rotate

E4M3_MAX = 448.0
# Below it a head's scale stays, so that 448 / amax is finite.
SMALLEST_AMAX = 2.0**-64


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` in float8 e4m3 and its scales ``[...]`` float32: the largest magnitude of the D numbers is 448.

    A NaN or infinity makes its whole head NaN when it is read back.
    """
    amax = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    # A tensor over a tensor: a number over a tensor is a reciprocal and a product, with two roundings.
    factor = torch.full_like(amax, E4M3_MAX) / amax
    return (x * factor).to(torch.float8_e4m3fn), (amax / E4M3_MAX).squeeze(-1).float()


def dequantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``quantize`` stored, in ``dtype``."""
    return (x.float() * scale.unsqueeze(-1)).to(dtype)


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float = 1e-6,
    theta: float = 10000.0,
    per_head: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotate_keys: bool = True,
) -> Tensor:
    """Return the new queries; write new keys, and values as they are, to rows ``slots`` of the caches.

    ``slots [L]`` int32, one row for each token, the same for the whole batch; a negative slot is not written.
    Arguments otherwise as in ``raven.ops.qk_norm_rope``; caches ``[B, S, H, D]`` of any floating dtype, to which keys
    are rounded straight from the dtype of computation. Caches of float8 e4m3 come with ``k_scale`` and ``v_scale``
    ``[B, S, H]`` float32, which get the scales of ``quantize``. Without ``rotate_keys`` they are only normalised.
    """
    dtype = compute_dtype(q)
    cos, sin = cos_sin(positions, q.shape[-1], theta, dtype)
    q_out = rotate(norm(q.to(dtype), q_weight, eps, per_head), cos, sin).to(q.dtype)
    k_out = norm(k.to(dtype), k_weight, eps, per_head)
    if rotate_keys:
        k_out = rotate(k_out, cos, sin)
    kept = (slots >= 0).nonzero().squeeze(-1)
    rows = slots[kept].long()
    for new, cache, scale in ((k_out, k_cache, k_scale), (v, v_cache, v_scale)):
        new = new[:, kept]
        if scale is None:
            cache[:, rows] = new.to(cache.dtype)
        else:
            stored, scale[:, rows] = quantize(new.to(dtype))
            # Not every PyTorch build writes float8 rows, but all write bytes.
            cache.view(torch.uint8)[:, rows] = stored.view(torch.uint8)
    return q_out
