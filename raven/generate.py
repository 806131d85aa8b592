"""``raven generate``: stream videos from a checkpoint into a file that grows chunk by chunk."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raven.checkpoint import load_checkpoint, load_model, write_safetensors
from raven.demo import media
from raven.models.config import WanConfig
from raven.schedule import sampling_levels
from raven.stream import Stream

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Request:
    """One call of ``raven generate``; ``None`` means: as the checkpoint was trained, else Wan's usual value.

    ``frames`` and ``chunk_frames`` count latent frames, ``sink`` and ``window`` chunks; ``latent_size`` is
    ``HEIGHTxWIDTH`` of the latent.
    """

    checkpoint: str
    prompt: list[str] | None = None
    context: str | None = None
    out: str = "out.mp4"
    config: str | None = None
    frames: int | None = None
    chunk_frames: int | None = None
    latent_size: str | None = None
    sink: int | None = None
    window: int | None = None
    steps: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    fps: float | None = None


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of the demo says about itself: its world and how it was trained to sample; else ``{}``.

    Raises ``FileNotFoundError`` without a file, ``ValueError`` when a ``.safetensors`` file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a checkpoint file")
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("raven", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from error


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or CUDA where there is one; ``ValueError`` when it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, expected one of the {torch.cuda.device_count()} GPUs PyTorch sees")
    return device


def check_writable(path: Path) -> None:
    """Raise ``OSError`` now rather than after minutes of work when ``path`` cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


def read_context(path: str | Path) -> list[torch.Tensor]:
    """Text embeddings from a safetensors file: tensors ``[n, text_dim]``, or one ``[B, n, text_dim]``."""
    tensors = load_checkpoint(path)
    context: list[torch.Tensor] = []
    for name in sorted(tensors):
        tensor = tensors[name]
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3):
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"context: got {got} for {name!r}, expected [n, text_dim] or [B, n, text_dim]")
        context += [tensor] if tensor.ndim == 2 else list(tensor)
    if not context:
        raise ValueError(f"context: {path} holds no tensors, expected text embeddings [n, text_dim]")
    return context


def _default(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _latent_shape(request: Request, trained: dict, channels: int) -> tuple[int, int, int]:
    if request.latent_size is None:
        return (channels, *trained.get("latent_shape", (channels, 60, 104))[1:])
    sides = request.latent_size.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"latent_size: got {request.latent_size!r}, expected HEIGHTxWIDTH such as 60x104")
    return channels, int(sides[0]), int(sides[1])


def _contexts(request: Request, world: Any, device: torch.device) -> Any:
    if request.context is not None:
        if request.prompt:
            raise ValueError("context: got it together with prompt, expected one of them")
        return [rows.to(device) for rows in read_context(request.context)]
    if world is None:
        raise ValueError(
            "prompt: this checkpoint comes without a text encoder; give --context FILE.safetensors with embeddings"
        )
    if not request.prompt:
        raise ValueError("prompt: got none, expected at least one, such as " + repr(world.prompts(1, seed=0)[0]))
    return world.encode(request.prompt, device=device)


def _outputs(out: Path, count: int) -> list[Path]:
    """``out.mp4``, or ``out-1.mp4``, ``out-2.mp4``, ... for several videos."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def generate(request: Request) -> list[Path]:
    """Stream the videos of ``request`` and return the files written.

    A checkpoint of a built-in world is decoded to mp4; otherwise the finished latents are written as ``.safetensors``
    (``latents`` ``[B, C, F, H, W]`` float32). Raises ``ValueError`` for arguments that do not fit each other or the
    checkpoint, ``OSError`` when a file cannot be read or written.
    """
    trained = describe(request.checkpoint)
    out = Path(request.out)
    world = None
    if "world" in trained:
        from raven.worlds import Shapes

        world = Shapes(**trained["world"])
    suffixes = (".mp4", ".safetensors") if world is not None else (".safetensors",)
    if out.suffix not in suffixes:
        why = "" if world is not None else " (there is no decoder for this checkpoint's latents)"
        raise ValueError(f"out: got {out.name!r}, expected a name that ends in {' or '.join(suffixes)}{why}")
    device = pick_device(request.device)
    kind = request.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if kind not in DTYPES:
        raise ValueError(f"dtype: got {kind!r}, expected one of {', '.join(DTYPES)}")
    fps = _default(request.fps, trained.get("fps"), 8.0)
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: got {fps}, expected a positive number of frames per second")
    context = _contexts(request, world, device)
    if out.suffix == ".mp4":
        media.need("imageio_ffmpeg", "writing mp4")
    check_writable(out)

    config = WanConfig.from_json(request.config) if request.config else None
    model = load_model(request.checkpoint, config, device=device, dtype=DTYPES[kind]).eval().requires_grad_(False)
    chunk = _default(request.chunk_frames, trained.get("chunk_frames"), 3)
    frames = _default(request.frames, trained.get("frames"), 21)
    window = _default(request.window, trained.get("window"))
    sink = _default(request.sink, trained.get("sink"), 0)
    levels = sampling_levels(request.steps) if request.steps is not None else trained.get("levels")
    shape = _latent_shape(request, trained, model.config.in_dim)
    stream = Stream(model, context, shape, chunk, sink=sink, window=window)
    generators = [torch.Generator().manual_seed(request.seed + b) for b in range(stream.batch)]
    chunks = stream.generate(frames, levels, generator=generators)
    if out.suffix == ".safetensors":
        return _write_latents(out, chunks, chunk, frames)
    return _write_videos(_outputs(out, stream.batch), chunks, chunk, frames, fps)


class _LiveLine:
    """``chunk 3/12, frame 9/36, 14.2 frames/s``, rewritten after every chunk."""

    def __init__(self, chunk: int, frames: int) -> None:
        self.chunks, self.frames = frames // chunk, frames
        self.done = 0
        self.start = time.perf_counter()

    def add(self, frames: int) -> None:
        self.done += frames
        rate = self.done / max(time.perf_counter() - self.start, 1e-9)
        number = self.done * self.chunks // self.frames
        end = "\n" if self.done >= self.frames else ""
        print(
            f"\rchunk {number}/{self.chunks}, frame {self.done}/{self.frames}, {rate:.1f} frames/s",
            end=end,
            file=sys.stderr,
            flush=True,
        )


def _write_latents(path: Path, chunks: Any, chunk: int, frames: int) -> list[Path]:
    line, finished = _LiveLine(chunk, frames), []
    for x in chunks:
        finished.append(x.float().cpu())
        line.add(x.shape[2])
    write_safetensors(path, {"latents": torch.cat(finished, dim=2).contiguous()})
    return [path]


def _write_videos(paths: list[Path], chunks: Any, chunk: int, frames: int, fps: float) -> list[Path]:
    from contextlib import ExitStack

    from raven.worlds.pictures import to_uint8

    line = _LiveLine(chunk, frames)
    with ExitStack() as stack:
        writers = [stack.enter_context(media.VideoWriter(path, fps, key_every=chunk)) for path in paths]
        for x in chunks:
            for writer, video in zip(writers, x, strict=True):
                writer.add(media.enlarge(to_uint8(video).numpy()))
            line.add(x.shape[2])
    return paths
