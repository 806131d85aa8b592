"""Encoding the newest chunks again when the prompt of a stream changes (LongLive, arXiv 2509.22622)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raven.spans import check_int

if TYPE_CHECKING:
    from raven.stream import Stream


class RecentChunks:
    """The finished latents of a stream's newest ``count`` chunks, and with ``sinks`` those of its sink.

    ``encode`` writes their keys and values anew, oldest first, under the prompt that the stream has by then: each chunk
    sees itself, the chunks that were encoded before it in the same call, and the sink, unless that is encoded anew
    too. The rest of the history plays no part.
    """

    def __init__(self, count: int, sink: int, sinks: bool = False) -> None:
        self.count = check_int("recache", count, 1)
        self.sink, self.sinks = sink, sinks
        self._latents: dict[int, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget them all."""
        self._latents.clear()

    def keep(self, chunk: int, x_0: torch.Tensor) -> None:
        """Copy chunk number ``chunk`` and drop what is no longer needed."""
        if chunk - self.count >= self.sink:
            del self._latents[chunk - self.count]
        if chunk >= self.sink or self.sinks:
            self._latents[chunk] = x_0.clone()

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks that ``encode`` would write."""
        return tuple(self._latents)

    @torch.no_grad()
    def encode(self, stream: Stream) -> None:
        """Write keys and values of ``chunks`` anew; none of the stream's commits may be deferred."""
        cache = stream.cache
        while cache.current is not None:  # a chunk in flight is opened again, and overwritten, by its next pass
            cache.cancel()
        seen = [] if self.sinks else list(range(min(self.sink, cache.num_committed)))
        for chunk, x_0 in self._latents.items():
            cache.reopen(chunk, seen)
            assert cache.current is not None
            x_0 = stream._twice(x_0)
            stream.model(x_0, 0.0, stream.text, cache=cache, frame=cache.current.frame, write_only=True)
            cache.commit()
            seen.append(chunk)
