"""Memory traps: what was never written is NaN, and what lies around a tensor is watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """While active, ``torch.empty`` and its kin return NaN (the largest value for integers).

    An output element that a kernel forgets shows up instead of happening to hold an earlier, right result.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)


def poison_freed_memory(like: Sequence[torch.Tensor], copies: int = 2) -> None:
    """Leave NaN in freed blocks of the sizes of these tensors, in their dtype and in float32, for the next allocation.

    Unlike ``poisoned_memory`` it changes no setting: an op that behaves differently under PyTorch's deterministic
    algorithms shows its usual side. It works where freed memory is handed out again, as PyTorch does on a GPU.
    """
    held = [
        torch.full(x.shape, float("nan"), dtype=dtype, device=x.device)
        for _ in range(copies)
        for x in like
        for dtype in {x.dtype, torch.float32}
        if x.is_floating_point()
    ]
    del held


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    canary: float = 7.0,
    margin: int = 64,
) -> tuple[torch.Tensor, Callable[[], None]]:
    """A NaN-filled tensor between two margins of canaries, and a function that asserts that those are untouched."""
    size = int(torch.Size(shape).numel())
    buffer = torch.full((size + 2 * margin,), canary, dtype=dtype, device=device)
    inside = buffer[margin : margin + size]
    inside.fill_(float("nan"))

    def check() -> None:
        for side, edge in (("before", buffer[:margin]), ("after", buffer[margin + size :])):
            changed = int((edge != canary).sum())
            assert changed == 0, f"{changed} of {margin} elements {side} the tensor were written"

    return inside.view(tuple(shape)), check
