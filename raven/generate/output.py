"""What a generator leaves on the disk: latents that are kept whatever happens, and a thread that writes."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from raven.generate.video import VideoWriter, count_frames, enlarge

Item = TypeVar("Item")
# Room for the header of a latents file, so that it can be rewritten in place.
_HEADER = 512


class LatentsFile:
    """A safetensors file with one tensor, ``latents`` ``[B, C, F, H, W]`` float32, filled along F as chunks come.

    Its whole size is taken on the disk at once: too little space is an ``OSError`` before any time is spent. While it
    grows, frames to come are zeros and the metadata entry ``frames_done`` says where they begin; ``close`` cuts the
    tensor to the frames that came, in place, and removes the file when none did.
    """

    def __init__(self, path: str | Path, shape: Sequence[int]) -> None:
        self.path = Path(path)
        self.shape = tuple(shape)
        self.done = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needed, held = self._end(self.shape[2]), self.path.stat().st_size if self.path.exists() else 0
        if needed > shutil.disk_usage(self.path.parent).free + held:  # an earlier file of that name is still whole
            text = f"{needed / 2**20:.0f} MiB"
            raise OSError(f"could not write {self.path} (no space left on the disk); its latents take {text}")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            # Not posix_fallocate, which is missing on some systems, alone: its absence must not be an error.
            size = self._end(self.shape[2])
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, size)
            else:
                os.ftruncate(self._file, size)
            self._write_header(self.shape[2])
        except OSError as error:
            self._remove()
            size = f"{self._end(self.shape[2]) / 2**20:.0f} MiB"
            raise OSError(f"could not write {self.path} ({error.strerror}); its latents take {size}") from error

    def add(self, chunk: torch.Tensor) -> None:
        """Append frames ``[B, C, f, H, W]`` float32 on the CPU; ``OSError`` when they cannot be written."""
        batch, channels, frames, height, width = self.shape
        got = chunk.shape[2]
        if chunk.shape != (batch, channels, got, height, width) or self.done + got > frames:
            raise ValueError(
                f"chunk: got {tuple(chunk.shape)} after {self.done} frames, expected a part of {self.shape}"
            )
        plane = 4 * height * width
        data = chunk.contiguous().numpy()
        try:
            for row, video in enumerate(data.reshape(batch * channels, got, height, width)):
                self._put(video.tobytes(), _HEADER + (row * frames + self.done) * plane)
            self._write_header(frames, self.done + got)
        except OSError as error:
            raise OSError(f"could not write {self.path} ({error.strerror})") from error
        self.done += got

    def close(self) -> None:
        """Keep the frames that came; again: does nothing."""
        if self._file is None:
            return
        batch, channels, frames, height, width = self.shape
        if self.done == 0:
            self._remove()
            return
        if self.done < frames:
            # Rows move towards the front, in order, so none is overwritten before it has moved. No space is needed.
            plane = 4 * height * width
            for row in range(batch * channels):
                content = os.pread(self._file, self.done * plane, _HEADER + row * frames * plane)
                self._put(content, _HEADER + row * self.done * plane)
            self._write_header(self.done)
            os.ftruncate(self._file, self._end(self.done))
        os.close(self._file)
        self._file = None

    @property
    def paths(self) -> list[Path]:
        """The file, in a list."""
        return [self.path]

    def kept(self, total: int) -> str:
        """What the closed file holds of ``total`` frames, in words."""
        return f"{self.path} holds {self.done} of {total} frames" if self.done else "no chunk was finished"

    def _end(self, frames: int) -> int:
        batch, channels, _, height, width = self.shape
        return _HEADER + 4 * batch * channels * frames * height * width

    def _put(self, content: bytes, offset: int) -> None:
        view = memoryview(content)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def _write_header(self, frames: int, done: int | None = None) -> None:
        shape = [*self.shape[:2], frames, *self.shape[3:]]
        offsets = [0, self._end(frames) - _HEADER]
        header: dict[str, Any] = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
        header["__metadata__"] = {"frames_done": str(self.done if done is None else done)}
        text = json.dumps(header).encode()
        self._put((_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8), 0)

    def _remove(self) -> None:
        os.close(self._file)
        self._file = None
        self.path.unlink(missing_ok=True)


class Videos:
    """One mp4 file for every video of a batch; ``add`` takes ``[B, F, H, W, 3]`` uint8 on the CPU."""

    def __init__(self, paths: Sequence[Path], fps: float, key_every: int) -> None:
        self.paths = list(paths)
        self.done = 0
        with ExitStack() as stack:
            self._writers = [stack.enter_context(VideoWriter(path, fps, key_every)) for path in self.paths]
            self._stack = stack.pop_all()

    def add(self, frames: torch.Tensor) -> None:
        """Append frames to every video; ``OSError`` when one cannot be written."""
        for writer, video in zip(self._writers, frames, strict=True):
            writer.add(enlarge(video.numpy()))
        self.done += frames.shape[1]

    def close(self) -> None:
        """Finish the files; the others too when one cannot be."""
        self._stack.close()

    def kept(self, total: int) -> str:
        """What the closed files hold of ``total`` frames, in words."""
        counts = [count_frames(path) if path.exists() else 0 for path in self.paths]
        if not any(counts):
            return "no chunk was finished, and there is no file"
        return ", ".join(f"{path} holds {n} of {total} frames" for path, n in zip(self.paths, counts, strict=True) if n)


class Writer(Generic[Item]):
    """Calls ``write(item)`` on a thread of its own, in order, at most ``depth`` items behind.

    An error of ``write`` is raised by a later ``put`` or by ``close``, once; items after it are dropped.
    """

    def __init__(self, write: Callable[[Item], None], depth: int = 2) -> None:
        self._write = write
        self._depth = depth
        self._thread = ThreadPoolExecutor(1, "raven-writer")
        self._pending: deque[Future[None]] = deque()
        self._broken = False

    def put(self, item: Item) -> None:
        """Hand over an item; waits while ``depth`` others are not done."""
        while len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._run, item))

    def close(self) -> None:
        """Wait until everything handed over is written."""
        self._thread.shutdown()
        while self._pending:
            self._pending.popleft().result()

    def _run(self, item: Item) -> None:
        if not self._broken:
            self._broken = True
            self._write(item)
            self._broken = False  # an error leaves it set
