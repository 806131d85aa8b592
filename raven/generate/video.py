"""An mp4 file that plays at every moment while it grows, and after whatever ends it."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

INSTALL_HINT = "pip install raven-kernels[demo]"


def find_encoder() -> str:
    """The ffmpeg program that comes with imageio-ffmpeg; ``ModuleNotFoundError`` without it."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as error:
        raise ModuleNotFoundError(f"writing mp4 needs imageio_ffmpeg: {INSTALL_HINT}", name="imageio_ffmpeg") from error
    return get_ffmpeg_exe()


def enlarge(frames: np.ndarray, at_least: int = 192) -> np.ndarray:
    """Repeat pixels by a whole factor until the shorter side has ``at_least`` pixels and both sides are even.

    Small worlds have frames of 32 pixels; players would blur them, and H.264 wants even sides.
    """
    height, width = frames.shape[1:3]
    factor = max(1, -(-at_least // min(height, width)))
    if factor % 2 and (height % 2 or width % 2):
        factor += 1
    if factor == 1:
        return frames
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


class VideoWriter:
    """An mp4 file (H.264) that grows while a video is generated.

    It is written in fragments, and all frames but the newest are on the disk at every moment, so the part written so
    far plays also after an interruption, or while more is added. ``key_every``: frames between key frames. Opening
    fails with ``OSError`` when the folder cannot be written, before any time is spent on sampling; ``add`` and
    ``close`` do when the disk is full, and then the file holds all whole fragments and plays. A file that got no frame
    is removed. ``ModuleNotFoundError`` without imageio-ffmpeg, which brings the encoder.

    Use as a context manager; ``add(frames)`` takes ``[F, H, W, 3]`` uint8 of one size throughout.
    """

    def __init__(self, path: str | Path, fps: float = 8.0, key_every: int = 3) -> None:
        self._program = find_encoder()
        self.path = Path(path)
        self.fps = fps
        self.key_every = key_every
        self._process: subprocess.Popen | None = None
        self._messages: BinaryIO | None = None
        self._size: tuple[int, int] | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.open("wb").close()

    def add(self, frames: np.ndarray) -> None:
        """Append frames ``[F, H, W, 3]`` uint8, even height and width."""
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"frames: got shape {frames.shape}, dtype {frames.dtype}, expected [F, H, W, 3] uint8")
        size = (frames.shape[2], frames.shape[1])
        if size[0] % 2 or size[1] % 2:
            raise ValueError(f"frames: got {size[0]} x {size[1]} pixels, expected even width and height")
        if self._process is None:
            if self._size is not None:
                raise ValueError(f"frames: got some after {self.path} was closed")
            self._start(size)
        if size != self._size:
            raise ValueError(f"frames: got {size} pixels, expected {self._size} like the frames before")
        try:
            for frame in frames:
                self._process.stdin.write(np.ascontiguousarray(frame).data)
        except OSError:  # the encoder has gone; what it said is the reason
            self.close()
            raise

    def close(self) -> None:
        """Finish the file; ``OSError`` when not all of it could be written."""
        process, self._process = self._process, None
        if process is None:
            if self._size is None and self.path.is_file():
                self.path.unlink()
            return
        try:
            process.stdin.close()
        except OSError:
            pass  # the encoder has gone: its exit code tells
        if process.wait() != 0:
            trim(self.path)
            raise OSError(f"could not write {self.path} ({self._reason()})")
        self._messages.close()

    def _start(self, size: tuple[int, int]) -> None:
        self._size = size
        command = [
            *(self._program, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}"),
            *("-r", str(Fraction(self.fps).limit_denominator()), "-i", "-", "-an", "-c:v", "libx264"),
            *("-pix_fmt", "yuv420p", "-crf", "16", "-preset", "veryfast", "-tune", "zerolatency"),
            *("-g", str(self.key_every), "-movflags", "frag_keyframe+empty_moov+default_base_moof"),
            *("-flush_packets", "1", "-f", "mp4"),  # else the file grows by a megabyte at a time
            str(self.path.absolute()),
        ]
        self._messages = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C is for us, the encoder goes on until it has written what it was given. Ignored
        # signals stay ignored, so that a file-size limit is an error of its write and not its death.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=self._messages, start_new_session=True, restore_signals=False
        )

    def _reason(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        self._messages.close()
        return lines[-1].split("] ")[-1] if lines else "the encoder ended early"

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, content start, end) of the mp4 boxes in a range; the last may end beyond it."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1:
            size = struct.unpack(">Q", file.read(8))[0]
            content += 8
        if size < content - start:
            return
        yield kind, content, start + size
        start += size


def count_frames(path: str | Path) -> int:
    """Frames in the whole fragments of an mp4 file that was written in fragments."""
    return _fragments(Path(path))[1]


def trim(path: str | Path) -> int:
    """Cut a fragmented mp4 file after its last whole fragment; returns the frames that are left."""
    path = Path(path)
    end, frames = _fragments(path)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
    return frames


def _fragments(path: Path) -> tuple[int, int]:
    """Where the last whole fragment ends, and the frames up to there."""
    whole = frames = pending = 0
    length = path.stat().st_size
    with path.open("rb") as file:
        for kind, content, end in _boxes(file, 0, length):
            if end > length:
                break
            if kind == b"moof":
                pending = _samples(file, content, end)
                continue  # its frames are in the mdat that follows
            if kind == b"mdat":
                frames, pending = frames + pending, 0
            whole = end
    return whole, frames


def _samples(file: BinaryIO, start: int, end: int) -> int:
    count = 0
    for kind, content, stop in list(_boxes(file, start, end)):
        if kind == b"traf":
            count += _samples(file, content, stop)
        elif kind == b"trun":
            file.seek(content + 4)  # after version and flags
            count += struct.unpack(">I", file.read(4))[0]
    return count
