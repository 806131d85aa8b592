"""Wan's decoder as diffusers has it, with fewer passes over memory: the same weights, the same sums.

As diffusers runs it, every convolution's input is copied three times (kept, joined with the frames before it, padded),
norms and activations are passes of their own, and so is every bias. Here channels lie last in memory, where tensor
cores want them; norm and SiLU are one pass (``raven.ops.norm_silu``) that writes into the joined input, whose borders
are the convolution's own; biases are added where the next pass reads anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raven.ops import norm_silu

LAST = torch.channels_last_3d


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[B, C, ...]`` as packed rows ``[B, ..., C]``; no copy where the channels lie last in memory."""
    return x.movedim(1, -1).contiguous()


def words_of(rows: torch.Tensor) -> torch.Tensor:
    """Packed rows as wider numbers, where they can be: a copy that moves rows about then takes fewer steps."""
    return rows.view(torch.int64) if rows.shape[-1] * rows.dtype.itemsize % 8 == 0 else rows


def twice_the_sides(rows: torch.Tensor) -> torch.Tensor:
    """Every pixel of ``[n, H, W, C]`` four times: ``[n, 2 H, 2 W, C]``, what "nearest-exact" gives for factor 2."""
    wide = words_of(rows)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return wide.flatten(3, 4).flatten(1, 2).view(rows.dtype)


class ChannelNorm(nn.Module):
    """diffusers' ``WanRMS_norm`` over channels, ``x / |x| * sqrt(C) * gamma + bias``. ``[B, C, ...]`` -> the same.

    With ``silu``, of its result, in the same pass; there is no bias then.
    """

    def __init__(self, norm: nn.Module, silu: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.detach().flatten(), requires_grad=False)
        self.bias = norm.bias if isinstance(norm.bias, nn.Parameter) else None
        self.silu = silu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = rows_of(x)
        if self.silu:
            return norm_silu(rows, self.gamma).movedim(-1, 1)
        # diffusers' floor for |x| is 1e-12: only a row of zeros feels either of them.
        y = F.rms_norm(rows, rows.shape[-1:], self.gamma, eps=1e-24).movedim(-1, 1)
        return y if self.bias is None else y + self.bias


class CausalConv(nn.Module):
    """diffusers' ``WanCausalConv3d``; only frames that are not there yet are zeros in memory, borders are not."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride
        columns, _, rows, _, self.past, _ = conv._padding
        self.padding = (0, rows, columns)

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        return self.convolve(joined(x, cache_x, self.past) if self.past else x, self.bias)

    def convolve(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Of frames that the past is part of."""
        return F.conv3d(x, self.weight, bias, self.stride, self.padding)


def joined(x: torch.Tensor, cache: torch.Tensor | None, past: int) -> torch.Tensor:
    """``x [B, C, f, H, W]`` after ``past`` frames: those of the cache, zeros before them."""
    before = [] if cache is None else [cache]
    if missing := past - sum(part.shape[2] for part in before):
        before.insert(0, torch.zeros_like(x[:, :, :1]).expand(-1, -1, missing, -1, -1))
    return torch.cat([*before, x], dim=2)


def widened(conv: CausalConv) -> CausalConv:
    """With zeros for further input channels up to the next multiple of 64, where that is at most a third more.

    cuDNN's kernels for Hopper want such a multiple: 96 channels and 32 of zeros take two thirds of the time of 96.
    """
    channels = conv.weight.shape[1]
    extra = -channels % 64
    if 3 * extra <= channels:
        conv.weight = nn.Parameter(F.pad(conv.weight, (0, 0) * 3 + (0, extra)), requires_grad=False)
    return conv


class ResidualBlock(nn.Module):
    """diffusers' ``WanResidualBlock`` in a decoder that remembers: ``x + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gammas = nn.ParameterList(ChannelNorm(norm).gamma for norm in (block.norm1, block.norm2))
        self.convs = nn.ModuleList(widened(CausalConv(conv)) for conv in (block.conv1, block.conv2))
        identity = isinstance(block.conv_shortcut, nn.Identity)
        self.conv_shortcut = nn.Identity() if identity else CausalConv(block.conv_shortcut)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        """Whether the block is as Wan has it."""
        return isinstance(block.nonlinearity, nn.SiLU) and not isinstance(block.norm1.bias, nn.Parameter)

    def forward(self, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int]) -> torch.Tensor:
        rows, bias = rows_of(x), None
        for gamma, conv in zip(self.gammas, self.convs, strict=True):
            batch, frames, height, width, _ = rows.shape
            shape = (batch, conv.past + frames, height, width, conv.weight.shape[1])
            memory = torch.empty(shape, dtype=x.dtype, device=x.device)
            if (kept := feat_cache[feat_idx[0]]) is None:
                memory[:, : conv.past].zero_()
            else:
                memory[:, : conv.past].copy_(kept.movedim(1, -1))
            norm_silu(rows, gamma, bias=bias, out=memory[:, conv.past :])
            # A copy, so that the rest of the memory is free again.
            feat_cache[feat_idx[0]] = memory[:, frames:].clone().movedim(-1, 1)
            feat_idx[0] += 1
            rows, bias = rows_of(conv.convolve(memory.movedim(-1, 1))), conv.bias
        return norm_silu(rows, None, bias=bias, residual=rows_of(self.conv_shortcut(x)), out=rows).movedim(-1, 1)


class Upsampling(nn.Module):
    """diffusers' ``WanResample`` of a decoder: twice the frames if it has a ``time_conv``, then twice the sides."""

    def __init__(self, resample: nn.Module) -> None:
        super().__init__()
        self.time_conv = CausalConv(resample.time_conv) if hasattr(resample, "time_conv") else None
        self.conv = resample.resample[1]

    @staticmethod
    def replaces(resample: nn.Module) -> bool:
        """Whether it enlarges."""
        return resample.mode in ("upsample2d", "upsample3d")

    def forward(self, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int]) -> torch.Tensor:
        rows = rows_of(x)
        if self.time_conv is not None:
            kept = feat_cache[feat_idx[0]]
            if kept is None:
                feat_cache[feat_idx[0]] = "begun"  # the first frame of a video stays one, and is no past to this
            else:
                whole = joined(x, kept if isinstance(kept, torch.Tensor) else None, self.time_conv.past)
                feat_cache[feat_idx[0]] = whole[:, :, x.shape[2] :].clone(memory_format=LAST)
                twice = rows_of(self.time_conv.convolve(whole, self.time_conv.bias)).unflatten(-1, (2, -1))
                rows = words_of(twice).movedim(4, 2).flatten(1, 2).view(x.dtype)
            feat_idx[0] += 1
        frames = twice_the_sides(rows.flatten(0, 1)).movedim(-1, 1)
        larger = rows_of(F.conv2d(frames, self.conv.weight, padding=self.conv.padding))
        return norm_silu(larger, None, bias=self.conv.bias, out=larger).unflatten(0, rows.shape[:2]).movedim(-1, 1)


def convolutions(decoder: nn.Module) -> int:
    """How many causal convolutions a decoder has, in either form: the places of its memory."""
    return sum(isinstance(m, CausalConv) or type(m).__name__ == "WanCausalConv3d" for m in decoder.modules())


def rearrange(decoder: nn.Module) -> None:
    """Put these in place of diffusers' modules, weights with their channels last in memory; again: nothing.

    What the decoder computes stays the same, for a batch of one video; there are no gradients any more.
    """
    if isinstance(decoder.nonlinearity, nn.SiLU) and not isinstance(decoder.norm_out, ChannelNorm):
        decoder.norm_out, decoder.nonlinearity = ChannelNorm(decoder.norm_out, silu=True), nn.Identity()
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            kind = type(child).__name__
            if kind == "WanResidualBlock" and ResidualBlock.replaces(child):
                setattr(module, name, ResidualBlock(child))
            elif kind == "WanResample" and Upsampling.replaces(child):
                setattr(module, name, Upsampling(child))
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "WanCausalConv3d":
                setattr(module, name, CausalConv(child))
            elif type(child).__name__ == "WanRMS_norm" and child.channel_first:
                setattr(module, name, ChannelNorm(child))
    for module in decoder.modules():
        if isinstance(module, CausalConv):
            module.to(memory_format=LAST)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
