"""What the GPU kernels of norm and rotary take: packed rows, packed positions, frequencies in fixed point."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from raven.graphs import held_by_graphs
from raven.reference.qk_norm_rope import frequencies


def frequency_table(dim: int, theta: float, device: torch.device) -> Tensor:
    """Turns per unit of position of each pair, times 2^64 and modulo 2^64, int64 [dim / 2].

    Built on first use, so a CUDA graph is captured after one call outside of it.
    """
    return held_by_graphs(_frequency_table(dim, theta, device))


@lru_cache(maxsize=32)
def _frequency_table(dim: int, theta: float, device: torch.device) -> Tensor:
    turns = (int(f / (2 * math.pi) * 2.0**64) % 2**64 for f in frequencies(dim, theta))
    with torch.inference_mode(False):
        return torch.tensor([t - 2**64 if t >= 2**63 else t for t in turns], dtype=torch.int64, device=device)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def token_rows(x: Tensor) -> Tensor:
    """``x [B, L, H, D]`` with the heads of a token packed; any stride between tokens is read in place."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def packed(weight: Tensor | None) -> Tensor | None:
    return weight if weight is None else weight.contiguous()


def position_rows(positions: Tensor) -> tuple[Tensor, int]:
    """Packed positions and their stride between batch entries, 0 for ``[L, 3]``."""
    positions = positions.contiguous()
    return positions, 3 * positions.shape[1] if positions.ndim == 3 else 0


def are_aligned(x: Tensor) -> bool:
    """Whether ``x [B, L, H, D]`` has packed heads, and every row starts at a multiple of 16 bytes."""
    size = x.element_size()
    return (
        x.stride(3) == 1
        and x.stride(2) == x.shape[3]
        and x.data_ptr() % 16 == 0
        and all(x.stride(i) * size % 16 == 0 for i in (0, 1) if x.shape[i] > 1)
    )


def aligned_rows(x: Tensor) -> Tensor:
    """``x [B, L, H, D]`` as the CUDA kernels read it, 16 bytes at a time: in place where it can be, else a copy."""
    return x if are_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def aligned(weight: Tensor) -> Tensor:
    """A packed weight that begins at a multiple of 16 bytes."""
    return (
        weight
        if weight.is_contiguous() and weight.data_ptr() % 16 == 0
        else weight.clone(memory_format=torch.contiguous_format)
    )
