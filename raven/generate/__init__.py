"""``raven generate``: stream videos from a checkpoint into files that grow chunk by chunk."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raven.checkpoint import load_model
from raven.errors import check_finite
from raven.generate.handover import Decoded, Handover
from raven.generate.output import LatentsFile, Videos, Writer
from raven.generate.request import (
    DTYPES,
    Request,
    check_frames,
    check_not_read,
    check_seed,
    check_writable,
    describe,
    first_given,
    latent_shape,
    parse_fp8,
    parse_switches,
    pick_device,
    read_prompts,
    stream_options,
)
from raven.generate.sources import Source, pick_source, read_context
from raven.generate.video import find_encoder
from raven.memory import GIB, Estimate, free_memory, require, stream_memory
from raven.models.config import WanConfig
from raven.sampling import checked_levels
from raven.schedule import sampling_levels
from raven.stream import Stream

__all__ = ["Request", "generate", "read_context"]


def generate(request: Request) -> list[Path]:
    """Stream the videos of ``request`` and return the files written.

    A checkpoint of a built-in world, or one with Wan's VAE (``wan``), is decoded to mp4; latents are written as
    ``.safetensors`` (``latents`` ``[B, C, F, H, W]`` float32). Raises ``ValueError`` for arguments that do not fit each
    other or the checkpoint, ``OSError`` when a file cannot be read or written, ``MemoryError`` when the GPU is too
    small. Whatever ends it, the chunks finished so far are in the files, and ``KeyboardInterrupt``, ``OSError`` and
    ``MemoryError`` say how much that is.
    """
    trained = describe(request.checkpoint)
    options = stream_options(request, trained)
    chunk, frames = options["chunk_frames"], first_given(request.frames, trained.get("frames"), 21)
    check_frames(frames, chunk)
    for name in ("sink", "window"):  # more than the video has is all of it
        options[name] = options[name] if options[name] is None else min(options[name], frames // chunk)
    levels = sampling_levels(request.steps) if request.steps is not None else trained.get("levels")
    checked_levels(levels)
    prompts, switches = read_prompts(request), parse_switches(request.switch, chunk, frames)
    fp8 = parse_fp8(request.fp8)
    device = pick_device(request.device)
    kind = request.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if kind not in DTYPES:
        raise ValueError(f"dtype: got {kind!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    source = pick_source(request, trained, dtype)
    fps = first_given(request.fps, source.fps)
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: got {fps}, expected a positive number of frames per second")
    out = Path(request.out)
    suffixes = (".mp4", ".safetensors") if source.decodes else (".safetensors",)
    if out.suffix not in suffixes:
        why = "" if source.decodes else " (there is no decoder for this checkpoint's latents)"
        raise ValueError(f"out: got {out.name!r}, expected a name that ends in {' or '.join(suffixes)}{why}")
    films = out.suffix == ".mp4"
    if films:
        find_encoder()
    later = [prompt for _, prompt in switches]
    source.check_prompts(prompts, later)
    check_not_read(out, request.checkpoint, request.context, request.config, request.prompts)
    check_writable(out)

    config = WanConfig.from_json(request.config) if request.config else None
    model = load_model(request.checkpoint, config, device="cpu").eval().requires_grad_(False)
    config = model.config
    shape = latent_shape(request, trained, config, source.spatial)
    source.check_model(config, [*prompts, *later])
    batch = source.batch(prompts)
    check_seed(request.seed, batch)
    if device.type == "cuda":
        names = ("chunk_frames", "sink", "window", "keys", "ema", "recache")
        setting = {name: options[name] for name in names if name in options}
        setting |= {"frames": frames, "dtype": dtype, "graphs": not request.eager}
        setting |= {"batch": batch, "fp8_cache": "cache" in fp8, "fp8_linears": "linears" in fp8}
        _require_memory(config, shape[1:], setting, source if films else None, device, request.ignore_memory)

    contexts = _encode(source, prompts, later, batch, config, device)
    model = model.to(device=device, dtype=dtype)
    if "linears" in fp8:
        from raven.models.fp8 import quantize_linears

        model = quantize_linears(model)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the wider weights lay in, for the decoder's stream as well
    if "cache" in fp8:
        options["cache_dtype"] = torch.float8_e4m3fn
    graphs = False if request.eager else None
    stream = Stream(model, contexts[0], shape, max_frames=frames, graphs=graphs, **options)
    _ = stream.cache  # allocated before the files are opened, which ends what they held

    def chunks() -> Iterator[torch.Tensor]:
        where = device if device.type == "cuda" else "cpu"
        generators = [torch.Generator(where).manual_seed(request.seed + b) for b in range(batch)]
        changes = [(frame, context) for (frame, _), context in zip(switches, contexts[1:], strict=True)]
        return stream.generate(frames, levels, generator=generators, switches=changes)

    sink: Videos | LatentsFile
    if films:
        sink = Videos(_outputs(out, batch), fps, key_every=source.frames(2 * chunk) - source.frames(chunk))
    else:
        sink = LatentsFile(out, (batch, shape[0], frames, *shape[1:]))
    line = _LiveLine(frames // chunk, source.frames(frames) if films else frames, device)
    handover = Handover(source.decoder(device) if films else torch.Tensor.float, device)

    def warm_up() -> None:
        stream.warm_up(frames, levels, line.warm_up)
        if device.type == "cuda":
            handover.warm_up(torch.zeros(batch, shape[0], chunk, *shape[1:], device=device))
            source.begin()
        handover.begin()
        line.start()

    _run(warm_up, chunks, handover, sink, line)
    return sink.paths


def _require_memory(
    config: WanConfig,
    latent_size: tuple[int, int],
    setting: dict[str, Any],
    decoder: Source | None,
    device: torch.device,
    ignore: bool,
) -> None:
    """``MemoryError`` before anything is on the GPU when it has less than these arguments of ``stream_memory`` take."""
    asked = {name: setting.pop(name) for name in ("batch", "window", "fp8_cache", "fp8_linears")}

    def needed(**changes: Any) -> Estimate:
        arguments = {**asked, **changes}
        own = decoder.decoder_memory(arguments["batch"], latent_size) if decoder is not None else {}
        return stream_memory(config, latent_size=latent_size, **setting, **arguments).plus(own)

    require(needed, free_memory(device), ignore, **asked)


def _encode(
    source: Source, prompts: list[str], later: list[str], batch: int, config: WanConfig, device: torch.device
) -> list[list[torch.Tensor]]:
    """The context of the beginning, and of every switch: each prompt encoded once.

    ``ValueError`` for an encoding that is not finite, as of a text encoder that overflows: the video would be black.
    """
    if not prompts:
        return [source.encode((), config, device)]
    different = list(dict.fromkeys([*prompts, *later]))
    rows = dict(zip(different, source.encode(different, config, device), strict=True))
    for prompt, row in rows.items():
        check_finite(f"prompt: the encoding of {prompt!r}", row)
    return [[rows[prompt] for prompt in prompts], *([rows[prompt]] * batch for prompt in later)]


def _outputs(out: Path, count: int) -> list[Path]:
    """``out.mp4``, or ``out-1.mp4``, ``out-2.mp4``, ... for several videos."""
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def _run(
    warm_up: Callable[[], object],
    chunks: Callable[[], Iterator[torch.Tensor]],
    handover: Handover,
    sink: Videos | LatentsFile,
    line: _LiveLine,
) -> None:
    """Generate, decode and write side by side; whatever ends it, what is finished goes into the files first."""

    def write(done: Decoded) -> None:
        result = done.wait()
        sink.add(result)
        line.add(sink.done, done.seconds)

    try:
        writer = Writer(write)
        try:
            warm_up()
            for x in chunks():
                writer.put(handover.submit(x))
        finally:
            with _undisturbed():
                try:
                    writer.close()
                finally:
                    sink.close()
                    line.end()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Stopped: {sink.kept(line.total)}.") from stop
    except OSError as error:
        raise OSError(f"{error}; {sink.kept(line.total)}") from error
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise MemoryError(f"the GPU's memory ran out ({reason}); {sink.kept(line.total)}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the files are finished: a chunk or two are left to write."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


class _LiveLine:
    """``chunk 3/7, frame 33/81, 38.2 frames/s, newest chunk 245 ms, 9.8 GiB``, rewritten after every chunk."""

    def __init__(self, chunks: int, total: int, device: torch.device) -> None:
        self.chunks, self.total, self.device = chunks, total, device
        self._chunk = 0
        self._open = False
        self.start()

    def warm_up(self, done: int, total: int) -> None:
        """Say how far the warm-up is."""
        self._print(f"warming up, chunk {done}/{total}", done == total)

    def start(self) -> None:
        """Rates count from here."""
        self._start = time.perf_counter()

    def add(self, done: int, seconds: float) -> None:
        """One more chunk is written: frames in all, and how long the newest took."""
        self._chunk += 1
        rate = done / max(time.perf_counter() - self._start, 1e-9)
        parts = [f"chunk {self._chunk}/{self.chunks}", f"frame {done}/{self.total}", f"{rate:.1f} frames/s"]
        parts.append(f"newest chunk {1e3 * seconds:.0f} ms")
        if self.device.type == "cuda":
            parts.append(f"{torch.cuda.memory_reserved(self.device) / GIB:.1f} GiB")
        self._print(", ".join(parts), done >= self.total)

    def end(self) -> None:
        """Leave the line, so that what comes next has one of its own."""
        if self._open:
            self._print("", True)

    def _print(self, text: str, last: bool) -> None:
        lead = "\r" if text else ""
        print(f"{lead}{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        self._open = not last
