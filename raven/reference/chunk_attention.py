"""Attention over `Spans` in plain PyTorch: an oracle with a dense mask, and the path for machines without a GPU.

Shapes: q ``[B, Lq, H, D]``, k and v ``[B, Lk, Hkv, D]`` with H a multiple of Hkv; out like q, lse ``[B, H, Lq]``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: softmax of the scores where ``mask`` ``[Lq, Lk]`` is true. Differentiable; O(Lq * Lk) memory."""
    group = q.shape[2] // k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    k, v = (x.repeat_interleave(group, dim=2).to(dtype) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)  # [B, H, Lq]
    # A row without keys has lse = -inf: replacing it before the subtraction gives weights of 0 instead of NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype), lse


def chunk_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_ranges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention call per query range on its gathered keys; never a mask."""
    B, Lq, H, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, Lq), float("-inf"), dtype=dtype, device=q.device)
    for (q0, q1), keys in _ranges(q_ranges, kv_indptr, kv_ranges) if q.numel() else ():
        if q0 == q1 or not keys:
            continue
        qi, ki, vi = (x.transpose(1, 2) for x in (q[:, q0:q1], _gather(k, keys, H), _gather(v, keys, H)))
        if q.device.type == "cpu":
            o, s = _flash_cpu(qi, ki, vi, 0.0, False, scale=scale)
        else:
            scores = (qi.to(dtype) @ ki.to(dtype).transpose(-1, -2)) * scale
            s = torch.logsumexp(scores, dim=-1)
            o = torch.exp(scores - s[..., None]) @ vi.to(dtype)
        out[:, q0:q1] = o.transpose(1, 2)
        lse[:, :, q0:q1] = s
    return out, lse


def chunk_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_ranges: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_ranges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v; those of keys that several ranges see are summed in the accumulation dtype."""
    H = q.shape[2]
    dtype = accumulation_dtype(q.dtype)
    q, k, v, grad_out = (_inner_contiguous(x) for x in (q, k, v, grad_out))
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (k, v))
    for (q0, q1), keys in _ranges(q_ranges, kv_indptr, kv_ranges) if q.numel() else ():
        if q0 == q1 or not keys:
            continue
        qi, ki, vi, oi, gi = (
            x.transpose(1, 2)
            for x in (q[:, q0:q1], _gather(k, keys, H), _gather(v, keys, H), out[:, q0:q1], grad_out[:, q0:q1])
        )
        si = lse[:, :, q0:q1]
        if q.device.type == "cpu" and grad_lse is None:
            dqi, dki, dvi = _flash_cpu_backward(gi, qi, ki, vi, oi, si, 0.0, False, scale=scale)
        else:
            qi, ki, vi, oi, gi = (x.to(dtype) for x in (qi, ki, vi, oi, gi))
            p = torch.exp((qi @ ki.transpose(-1, -2)) * scale - si[..., None])
            delta = (gi * oi).sum(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[:, :, q0:q1]
            ds = p * (gi @ vi.transpose(-1, -2) - delta[..., None]) * scale
            dqi, dki, dvi = ds @ ki, ds.transpose(-1, -2) @ qi, p.transpose(-1, -2) @ gi
        dq[:, q0:q1] = dqi.transpose(1, 2)
        _scatter_add(dk, dki.transpose(1, 2), keys)
        _scatter_add(dv, dvi.transpose(1, 2), keys)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    """PyTorch's CPU attention reads a last dimension of any other stride wrongly, without an error."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _ranges(
    q_ranges: torch.Tensor, kv_indptr: torch.Tensor, kv_ranges: torch.Tensor
) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    indptr, keys = kv_indptr.tolist(), [tuple(r) for r in kv_ranges.tolist()]
    for i, (q0, q1) in enumerate(q_ranges.tolist()):
        yield (q0, q1), [(b, e) for b, e in keys[indptr[i] : indptr[i + 1]] if e > b]


def _gather(x: torch.Tensor, ranges: list[tuple[int, int]], heads: int) -> torch.Tensor:
    parts = [x[:, b:e] for b, e in ranges]
    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _scatter_add(total: torch.Tensor, grad: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
    B, _, heads, D = total.shape
    grad = grad.reshape(B, grad.shape[1], heads, -1, D).sum(3, dtype=total.dtype)  # query heads of one key head
    at = 0
    for b, e in ranges:
        total[:, b:e] += grad[:, at : at + e - b]
        at += e - b
