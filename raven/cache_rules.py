"""Rules of long videos for ``KVCache``: keys rotated on read, and a sink that remembers what left the window.

Raw keys at window-relative positions are what LongLive's endless variant, Infinity-RoPE and Reward Forcing do: a model
sees the positions it was trained on, however long the video. The blended sink is Reward Forcing's (arXiv 2512.04678).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raven.ops.blend_rows import blend_rows
from raven.spans import check_int

if TYPE_CHECKING:
    from raven.cache import CachedChunk


def check_grid(grid: Sequence[int] | None) -> tuple[int, int]:
    """(rows, columns) of a frame's tokens; ``ValueError`` for anything else."""
    if grid is None or len(grid) != 2:
        raise ValueError(f"grid: got {grid}, expected (rows, columns) of a frame's tokens, which raw keys need")
    return check_int("grid[0]", grid[0], 1), check_int("grid[1]", grid[1], 1)


def check_ema(ema: float | None, keys: str, sink: int, window: int | None, dtype: torch.dtype | None) -> float | None:
    """``ema`` as it came; ``ValueError`` or ``TypeError`` where a blended sink is not defined."""
    if ema is None:
        return None
    if not 0 < ema < 1:
        raise ValueError(f"ema: got {ema}, expected a number between 0 and 1")
    if keys != "raw":
        raise ValueError(f"ema: got keys={keys!r}, expected raw: keys turned to different frames have no average")
    if sink != 1 or window is None:
        raise ValueError(f"ema: got sink={sink} and window={window}, expected one sink chunk and a window")
    if dtype == torch.float8_e4m3fn:
        raise TypeError("ema: got a cache of float8_e4m3fn, expected a dtype that is stored without a scale")
    return ema


class ReadTable:
    """What the open chunks read: cache rows ``rows`` int32 [R], and with a ``grid`` their ``positions`` int32 [R, 3].

    ``view`` lists the chunks, oldest first, as (first row, tokens, frames). Their frames are numbered 0, 1, 2, ...
    through all of them; row and column are those of the token in its frame. Made on the device, so that nothing is
    uploaded; kept by the cache, so that a CUDA graph may hold the addresses.
    """

    @torch.inference_mode(False)
    def __init__(
        self, view: Sequence[tuple[int, int, int]], grid: tuple[int, int] | None, device: torch.device
    ) -> None:
        int32 = {"dtype": torch.int32, "device": device}
        self.rows = torch.cat([torch.arange(start, start + tokens, **int32) for start, tokens, _ in view])
        self.positions: Tensor | None = None
        if grid is not None:
            axes = [torch.arange(n, **int32) for n in (sum(frames for *_, frames in view), *grid)]
            self.positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


class EmaSink:
    """The blended sink of Reward Forcing: ``sink = alpha * sink + (1 - alpha) * evicted``, token by token.

    It applies to raw keys and to values, of token n of the sink chunk and token n of the chunk that leaves the window.
    A step of 1 - alpha = 0.001 is less than half a unit in the last place of bfloat16 and would be lost, so what
    rounding takes away is kept in ``lost``, in the same dtype, and the sum of both is what is averaged, in float32.
    """

    def __init__(self, alpha: float, keys: Sequence[Tensor], values: Sequence[Tensor], tokens: int) -> None:
        self.alpha = alpha
        self.targets = (*keys, *values)
        narrow = keys[0].dtype in (torch.bfloat16, torch.float16)
        with torch.inference_mode(False):
            self.lost = tuple(torch.zeros_like(x[:, :tokens]) for x in self.targets) if narrow else ()

    def reset(self) -> None:
        """Forget what rounding took away."""
        for lost in self.lost:
            lost.zero_()

    def __call__(self, sink: CachedChunk, evicted: CachedChunk) -> None:
        """Blend the rows of ``evicted`` into those of ``sink``, which are as many."""
        for i, x in enumerate(self.targets):
            lost = self.lost[i] if self.lost else None
            blend_rows(x, lost, sink.start, evicted.start, sink.length, self.alpha)
