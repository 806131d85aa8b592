"""Norm, rotary and the write into the cache, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from raven.reference.qk_norm_rope import compute_dtype, cos_sin, norm, rotate


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
) -> Tensor:
    """Return the new queries; write new keys, and values as they are, to rows ``slots`` of the caches.

    ``slots [L]`` int32, one row for each token, the same for the whole batch; a negative slot is not written.
    Arguments otherwise as in ``raven.ops.qk_norm_rope``; caches ``[B, S, H, D]`` of any floating dtype, to which keys
    are rounded straight from the dtype of computation.
    """
    dtype = compute_dtype(q)
    cos, sin = cos_sin(positions, q.shape[-1], theta, dtype)
    q_out = rotate(norm(q.to(dtype), q_weight, eps, per_head), cos, sin).to(q.dtype)
    k_out = rotate(norm(k.to(dtype), k_weight, eps, per_head), cos, sin)
    kept = (slots >= 0).nonzero().squeeze(-1)
    rows = slots[kept].long()
    k_cache[:, rows] = k_out[:, kept].to(k_cache.dtype)
    v_cache[:, rows] = v[:, kept].to(v_cache.dtype)
    return q_out
