"""RMS norm of queries and keys and 3-D rotary positions, in plain PyTorch: the oracle and the CPU path.

Wan 2.1 (arXiv 2503.20314) normalises a query or key over all heads together, then turns interleaved channel pairs by
angles that grow with the token's frame, row and column. Everything is computed in float32 (float64 for float64
inputs) and rounded once, at the end.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs that turn with (frame, row, column); the frame takes what does not divide by three."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@lru_cache(maxsize=32)
def frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """Angle in radians per unit of position of each channel pair, ``head_dim // 2`` numbers.

    Pair ``i`` of an axis with ``n`` pairs turns by ``theta ** (-i / n)``: every axis has its own range.
    """
    return tuple(theta ** (-i / pairs) for pairs in axis_pairs(head_dim) for i in range(pairs))


def cos_sin(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle; ``positions [..., L, 3]`` gives two tensors ``[..., L, 1, D / 2]``.

    The angle is formed in float64 and brought into one turn before it is rounded, so that it is exact to ``dtype``
    at any position.
    """
    frequency = torch.tensor(frequencies(head_dim, theta), dtype=torch.float64, device=positions.device)
    parts = enumerate(frequency.split(axis_pairs(head_dim)))
    angle = torch.cat([positions[..., axis, None].double() * part for axis, part in parts], dim=-1)
    angle = torch.remainder(angle, 2 * math.pi).to(dtype).unsqueeze(-2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs of ``x [..., L, H, D]``."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mean(x: Tensor, per_head: bool) -> Tensor:
    """Mean of ``x [B, L, H, D]`` over what one norm covers, kept as ones."""
    return x.mean(dim=-1 if per_head else (-2, -1), keepdim=True)


def _as_row(weight: Tensor, x: Tensor, per_head: bool) -> Tensor:
    """The weight ``[H * D]`` (``[D]`` per head) in the shape and dtype that multiplies ``x [B, L, H, D]``."""
    return weight.to(x.dtype) if per_head else weight.to(x.dtype).view(x.shape[-2:])


def norm(x: Tensor, weight: Tensor | None, eps: float, per_head: bool) -> Tensor:
    """RMS norm of ``x [B, L, H, D]`` over ``H * D`` (over ``D`` per head), times ``weight``; no weight, no norm."""
    if weight is None:
        return x
    return x * torch.rsqrt(_mean(x * x, per_head) + eps) * _as_row(weight, x, per_head)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    eps: float = 1e-6,
    theta: float = 10000.0,
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated copies of ``q`` and ``k``; arguments as in ``raven.ops.qk_norm_rope``."""
    dtype = compute_dtype(q)
    cos, sin = cos_sin(positions, q.shape[-1], theta, dtype)
    q_out = rotate(norm(q.to(dtype), q_weight, eps, per_head), cos, sin).to(q.dtype)
    k_out = rotate(norm(k.to(dtype), k_weight, eps, per_head), cos, sin).to(k.dtype)
    return q_out, k_out


def _backward_one(
    x: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    per_head: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of one tensor and of its weight (float32 or float64; empty without a weight)."""
    grad = rotate(grad.to(cos.dtype), cos, -sin)
    if weight is None:
        return grad.to(x.dtype), grad.new_empty(0)
    value = x.to(cos.dtype)
    rstd = torch.rsqrt(_mean(value * value, per_head) + eps)
    normed = value * rstd
    scaled = grad * _as_row(weight, value, per_head)
    grad_x = rstd * (scaled - normed * _mean(scaled * normed, per_head))
    if not weight_grad:
        return grad_x.to(x.dtype), grad.new_empty(0)
    over = (0, 1, 2) if per_head else (0, 1)
    return grad_x.to(x.dtype), (grad * normed).sum(dim=over).flatten()


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    eps: float,
    theta: float,
    per_head: bool,
    weight_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and both weights; a weight's is float32 or float64, and empty when there is none to give.

    A rotation's transpose is the turn by the negative angle. With ``n = x * rstd`` and ``g`` the gradient turned back,
    the weight's gradient is ``sum g n`` and ``dx = rstd * (g w - n * mean(g w n))``.
    """
    cos, sin = cos_sin(positions, q.shape[-1], theta, compute_dtype(q))
    dq, dq_weight = _backward_one(q, q_weight, grad_q, cos, sin, eps, per_head, weight_grad)
    dk, dk_weight = _backward_one(k, k_weight, grad_k, cos, sin, eps, per_head, weight_grad)
    return dq, dk, dq_weight, dk_weight
