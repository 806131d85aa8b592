"""What a captured CUDA graph reads has to outlive the caches that it came from."""

from __future__ import annotations

from typing import TypeVar

import torch

Kept = TypeVar("Kept")

_captured: dict[int, object] = {}


def held_by_graphs(kept: Kept) -> Kept:
    """Keep it for good once a CUDA graph is captured with its addresses, whatever a cache does with it later."""
    if kept is not None and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured[id(kept)] = kept
    return kept
