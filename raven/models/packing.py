"""Between latents and the packed token row: patches, and where each segment's tokens come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from raven.graphs import held_by_graphs
from raven.layout import ChunkLayout


def patchify(x: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Cut latents ``[B, C, F, H, W]`` into tokens ``[B, F * rows * columns, C * ph * pw]``.

    The channel order is the one of a flattened convolution weight, so the patch embedding is one matrix product.
    Raises ``ValueError`` when a patch does not divide the latent.
    """
    _, ph, pw = patch_size
    batch, channels, frames, height, width = x.shape
    if height % ph or width % pw:
        raise ValueError(f"x: got a latent of {height}x{width}, expected a multiple of the patch {ph}x{pw}")
    x = x.reshape(batch, channels, frames, height // ph, ph, width // pw, pw)
    x = x.permute(0, 2, 3, 5, 1, 4, 6)  # [B, F, rows, columns, C, ph, pw]
    return x.reshape(batch, frames * (height // ph) * (width // pw), channels * ph * pw)


def unpatchify(tokens: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Put tokens ``[B, F * rows * columns, ph * pw * C]`` (channels last, as in Wan) back to ``[B, C, F, H, W]``."""
    _, ph, pw = patch_size
    batch, length, width = tokens.shape
    frames, channels = length // (rows * columns), width // (ph * pw)
    x = tokens.reshape(batch, frames, rows, columns, ph, pw, channels)
    x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, C, F, rows, ph, columns, pw]
    return x.reshape(batch, channels, frames, rows * ph, columns * pw)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached: a later training step may save them for its backward
def frame_positions(frame: int, frames: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Rotary positions int32 ``[frames * rows * columns, 3]`` (frame, row, column) of a run of frames.

    Made on the device itself, so a stream uploads nothing for a new chunk.
    """
    starts = ((frame, frames), (0, rows), (0, columns))
    axes = [torch.arange(start, start + n, dtype=torch.int32, device=device) for start, n in starts]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Packing:
    """A layout made concrete for one token grid and device; kept and reused over training steps.

    ``pieces`` lists, in packed order, (role, begin, end): tokens ``[begin, end)`` of the noisy or the clean video.
    ``level`` int64 ``[segments]`` is the chunk whose noise level a segment has; ``chunks`` (one past the last) for
    a clean one. ``positions`` int32 ``[L, 3]``; ``clean`` bool ``[L]``.
    """

    layout: ChunkLayout
    pieces: tuple[tuple[str, int, int], ...]
    lengths: tuple[int, ...]
    noisy: tuple[int, ...]
    chunks: int
    frames: int
    level: torch.Tensor
    noisy_index: torch.Tensor
    positions: torch.Tensor
    clean: torch.Tensor

    @property
    def has_clean(self) -> bool:
        """Whether clean chunks are part of the row."""
        return len(self.noisy) < len(self.lengths)

    @property
    def noisy_lengths(self) -> tuple[int, ...]:
        """Lengths of the noisy segments, in chunk order."""
        return tuple(self.lengths[i] for i in self.noisy)

    def pack(self, noisy: torch.Tensor, clean: torch.Tensor | None) -> torch.Tensor:
        """Arrange tokens of the noisy video and of the clean one (``[B, F * rows * columns, K]``) in packed order."""
        if clean is None:
            return noisy
        sources = {"noisy": noisy, "clean": clean}
        return torch.cat([sources[role][:, begin:end] for role, begin, end in self.pieces], dim=1)

    def take_noisy(self, x: torch.Tensor) -> torch.Tensor:
        """The noisy tokens of a packed row ``[B, L, K]``, in the order of the video."""
        if not self.has_clean:
            return x
        parts = x.split(self.lengths, dim=1)
        return torch.cat([parts[i] for i in self.noisy], dim=1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def make_packing(layout: ChunkLayout, rows: int, columns: int, device: torch.device) -> Packing:
    """Work out the packing of ``layout`` for a grid of ``rows`` x ``columns`` tokens a frame.

    Raises ``ValueError`` when the layout was made for another number of tokens a frame, holds several documents, or
    its noisy segments do not cover one video from its first frame on.
    """
    tokens = rows * columns
    if layout.tokens_per_frame != tokens:
        got = layout.tokens_per_frame
        raise ValueError(f"layout: got {got} tokens per frame, expected {rows}x{columns} = {tokens}")
    segments = layout.segments
    noisy = sorted((i for i, s in enumerate(segments) if s.role == "noisy"), key=lambda i: segments[i].frame)
    frames = 0
    for i in noisy:
        if segments[i].document != 0 or segments[i].frame != frames:
            raise ValueError(f"layout: got {segments[i]}, expected the noisy chunk at frame {frames} of document 0")
        frames += segments[i].frames
    if frames == 0:
        raise ValueError("layout: got no noisy segment, expected at least one")
    pieces = tuple((s.role, s.frame * tokens, (s.frame + s.frames) * tokens) for s in segments)
    level = [noisy.index(i) if s.role == "noisy" else len(noisy) for i, s in enumerate(segments)]
    clean = torch.cat([torch.full((s.length,), s.role == "clean") for s in segments])
    return Packing(
        layout=layout,
        pieces=pieces,
        lengths=tuple(s.length for s in segments),
        noisy=tuple(noisy),
        chunks=len(noisy),
        frames=frames,
        level=torch.tensor(level).to(device),
        noisy_index=torch.tensor(noisy).to(device),
        positions=layout.positions(rows, columns).to(device),
        clean=clean.to(device),
    )


@dataclass(frozen=True, eq=False)
class LastSegment:
    """The newest chunk of a row ``[clean | noisy]``, where a ``Packing`` would stand: only its tokens go on."""

    noisy_lengths: tuple[int]
    noisy_index: torch.Tensor

    def take_noisy(self, x: torch.Tensor) -> torch.Tensor:
        """Its tokens of ``x`` ``[B, L, K]``, without a copy."""
        return x[:, -self.noisy_lengths[0] :]


def last_segment(lengths: tuple[int, ...], device: torch.device) -> LastSegment:
    """The last of the segments of these lengths."""
    return held_by_graphs(_last_segment(lengths, device))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _last_segment(lengths: tuple[int, ...], device: torch.device) -> LastSegment:
    return LastSegment(lengths[-1:], torch.full((1,), len(lengths) - 1, device=device))
