"""What ``raven generate`` is asked for: one call's options, and what can be said of them before a model is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raven.models.config import WanConfig
from raven.presets import preset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = ("cache", "linears")


@dataclass
class Request:
    """One call of ``raven generate``; ``None`` means: as the checkpoint was trained, else Wan's usual value.

    ``frames``, ``chunk_frames`` and the frames of ``switch`` ("FRAME: PROMPT") count latent frames, ``sink`` and
    ``window`` chunks; ``latent_size`` is ``HEIGHTxWIDTH`` of the latent, ``size`` that of the video. ``prompts`` is a
    file with one prompt a line, ``wan`` a folder in diffusers' layout. ``fp8``: "cache", "linears" or both.
    """

    checkpoint: str
    prompt: list[str] | None = None
    prompts: str | None = None
    switch: list[str] | None = None
    context: str | None = None
    wan: str | None = None
    out: str = "out.mp4"
    config: str | None = None
    preset: str | None = None
    frames: int | None = None
    chunk_frames: int | None = None
    latent_size: str | None = None
    size: str | None = None
    sink: int | None = None
    window: int | None = None
    steps: int | None = None
    fp8: str | None = None
    eager: bool = False
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    fps: float | None = None
    ignore_memory: bool = False


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of the demo says about itself: its world and how it was trained to sample; else ``{}``.

    Raises ``FileNotFoundError`` without a file, ``ValueError`` when a ``.safetensors`` file cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a checkpoint file")
    if path.is_dir() and len(inside := list(path.glob("*.safetensors"))) == 1:
        path = inside[0]
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            trained = json.loads((file.metadata() or {}).get("raven", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read ({error})") from error
    known = trained if isinstance(trained, dict) else {"metadata": trained}
    for name in ("metadata", "frames", "chunk_frames", "sink", "window"):
        if not isinstance(known.get(name), int | None):
            raise ValueError(f"checkpoint: {path} says {name} = {known[name]!r}, expected what the demo writes")
    return trained


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


def check_not_read(path: Path, *inputs: str | None) -> None:
    """Raise ``ValueError`` when writing ``path`` would destroy one of the inputs, or a file in one that is a folder."""
    for source in (Path(name) for name in inputs if name is not None):
        for file in source.iterdir() if source.is_dir() else (source,):
            if path.exists() and file.exists() and path.samefile(file):
                raise ValueError(f"out: got {path}, which is read as well ({file}), expected another name")


def check_writable(path: Path) -> None:
    """Raise ``OSError`` now rather than after minutes of work when ``path`` cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()


def read_prompts(request: Request) -> list[str]:
    """The prompts of a request, from the command line or its file; one a line, empty lines left out."""
    if request.prompts is None:
        return list(request.prompt or ())
    if request.prompt:
        raise ValueError("prompts: got a file together with prompt, expected one of them")
    try:
        lines = Path(request.prompts).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {request.prompts} is not a text file in UTF-8 ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: {request.prompts} holds none, expected one a line")
    return prompts


def parse_switches(texts: list[str] | None, chunk_frames: int, frames: int) -> list[tuple[int, str]]:
    """``"FRAME: PROMPT"`` as (frame, prompt), in order; ``ValueError`` for a frame that begins no later chunk."""
    switches: dict[int, str] = {}
    example = f"such as '{chunk_frames}: a dog runs'"
    for text in texts or ():
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\S.*?)\s*", text, re.DOTALL)
        if found is None:
            raise ValueError(f"switch: got {text!r}, expected FRAME: PROMPT, {example}")
        frame = int(found[1])
        if frame % chunk_frames or not 0 < frame < frames:
            below, last = frame // chunk_frames * chunk_frames, frames - chunk_frames
            near = sorted({min(max(f, chunk_frames), last) for f in (below, below + chunk_frames)})
            want = f"such as {' or '.join(map(str, near))}" if last > 0 else "and there is only one chunk"
            raise ValueError(f"switch: got frame {frame}, expected the first latent frame of a later chunk, {want}")
        if frame in switches:
            raise ValueError(f"switch: got two prompts for frame {frame}, expected one")
        switches[frame] = found[2]
    return sorted(switches.items())


def parse_fp8(text: str | None) -> set[str]:
    """Which parts are kept in float8."""
    parts = {part.strip() for part in text.split(",")} if text is not None else set()
    if not parts <= set(FP8):
        raise ValueError(f"fp8: got {text!r}, expected cache, linears or cache,linears")
    return parts


def first_given(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def stream_options(request: Request, trained: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``Stream``: what the request says, over the preset, over how the checkpoint was trained."""
    named = preset(request.preset) if request.preset is not None else {}
    known = named or {name: trained[name] for name in ("chunk_frames", "sink", "window") if name in trained}
    given = {name: getattr(request, name) for name in ("chunk_frames", "sink", "window")}
    options = {"chunk_frames": 3, "sink": 0, "window": None, **known}
    options |= {name: value for name, value in given.items() if value is not None}
    options.pop("max_frames", None)  # of a video; ``frames`` says it
    return options


def check_seed(seed: int, batch: int) -> None:
    if not 0 <= seed <= 2**63 - batch:
        raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - {batch}")


def check_frames(frames: int, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk_frames: got {chunk}, expected at least 1")
    if frames < 1 or frames % chunk:
        near = sorted({max(frames // chunk, 1) * chunk, (max(frames, 0) // chunk + 1) * chunk})
        want = f"a multiple of chunk_frames = {chunk}, such as {' or '.join(map(str, near))}"
        raise ValueError(f"frames: got {frames}, expected {want}")


def _sides(name: str, text: str, example: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{name}: got {text!r}, expected HEIGHTxWIDTH such as {example}")
    return int(sides[0]), int(sides[1])


def latent_shape(request: Request, trained: dict, config: WanConfig, spatial: int) -> tuple[int, int, int]:
    channels = config.in_dim
    _, ph, pw = config.patch_size
    if request.size is not None:
        if request.latent_size is not None:
            raise ValueError("size: got it together with latent_size, expected one of them")
        height, width = _sides("size", request.size, "480x832")
        if height % (spatial * ph) or width % (spatial * pw):
            want = f"multiples of {spatial * ph} and {spatial * pw} ({spatial} pixels a latent, patches of {ph}x{pw})"
            raise ValueError(f"size: got {request.size}, expected {want}")
        return channels, height // spatial, width // spatial
    if request.latent_size is None:
        return (channels, *trained.get("latent_shape", (channels, 60, 104))[1:])
    height, width = _sides("latent_size", request.latent_size, "60x104")
    if height % ph or width % pw:
        raise ValueError(f"latent_size: got {request.latent_size}, expected multiples of the patches of {ph}x{pw}")
    return channels, height, width
