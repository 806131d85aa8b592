"""The layers of a Wan block. They know nothing of chunks: lengths of segments and an attention come from outside."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from raven.models.config import WanConfig
from raven.models.fp8 import Float8Rows, takes_rows
from raven.models.mlp import Mlp, block_kernels, gated_mlp
from raven.models.packing import LastSegment, Packing
from raven.ops import gated_residual, modulate


class Attend(Protocol):
    """The self-attention of a layer: norm, rotary and attention; q, k, v and the result are ``[B, L, H, D]``."""

    def __call__(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
    ) -> torch.Tensor: ...


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: what norms and modulations are computed in."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, with a learned weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, in float32 inside
            if torch.is_grad_enabled() and (kernels := block_kernels(x, self.weight)):
                return _RMSNormFunction.apply(x, self.weight, self.eps, kernels)
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return (F.rms_norm(wide(x), x.shape[-1:], None, self.eps) * self.weight).to(x.dtype)


class _RMSNormFunction(torch.autograd.Function):
    """PyTorch's own kernel forward, a faster one backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, kernels: ModuleType) -> torch.Tensor:
        y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows = (t.reshape(-1, x.shape[-1]) for t in (x, grad))
        dx, dweight = ctx.kernels.rms_norm_backward(*rows, weight, rstd.reshape(-1))
        return dx.view_as(x), dweight, None, None


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


class SelfAttention(nn.Module):
    """Projections around an attention that the caller supplies (packed or cached).

    One matrix product makes queries, keys and values. Its parameter is one as well, ``qkv``; state dicts hold the
    thirds under Wan's names ``q``, ``k`` and ``v``, as views on the way out.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q, self.norm_k = _qk_norms(config)
        self.register_state_dict_post_hook(_split_qkv)
        self.register_load_state_dict_pre_hook(_join_qkv)

    def forward(self, x: torch.Tensor | Float8Rows, layer: int, attend: Attend) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each [B, L, H, D], strided
        out = attend(layer, q, k, v, getattr(self.norm_q, "weight", None), getattr(self.norm_k, "weight", None))
        return out.flatten(2)  # before the output projection: the last block applies that to fewer tokens


def _split_qkv(module: SelfAttention, state: dict[str, torch.Tensor], prefix: str, metadata: object) -> None:
    if type(module.qkv) is not nn.Linear:  # wrapped, as by an adapter: its parts have names of their own
        return
    own = {name: state.pop(name) for name in [name for name in state if name.startswith(prefix)]}
    for kind in ("weight", "bias"):
        fused = own.pop(f"{prefix}qkv.{kind}")
        own |= {f"{prefix}{name}.{kind}": part for name, part in zip("qkv", fused.chunk(3), strict=True)}
    state.update(own)


def _join_qkv(
    module: SelfAttention,
    state: dict[str, torch.Tensor],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    if type(module.qkv) is not nn.Linear:
        return
    for kind in ("weight", "bias"):
        own = getattr(module.qkv, kind).detach()
        parts = {f"{prefix}{name}.{kind}": part for name, part in zip("qkv", own.chunk(3), strict=True)}
        missing += [name for name in parts if name not in state]
        given = {name: state.pop(name) for name in parts if name in state}
        errors += [
            f"size mismatch for {name}: got shape {tuple(part.shape)}, expected {tuple(parts[name].shape)}"
            for name, part in given.items()
            if part.shape != parts[name].shape
        ]
        if len(given) < 3:  # the missing thirds stay as they are
            given = {name: part.to(own) for name, part in given.items()}
        parts |= {name: part for name, part in given.items() if part.shape == parts[name].shape}
        state[f"{prefix}qkv.{kind}"] = torch.cat(list(parts.values()))


def _qk_norms(config: WanConfig) -> tuple[nn.Module, nn.Module]:
    norms = (RMSNorm(config.dim, config.eps) if config.qk_norm else nn.Identity() for _ in range(2))
    return next(norms), next(norms)


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values do not depend on the video and are computed once."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = _qk_norms(config)

    def text(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, text_len, H, D]`` of an embedded text ``[B, text_len, dim]``."""
        return self._split(self.norm_k(self.k(context))), self._split(self.v(context))

    def forward(self, x: torch.Tensor | Float8Rows, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = self._split(self.norm_q(self.q(x)))
        return self.o(_attend_all(q, k.to(q.dtype), v.to(q.dtype)).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))  # [B, L, H, D]


def _attend_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of every query ``[B, L, H, D]`` to every key ``[B, n, H, D]``, where L is large and n small.

    The backward pass shares its work out by keys, of which there are too few to fill a GPU. So a long row of queries is
    cut into equal parts with copies of the keys, as a batch; without gradients too, for the same bits.
    """
    batch, length = q.shape[:2]
    parts = _parts(length)
    if parts > 1:
        q = q.unflatten(1, (parts, -1)).flatten(0, 1)
        k, v = (t.unsqueeze(1).expand(-1, parts, -1, -1, -1).flatten(0, 1) for t in (k, v))
    # Twice as fast as chunk_attention on these few keys, where a GPU has cuDNN's kernels.
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return out.unflatten(0, (batch, parts)).flatten(1, 2)


def _parts(length: int) -> int:
    """Into how many parts of at least 4096 queries a row of 16384 or more is cut, at most 13; 1 if none divides it."""
    return max(n for n in range(1, 14) if length % n == 0 and (n == 1 or length >= max(16384, 4096 * n)))


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product will read: the residual stream's own dtype, or autocast's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated MLP.

    Norms, modulations and residual sums are computed in float32; the residual stream between them has the dtype of
    ``x``.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.cross_attn = CrossAttention(config)
        self.ffn = Mlp(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def attention(
        self, x: torch.Tensor, table: torch.Tensor, lengths: Sequence[int], layer: int, attend: Attend
    ) -> torch.Tensor:
        """Self-attention of ``x`` ``[B, L, dim]`` before its output projection; ``table`` ``[B, segments, 6, dim]``."""
        shift, scale, dtype = table[:, :, 0], table[:, :, 1], _product_dtype(x)
        if takes_rows(self.self_attn, "qkv") and not _differentiated(x):
            y = Float8Rows(*modulate(x, shift, scale, lengths, self.eps, dtype, quantize=True), dtype)
        else:
            y = modulate(x, shift, scale, lengths, self.eps, dtype)
        return self.self_attn(y, layer, attend)

    def forward(
        self,
        x: torch.Tensor,
        levels: torch.Tensor,
        lengths: Sequence[int],
        text: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        attend: Attend,
        keep: Packing | LastSegment | None = None,
        output: bool = True,
    ) -> torch.Tensor:
        """``x`` ``[B, L, dim]`` -> the same; with ``keep`` only the noisy tokens of that packing go on and come out.

        Without ``output`` only the gradient of the result is right: for a recomputation, which needs no more.
        """
        table = self.table(levels)
        out = self.attention(x, table, lengths, layer, attend)
        if keep is not None:
            x, out = keep.take_noisy(x), keep.take_noisy(out)
            table, lengths = table.index_select(1, keep.noisy_index), keep.noisy_lengths
        _, _, gate, shift, scale, last_gate = table.unbind(2)
        branch = self.self_attn.o(out)
        if self.norm3 is None:
            x = y = gated_residual(x, branch, gate, lengths)
        else:
            affine = {"weight": self.norm3.weight, "bias": self.norm3.bias}
            x, y = self._norm_for(self.cross_attn, "q", x, branch, gate, lengths, **affine)
        branch = self.cross_attn(y, *text)
        x, y = self._norm_for(self.ffn, "0", x, branch, None, lengths, shift=shift, scale=scale)
        return gated_mlp(x, self.ffn, y, last_gate, lengths, output)

    def _norm_for(
        self, module: nn.Module, layer: str, x: torch.Tensor, *args, **tables: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | Float8Rows]:
        """``gated_residual`` and the norm, quantised where that is what ``module`` takes."""
        dtype = _product_dtype(x)
        if not takes_rows(module, layer) or _differentiated(x):
            return gated_residual(x, *args, **tables, eps=self.eps, dtype=dtype)
        x, y, y_scale = gated_residual(x, *args, **tables, eps=self.eps, dtype=dtype, quantize=True)
        return x, Float8Rows(y, y_scale, dtype)

    def table(self, levels: torch.Tensor) -> torch.Tensor:
        """Shifts, scales and gates of this block ``[B, segments, 6, dim]`` from the time projection (same shape)."""
        return levels + self.modulation  # widened inside the sum, by one kernel


def _differentiated(x: torch.Tensor) -> bool:
    """Float8 layers refuse such tensors, in words of their own."""
    return torch.is_grad_enabled() and x.requires_grad


class Head(nn.Module):
    """Modulated norm and the projection to patches; the modulation comes from the raw time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        _, ph, pw = config.patch_size
        self.eps = config.eps
        self.head = nn.Linear(config.dim, ph * pw * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """``x`` ``[B, L, dim]``, ``time`` ``[B, segments, dim]`` -> patches ``[B, L, ph * pw * C]``."""
        shift, scale = (time.unsqueeze(2) + wide(self.modulation)).unbind(2)
        return self.head(modulate(x, shift, scale, lengths, self.eps, _product_dtype(x)))
