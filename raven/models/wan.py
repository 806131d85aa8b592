"""The Wan2.1 text-to-video transformer, for packed, cached and bidirectional use.

Architecture and parameter names: Wan2.1 (https://github.com/Wan-Video/Wan2.1, arXiv 2503.20314). The blocks are the
same in every use; only where the keys of the self-attention come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from raven.cache import KVCache
from raven.errors import check_dtype, check_level, check_same_device, check_shape
from raven.graphs import held_by_graphs
from raven.layout import ChunkLayout
from raven.models.config import WanConfig
from raven.models.layers import Attend, Head, StopWhere, wide
from raven.models.packing import (
    LastSegment,
    Packing,
    frame_positions,
    last_segment,
    make_packing,
    patchify,
    unpatchify,
)
from raven.models.recompute import RecomputedBlock, checkpointing_mode
from raven.ops import chunk_attention, kv_append, qk_norm_rope
from raven.spans import Spans


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
        """Several batches of prompts as one; ``ValueError`` for none."""
        if not caches:
            raise ValueError("caches: got none, expected at least one")
        layers = range(len(caches[0].k))
        return TextCache(
            tuple(torch.cat([c.k[i] for c in caches]) for i in layers),
            tuple(torch.cat([c.v[i] for c in caches]) for i in layers),
        )


Context = TextCache | torch.Tensor | Sequence[torch.Tensor]
LATENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _time_rates(half: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Angles of the time embedding's sinusoids per unit of noise level (1000 steps), ``[half]``."""
    return held_by_graphs(_cached_time_rates(half, dtype, device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _cached_time_rates(half: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    rates = 1000 * torch.pow(10000.0, torch.arange(half, dtype=torch.float64).div(-half))
    return rates.to(device=device, dtype=dtype)


class CausalWan(nn.Module):
    """The Wan transformer on a packed row of chunks, on a key/value cache, or on a whole video at once.

    ``gradient_checkpointing`` says what the backward pass recomputes of every block: "none" of it, all but its
    self-attention ("selective"), or all ("full"; ``True``). Most callers use ``raven.repack`` and ``raven.stream``.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = "none"
        dim = config.dim
        # Used as one matrix product over patches; a convolution only so that the checkpoint's shape loads as it is.
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(RecomputedBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Wan does: Xavier for the linear layers, a zero head, so that training starts at velocity 0."""
        fused = [block.self_attn.qkv for block in self.blocks]  # three layers as far as Xavier is concerned
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for weight in module.weight.chunk(3) if module in fused else (module.weight,):
                    nn.init.xavier_uniform_(weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def gradient_checkpointing(self) -> str:
        """ "none", "selective" or "full"; ``True`` and ``False`` may be set for "full" and "none"."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, mode: str | bool) -> None:
        self._checkpointing = checkpointing_mode(mode)

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
        angles = levels.unsqueeze(-1) * _time_rates(self.config.freq_dim // 2, levels.dtype, levels.device)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        with torch.autocast(levels.device.type, enabled=False):  # a few rows: their precision costs nothing
            time = self.time_embedding(sinusoid)
            table = self.time_projection(time).unflatten(-1, (6, -1))
        return wide(time), wide(table)

    def encode_text(self, context: Context) -> TextCache:
        """Keys and values of the prompts for every layer.

        ``context`` is a list of ``[n_i, text_dim]`` (one a sample, ``n_i <= text_len``) or a padded tensor
        ``[B, n, text_dim]``. Missing rows are zeros *before* the text embedding and are attended to, as in Wan.
        A ``TextCache`` is returned as it is. Raises ``ValueError`` for a prompt that is too long or too wide,
        ``TypeError`` for one that is not a floating-point tensor.
        """
        return self._text(context)

    def _text(self, context: Context) -> TextCache:
        if isinstance(context, TextCache):
            return context
        if not isinstance(context, torch.Tensor | Sequence):
            raise TypeError(f"context: got {type(context).__name__}, expected encoded prompts or a TextCache")
        config = self.config
        rows = [*context]
        for i, row in enumerate(rows):
            if not isinstance(row, torch.Tensor):
                raise TypeError(f"context[{i}]: got {type(row).__name__}, expected an encoded prompt (a tensor)")
            check_shape(f"context[{i}]", row, ("n", config.text_dim))
            check_dtype(f"context[{i}]", row, LATENT_DTYPES)
            if row.shape[0] > config.text_len:
                limit = f"expected at most text_len = {config.text_len}"
                raise ValueError(f"context[{i}]: got {row.shape[0]} rows, {limit}")
        if not rows:
            raise ValueError("context: got no prompt, expected at least one")
        short = [config.text_len - row.shape[0] for row in rows]
        if isinstance(context, torch.Tensor):  # one kernel instead of one a prompt
            padded = F.pad(context, (0, 0, 0, short[0]))
        else:
            padded = torch.stack([F.pad(row, (0, 0, 0, n)) for row, n in zip(rows, short, strict=True)])
        for block in self.blocks[:1]:
            # Called outside of its block, where a block that was sharded as one has gathered nothing yet.
            k = block.cross_attn.k
            if hasattr(getattr(k, "weight", None), "full_tensor") and not hasattr(k, "unshard"):
                raise ValueError("model: got blocks that were sharded whole, expected raven.models.sharding.shard")
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
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Velocity of noisy latents ``x`` ``[B, C, F, H, W]`` at levels ``t`` (a number, ``[B]`` or ``[B, N]``).

        Packed: ``layout`` says which segments the row holds; ``x_0`` (shape of ``x``) fills its clean segments, at
        level 0 and as a constant. ``detach_history`` cuts the gradient into the clean keys and values.
        Cached: with ``cache``, ``x`` is the chunk in flight, starting at ``frame``; no gradient. ``write_only``
        stops after the last layer's keys and values are written, and returns ``None``. Merged: with ``x_0`` too,
        the finished chunk ``[B, C, F0, H, W]`` right before ``x``, both are open in the cache, and the clean pass of
        the one runs in the same forward as this pass of the other; ``x`` sees it. ``positions`` int32 ``[L, 3]`` are
        those of the row's tokens where they must lie at a fixed address, for a CUDA graph.
        With neither, attention is bidirectional over all of ``x``.
        The result has the dtype of ``x``. Raises ``ValueError`` for shapes, levels, devices or combinations that do
        not fit, ``TypeError`` for latents that are not floating point and arguments of another kind.
        """
        config = self.config
        check_shape("x", x, ("B", config.in_dim, "F", "H", "W"))
        check_dtype("x", x, LATENT_DTYPES)
        check_same_device("x", x, "the model", self.patch_embedding.weight)
        _, ph, pw = config.patch_size
        rows, columns = x.shape[3] // ph, x.shape[4] // pw
        patches = patchify(x, config.patch_size)
        text = self._text(context)
        if len(text.k) != len(self.blocks):
            raise ValueError(f"context: got keys of {len(text.k)} layers, expected {len(self.blocks)}")
        if len(text) != x.shape[0]:
            raise ValueError(f"context: got {len(text)} prompts, expected one for each of the {x.shape[0]} samples")
        keep: Packing | LastSegment | None = None
        if cache is not None:
            if layout is not None or (write_only and x_0 is not None):
                raise ValueError(f"cache: got {'x_0' if layout is None else 'a layout'} as well, expected only x")
            lengths: tuple[int, ...] = (patches.shape[1],)
            levels = self._levels(t, x.shape[0], 1)
            chunks = (x.shape[2],)
            if x_0 is not None:
                finished = self._finished_patches(x, x_0)
                patches = torch.cat([finished, patches], dim=1)
                lengths = (finished.shape[1], *lengths)
                levels = F.pad(levels, (1, 0))
                chunks = (x_0.shape[2], *chunks)
                keep = last_segment(lengths, x.device)
            attend = self._cached(cache, frame, chunks, (rows, columns), positions, write_only)
        else:
            if write_only:
                raise ValueError("write_only: got True without a cache, expected a cache to write to")
            if layout is None:
                layout = ChunkLayout.bidirectional(x.shape[2], rows * columns)
            if not isinstance(layout, ChunkLayout):
                raise TypeError(f"layout: got {type(layout).__name__}, expected a ChunkLayout or None")
            packing = make_packing(layout, rows, columns, x.device)
            patches = packing.pack(patches, self._clean_patches(packing, x, x_0))
            lengths = packing.lengths
            levels = self._levels(t, x.shape[0], packing.chunks)
            levels = F.pad(levels, (0, 1)).index_select(1, packing.level)
            attend = self._packed(packing, detach_history)
            keep = packing if packing.has_clean else None
        tokens = self.embed(patches)
        time, table = self.embed_levels(levels)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            args = (tokens, table, lengths, (text.k[i], text.v[i]), i, attend, keep if i == last else None)
            if write_only and i == last:
                block(*args, attention_only=True)
                return None
            tokens = block(*args, self.gradient_checkpointing if torch.is_grad_enabled() else "none")
        if keep is not None:
            time, lengths = time.index_select(1, keep.noisy_index), keep.noisy_lengths
        out = self.head(tokens, time, lengths)
        return unpatchify(out, rows, columns, config.patch_size).to(x.dtype)

    def _levels(self, t: torch.Tensor | float, batch: int, chunks: int) -> torch.Tensor:
        """Noise levels ``[B, chunks]`` in at least float32."""
        if not isinstance(t, torch.Tensor | Real):
            raise TypeError(f"t: got {type(t).__name__}, expected a noise level (a number or a tensor)")
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
        check_dtype("x_0", x_0, LATENT_DTYPES)
        check_same_device("x_0", x_0, "x", x)
        # Past results are constants: only how the current weights encode them is learned.
        return patchify(x_0.detach().to(x.dtype), self.config.patch_size) if packing.has_clean else None

    def _packed(self, packing: Packing, detach_history: bool) -> Attend:
        eps = self.config.eps

        def attend(layer, q, k, v, q_weight, k_weight, attention=chunk_attention):
            q, k = qk_norm_rope(q, k, q_weight, k_weight, packing.positions, eps=eps)
            if detach_history and packing.has_clean:
                k, v = StopWhere.apply(k, packing.clean), StopWhere.apply(v, packing.clean)
            return attention(q, k, v, packing.layout)

        return attend

    def _finished_patches(self, x: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
        check_shape("x_0", x_0, (*x.shape[:2], "F0", *x.shape[3:]))
        check_dtype("x_0", x_0, LATENT_DTYPES)
        check_same_device("x_0", x_0, "x", x)
        return patchify(x_0.to(x.dtype), self.config.patch_size)

    def _cached(
        self,
        cache: KVCache,
        frame: int,
        chunks: tuple[int, ...],
        grid: tuple[int, int],
        positions: torch.Tensor | None,
        write_only: bool,
    ) -> Attend:
        """``chunks``: frames of the chunk in flight that begins at ``frame``, or of the one before it and of it."""
        if torch.is_grad_enabled():
            raise ValueError("cache: got gradients switched on, expected torch.no_grad(): it is written in place")
        first, per_frame = frame - sum(chunks[:-1]), grid[0] * grid[1]
        cache.begin(chunks[0] * per_frame, first, chunks[0])
        if len(chunks) > 1:
            cache.begin_next(chunks[1] * per_frame, frame, chunks[1])
        if positions is None:
            positions = frame_positions(cache.query_frame, sum(chunks), *grid, self.device)
        # Nothing after the last layer's attention needs the finished chunk.
        spans = newest = cache.spans
        if len(chunks) > 1:
            newest = Spans.build(spans.rows()[-1:])
        eps, last = self.config.eps, len(self.blocks) - 1

        def attend(layer, q, k, v, q_weight, k_weight):
            q = kv_append(q, k, v, q_weight, k_weight, positions, cache, layer, eps=eps)
            if write_only and layer == last:
                return q
            return chunk_attention(q, *cache.read(layer, q.dtype), newest if layer == last else spans)

        return attend
