"""The layers of a Wan block. They know nothing of chunks: lengths of segments and an attention come from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from raven.models.config import WanConfig
from raven.models.packing import Packing

# (layer, q, k, v, q_weight, k_weight) -> output of the self-attention; q, k, v and output are [B, L, H, D].
Attend = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: what norms and modulations are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _per_segment(
    fn: Callable[..., torch.Tensor], lengths: Sequence[int], x: torch.Tensor, *rest: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """``fn(x, *rest, rows)`` with row ``rows[:, i]`` (``[B, segments, n, dim]``) broadcast over segment i's tokens.

    Nothing of size ``[L, n, dim]`` is ever made: equal segments are a reshape, ragged ones are done one by one.
    """
    if len(set(lengths)) == 1:
        split = (len(lengths), lengths[0])
        return fn(*(t.unflatten(1, split) for t in (x, *rest)), rows.unsqueeze(3).unbind(2)).flatten(1, 2)
    parts = zip(*(t.split(tuple(lengths), dim=1) for t in (x, *rest)), rows.unsqueeze(3).unbind(1), strict=True)
    return torch.cat([fn(*tensors, row.unbind(1)) for *tensors, row in parts], dim=1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, with a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(wide(x), x.shape[-1:], None, self.eps) * self.weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, returned in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(wide(x).dtype)
        bias = None if self.bias is None else self.bias.to(wide(x).dtype)
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class StopWhere(torch.autograd.Function):
    """Identity whose gradient is exactly zero at the tokens of a mask ``[L]``."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad.masked_fill(mask[:, None, None], 0), None


class _Attention(nn.Module):
    """The projections that self-attention and cross-attention share."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [B, L, H, D]


class SelfAttention(_Attention):
    """Projections around an attention that the caller supplies (packed or cached)."""

    def forward(self, x: torch.Tensor, layer: int, attend: Attend) -> torch.Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.q, self.k, self.v))
        out = attend(layer, q, k, v, getattr(self.norm_q, "weight", None), getattr(self.norm_k, "weight", None))
        return out.flatten(2)  # before the output projection: the last block applies that to fewer tokens


def _modulated(norm: LayerNorm, x: torch.Tensor, lengths: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` with (shift, scale) = ``table`` ``[B, segments, 2, dim]``, in float32."""

    def fn(y: torch.Tensor, row: Sequence[torch.Tensor]) -> torch.Tensor:
        return (y * (1 + row[1]) + row[0]).to(x.dtype)

    return _per_segment(fn, lengths, norm(wide(x)), rows=table)


def _gated(x: torch.Tensor, y: torch.Tensor, lengths: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    """``x + gate * y`` with gate = ``table`` ``[B, segments, 1, dim]``."""

    def fn(x: torch.Tensor, y: torch.Tensor, row: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.addcmul(x, y.to(x.dtype), row[0].to(x.dtype))

    return _per_segment(fn, lengths, x, y, rows=table)


class CrossAttention(_Attention):
    """Attention to the text; its keys and values do not depend on the video and are computed once."""

    def text(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, text_len, H, D]`` of an embedded text ``[B, text_len, dim]``."""
        return self.split(self.norm_k(self.k(context))), self.split(self.v(context))

    def forward(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = self.split(self.norm_q(self.q(x)))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype))))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated MLP."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attention(
        self, x: torch.Tensor, table: torch.Tensor, lengths: Sequence[int], layer: int, attend: Attend
    ) -> torch.Tensor:
        """Self-attention of ``x`` ``[B, L, dim]`` before its output projection; ``table`` ``[B, segments, 6, dim]``."""
        return self.self_attn(_modulated(self.norm1, x, lengths, table[:, :, 0:2]), layer, attend)

    def forward(
        self,
        x: torch.Tensor,
        levels: torch.Tensor,
        lengths: Sequence[int],
        text: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        attend: Attend,
        keep: Packing | None = None,
    ) -> torch.Tensor:
        """``x`` ``[B, L, dim]`` -> the same; with ``keep`` only the noisy tokens of that packing go on and come out."""
        table = self.table(levels)
        out = self.attention(x, table, lengths, layer, attend)
        if keep is not None:
            x, out = keep.take_noisy(x), keep.take_noisy(out)
            table, lengths = table.index_select(1, keep.noisy_index), keep.noisy_lengths
        x = _gated(x, self.self_attn.o(out), lengths, table[:, :, 2:3])
        x = x + self.cross_attn(self.norm3(x), *text).to(x.dtype)
        return _gated(x, self.ffn(_modulated(self.norm2, x, lengths, table[:, :, 3:5])), lengths, table[:, :, 5:6])

    def table(self, levels: torch.Tensor) -> torch.Tensor:
        """Shifts, scales and gates of this block ``[B, segments, 6, dim]`` from the time projection (same shape)."""
        return levels + wide(self.modulation)


class Head(nn.Module):
    """Modulated norm and the projection to patches; the modulation comes from the raw time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        _, ph, pw = config.patch_size
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """``x`` ``[B, L, dim]``, ``time`` ``[B, segments, dim]`` -> patches ``[B, L, ph * pw * C]``."""
        return self.head(_modulated(self.norm, x, lengths, time.unsqueeze(2) + wide(self.modulation)))
