"""Where the time of a training step goes: phases that the trainers name, and a timer that listens to them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_listeners: list[PhaseTimer] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name a part of a step, for the profiler's timeline and for every ``PhaseTimer`` that is on."""
    with torch.profiler.record_function(name):
        begun = [(timer, timer.mark()) for timer in _listeners]
        yield
        for timer, start in begun:
            timer.marks.append((name, start, timer.mark()))


class PhaseTimer:
    """Times what happens inside its ``with`` block, phase by phase.

    On a GPU phases lie between events on the current stream, so nothing waits and a phase includes what the device
    idles in it. A phase inside another counts for both. What a CUDA graph replays has no phases, and a step must not
    be captured while a timer is on.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []
        self._whole: list[torch.cuda.Event | float] = []

    def mark(self) -> torch.cuda.Event | float:
        """This moment on the device."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> PhaseTimer:
        self.marks, self._whole = [], [self.mark()]
        _listeners.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _listeners.remove(self)
        self._whole.append(self.mark())

    def _between(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        if isinstance(start, float):
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    def total_ms(self) -> float:
        """Milliseconds of the whole block."""
        return self._between(*self._whole)

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of every phase, summed over its occurrences, in the order of their first ends."""
        times: dict[str, float] = {}
        for name, start, end in self.marks:
            times[name] = times.get(name, 0.0) + self._between(start, end)
        return times
