"""The Wan2.1 text-to-video transformer, for packed, cached and bidirectional use.

Architecture and parameter names: Wan2.1 (https://github.com/Wan-Video/Wan2.1, arXiv 2503.20314). The blocks are the
same in every use; only where the keys of the self-attention come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raven.cache import KVCache
from raven.errors import check_level, check_same_device, check_shape
from raven.layout import ChunkLayout
from raven.models.config import WanConfig
from raven.models.packing import Packing, frame_positions, make_packing, patchify, unpatchify
from raven.ops import chunk_attention, kv_append, qk_norm_rope

# (layer, q, k, v, q_weight, k_weight) -> output of the self-attention; q, k, v and output are [B, L, H, D].
Attend = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"], torch.Tensor
]
Context = "TextCache | torch.Tensor | Sequence[torch.Tensor]"


def _wide(x: torch.Tensor) -> torch.Tensor:
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
        return (F.rms_norm(_wide(x), x.shape[-1:], None, self.eps) * self.weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, returned in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(_wide(x).dtype)
        bias = None if self.bias is None else self.bias.to(_wide(x).dtype)
        return F.layer_norm(_wide(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class _StopWhere(torch.autograd.Function):
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

    return _per_segment(fn, lengths, norm(_wide(x)), rows=table)


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
        return levels + _wide(self.modulation)


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
        return self.head(_modulated(self.norm, x, lengths, time.unsqueeze(2) + _wide(self.modulation)))


@dataclass(frozen=True)
class TextCache:
    """Cross-attention keys and values of a batch of prompts, one ``[B, text_len, H, D]`` pair a layer.

    Indexing, ``repeat_interleave`` and ``cat`` act on the batch, so a group of samples of one prompt shares the work.
    """

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return self.k[0].shape[0]

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> TextCache:
        return TextCache(tuple(fn(k) for k in self.k), tuple(fn(v) for v in self.v))

    def __getitem__(self, index: slice | Sequence[int] | torch.Tensor) -> TextCache:
        """The prompts at ``index`` (a slice, a list or an index tensor)."""
        return self._map(lambda t: t[index])

    def repeat_interleave(self, repeats: int) -> TextCache:
        """Every prompt ``repeats`` times in a row."""
        return self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def detach(self) -> TextCache:
        """The same values without gradient."""
        return self._map(torch.Tensor.detach)

    @staticmethod
    def cat(caches: Sequence[TextCache]) -> TextCache:
        """Several batches of prompts as one."""
        layers = range(len(caches[0].k))
        return TextCache(
            tuple(torch.cat([c.k[i] for c in caches]) for i in layers),
            tuple(torch.cat([c.v[i] for c in caches]) for i in layers),
        )


class CausalWan(nn.Module):
    """The Wan transformer on a packed row of chunks, on a key/value cache, or on a whole video at once.

    Set ``gradient_checkpointing = True`` to recompute every block in the backward pass. Most callers use
    ``raven.repack`` and ``raven.stream``.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim = config.dim
        # Used as one matrix product over patches; a convolution only so that the checkpoint's shape loads as it is.
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Wan does: Xavier for the linear layers, a zero head, so that training starts at velocity 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of queries, keys and values: that of the weights, or of autocast when it is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch embedding: ``[B, L, C * ph * pw]`` -> tokens ``[B, L, dim]`` in the dtype of the weights."""
        weight = self.patch_embedding.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.patch_embedding.bias).to(weight.dtype)

    def embed_levels(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Time embedding ``[B, n, dim]`` and its projection ``[B, n, 6, dim]`` of noise levels ``[B, n]`` in [0, 1]."""
        half = self.config.freq_dim // 2
        rates = torch.arange(half, dtype=torch.float64, device=levels.device).div(-half)
        angles = (1000 * levels.double()).unsqueeze(-1) * torch.pow(10000.0, rates)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        with torch.autocast(levels.device.type, enabled=False):  # a few rows: their precision costs nothing
            time = self.time_embedding(sinusoid)
            table = self.time_projection(time).unflatten(-1, (6, -1))
        return _wide(time), _wide(table)

    def encode_text(self, context: Context) -> TextCache:
        """Keys and values of the prompts for every layer.

        ``context`` is a list of ``[n_i, text_dim]`` (one a sample, ``n_i <= text_len``) or a padded tensor
        ``[B, n, text_dim]``. Missing rows are zeros *before* the text embedding and are attended to, as in Wan.
        A ``TextCache`` is returned as it is. Raises ``ValueError`` for a prompt that is too long or too wide,
        ``TypeError`` for one that is not a tensor.
        """
        if isinstance(context, TextCache):
            return context
        config = self.config
        rows = [*context]
        for i, row in enumerate(rows):
            if not isinstance(row, torch.Tensor):
                raise TypeError(f"context[{i}]: got {type(row).__name__}, expected an encoded prompt (a tensor)")
            check_shape(f"context[{i}]", row, ("n", config.text_dim))
            if row.shape[0] > config.text_len:
                limit = f"expected at most text_len = {config.text_len}"
                raise ValueError(f"context[{i}]: got {row.shape[0]} rows, {limit}")
        if not rows:
            raise ValueError("context: got no prompt, expected at least one")
        padded = torch.stack([F.pad(row, (0, 0, 0, config.text_len - row.shape[0])) for row in rows])
        embedded = self.text_embedding(padded.to(device=self.device, dtype=self.dtype))
        pairs = [block.cross_attn.text(embedded) for block in self.blocks]
        return TextCache(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor | float,
        context: Context,
        layout: ChunkLayout | None = None,
        *,
        x_0: torch.Tensor | None = None,
        detach_history: bool = False,
        cache: KVCache | None = None,
        frame: int = 0,
        write_only: bool = False,
    ) -> torch.Tensor | None:
        """Velocity of noisy latents ``x`` ``[B, C, F, H, W]`` at levels ``t`` (a number, ``[B]`` or ``[B, N]``).

        Packed: ``layout`` says which segments the row holds; ``x_0`` (shape of ``x``) fills its clean segments, at
        level 0 and as a constant. ``detach_history`` cuts the gradient into the clean keys and values.
        Cached: with ``cache``, ``x`` is the chunk in flight, starting at ``frame``; no gradient. ``write_only``
        stops after the last layer's keys and values are written, and returns ``None``.
        With neither, attention is bidirectional over all of ``x``.
        The result has the dtype of ``x``. Raises ``ValueError`` for shapes, levels or devices that do not fit.
        """
        config = self.config
        check_shape("x", x, ("B", config.in_dim, "F", "H", "W"))
        check_same_device("x", x, "the model", self.patch_embedding.weight)
        _, ph, pw = config.patch_size
        rows, columns = x.shape[3] // ph, x.shape[4] // pw
        patches = patchify(x, config.patch_size)
        text = self.encode_text(context)
        if len(text) != x.shape[0]:
            raise ValueError(f"context: got {len(text)} prompts, expected one for each of the {x.shape[0]} samples")
        if cache is not None:
            if layout is not None or x_0 is not None:
                raise ValueError("cache: got a layout or x_0 as well, expected only one source of history")
            packing = None
            lengths: tuple[int, ...] = (patches.shape[1],)
            levels = self._levels(t, x.shape[0], 1)
            attend = self._cached(cache, frame, x.shape[2], rows, columns, write_only)
        else:
            if layout is None:
                layout = ChunkLayout.bidirectional(x.shape[2], rows * columns)
            packing = make_packing(layout, rows, columns, x.device)
            patches = packing.pack(patches, self._clean_patches(packing, x, x_0))
            lengths = packing.lengths
            levels = self._levels(t, x.shape[0], packing.chunks)
            levels = F.pad(levels, (0, 1)).index_select(1, packing.level)
            attend = self._packed(packing, detach_history)
        tokens = self.embed(patches)
        time, table = self.embed_levels(levels)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if write_only and i == last:
                block.attention(tokens, block.table(table), lengths, i, attend)
                return None
            keep = packing if i == last and packing is not None and packing.has_clean else None
            args = (tokens, table, lengths, (text.k[i], text.v[i]), i, attend, keep)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, *args, use_reentrant=False)
            else:
                tokens = block(*args)
        if packing is not None and packing.has_clean:
            time, lengths = time.index_select(1, packing.noisy_index), packing.noisy_lengths
        out = self.head(tokens, time, lengths)
        return unpatchify(out, rows, columns, config.patch_size).to(x.dtype)

    def _levels(self, t: torch.Tensor | float, batch: int, chunks: int) -> torch.Tensor:
        """Noise levels ``[B, chunks]`` in at least float32."""
        check_level("t", t)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if not isinstance(t, torch.Tensor):
            return torch.full((batch, chunks), t, dtype=wide, device=self.device)  # no copy to wait for
        levels = t.to(device=self.device, dtype=torch.promote_types(t.dtype, wide))
        if levels.ndim < 2:
            levels = levels.reshape(-1, 1)
        if levels.ndim != 2 or levels.shape[0] not in (1, batch) or levels.shape[1] not in (1, chunks):
            raise ValueError(f"t: got shape {tuple(t.shape)}, expected [{batch}] or [{batch}, {chunks}]")
        return levels.expand(batch, chunks)

    def _clean_patches(self, packing: Packing, x: torch.Tensor, x_0: torch.Tensor | None) -> torch.Tensor | None:
        if packing.frames != x.shape[2]:
            raise ValueError(f"x: got {x.shape[2]} frames, expected {packing.frames} as in the layout")
        if packing.has_clean and x_0 is None:
            raise ValueError("x_0: got None, expected the clean latents that the layout's clean segments hold")
        if x_0 is None:
            return None
        check_shape("x_0", x_0, tuple(x.shape))
        check_same_device("x_0", x_0, "x", x)
        # Past results are constants: only how the current weights encode them is learned.
        return patchify(x_0.detach().to(x.dtype), self.config.patch_size) if packing.has_clean else None

    def _packed(self, packing: Packing, detach_history: bool) -> Attend:
        eps = self.config.eps

        def attend(layer, q, k, v, q_weight, k_weight):
            q, k = qk_norm_rope(q, k, q_weight, k_weight, packing.positions, eps=eps)
            if detach_history and packing.has_clean:
                k, v = _StopWhere.apply(k, packing.clean), _StopWhere.apply(v, packing.clean)
            return chunk_attention(q, k, v, packing.layout)

        return attend

    def _cached(self, cache: KVCache, frame: int, frames: int, rows: int, columns: int, write_only: bool) -> Attend:
        if torch.is_grad_enabled():
            raise ValueError("cache: got gradients switched on, expected torch.no_grad(): it is written in place")
        cache.begin(frames * rows * columns, frame, frames)
        positions = frame_positions(frame, frames, rows, columns, self.device)
        eps, last = self.config.eps, len(self.blocks) - 1

        def attend(layer, q, k, v, q_weight, k_weight):
            q = kv_append(q, k, v, q_weight, k_weight, positions, cache, layer, eps=eps)
            if write_only and layer == last:
                return q
            return chunk_attention(q, cache.k[layer], cache.v[layer], cache.spans)

        return attend
