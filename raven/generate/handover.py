"""Finished chunks on their way to the host: decoded and copied beside the next chunk's denoising."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Decode = Callable[[torch.Tensor], torch.Tensor]


class Handover:
    """Runs ``decode`` on every finished chunk, on a CUDA stream of its own, and copies the result to the host.

    Nothing waits on the host: the side stream waits for the chunk by an event, the reader of the result for the copy.
    On a CPU everything happens in ``submit``.
    """

    def __init__(self, decode: Decode, device: torch.device) -> None:
        self._decode = decode
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: Mark = self.mark()

    def warm_up(self, x: torch.Tensor) -> None:
        """Decode ``x`` once for nothing: libraries choose their kernels, and the side stream gets its memory."""
        self.submit(x).wait()

    def begin(self) -> None:
        """The next chunk's latency counts from here."""
        self._last = self.mark()

    def mark(self) -> Mark:
        """This moment in the order of the work that produces chunks."""
        return Mark(None if self._side is None else torch.cuda.current_stream(self._side.device))

    def submit(self, x: torch.Tensor) -> Decoded:
        """Take over a chunk that the current stream has produced, or will; its memory may be written again at once."""
        start, self._last = self._last, self.mark()
        if self._side is None:
            return Decoded(self._decode(x), start, self.mark())
        x = x.clone()
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        # The clone belongs to the producing stream; without this its memory could be given away before it is read.
        x.record_stream(self._side)
        with torch.cuda.stream(self._side):
            result = self._decode(x)
            host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            host.copy_(result, non_blocking=True)
            return Decoded(host, start, Mark(self._side))


class Mark:
    """A moment in a CUDA stream, or on the host's clock without one."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event = None if stream is None else torch.cuda.Event(enable_timing=True, blocking=True)
        self._time = time.perf_counter()
        if stream is not None:
            self._event.record(stream)

    def wait(self) -> None:
        """Wait on the host until the stream is there."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Mark) -> float:
        """Seconds from an earlier mark to this one; both must be over."""
        if self._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


class Decoded:
    """A chunk's result on the host, once ``wait`` returns.

    ``seconds`` is its latency: from the end of the chunk before it (or the beginning) to its last byte here.
    """

    def __init__(self, host: torch.Tensor, start: Mark, end: Mark) -> None:
        self._host, self._start, self._end = host, start, end

    def wait(self) -> torch.Tensor:
        """The result, on the CPU."""
        self._end.wait()
        return self._host

    @property
    def seconds(self) -> float:
        """Latency in seconds, after ``wait``."""
        return self._end.since(self._start)
