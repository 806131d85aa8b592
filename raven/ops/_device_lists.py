"""How long lists that were made once per mask live on the device."""

from __future__ import annotations

from typing import TypeVar

import torch

Lists = TypeVar("Lists")

_captured: dict[int, object] = {}


def held_by_graphs(lists: Lists) -> Lists:
    """Keep lists for good once a CUDA graph is captured with their addresses, whatever a cache does with them later."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured[id(lists)] = lists
    return lists
