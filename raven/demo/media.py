"""Videos as files: frames as bytes, animated previews, side-by-side grids."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from raven.generate.video import INSTALL_HINT, VideoWriter, enlarge

__all__ = ["INSTALL_HINT", "VideoWriter", "animated_webp", "enlarge", "grid", "need", "write_mp4"]


def need(package: str, purpose: str) -> ModuleType:
    """Import an optional package, or raise ``ModuleNotFoundError`` that names what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ModuleNotFoundError(f"{purpose} needs {package}: {INSTALL_HINT}", name=package) from error


def write_mp4(path: str | Path, frames: np.ndarray, fps: float = 8.0) -> Path:
    """Write frames ``[F, H, W, 3]`` uint8 as one mp4, enlarged for viewing."""
    with VideoWriter(path, fps) as writer:
        writer.add(enlarge(frames))
    return Path(path)


def animated_webp(frames: np.ndarray, fps: float = 8.0) -> bytes:
    """An endless animated WebP of frames ``[F, H, W, 3]`` uint8, lossless at its own size (the page enlarges it)."""
    image = need("PIL.Image", "the animated preview")
    pictures = [image.fromarray(frame) for frame in frames]
    data = io.BytesIO()
    pictures[0].save(
        data,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        lossless=True,
        method=4,
    )
    return data.getvalue()


def grid(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], at_least: int = 128, gap: int = 8) -> np.ndarray:
    """Frames of all videos side by side: one row per prompt, one labelled column per model.

    ``rows[r][c]`` is ``[F, H, W, 3]`` uint8, all of one size. Returns ``[F, H', W', 3]`` uint8 with even sides.
    """
    draw = need("PIL.ImageDraw", "the video grid")
    image = need("PIL.Image", "the video grid")
    tiles = [[enlarge(cell, at_least) for cell in row] for row in rows]
    frames, height, width, _ = tiles[0][0].shape
    top = 22
    total = (
        frames,
        (top + len(tiles) * (height + gap) + gap + 1) // 2 * 2,
        (gap + len(labels) * (width + gap) + 1) // 2 * 2,
        3,
    )
    sheet = np.full(total, 24, dtype=np.uint8)
    strip = image.fromarray(sheet[0, :top])
    pen = draw.Draw(strip)
    for column, label in enumerate(labels):
        pen.text((gap + column * (width + gap), 6), label, fill=(230, 230, 230))
    sheet[:, :top] = np.asarray(strip)
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):
            y, x = top + r * (height + gap), gap + c * (width + gap)
            sheet[:, y : y + height, x : x + width] = tile
    return sheet
