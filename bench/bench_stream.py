"""Streaming at Wan2.1-1.3B size with random weights: 480x832, chunks of 3 latent frames, 4 steps, bfloat16.

No guidance; the transformer alone, without text encoder and decoder. An 81-frame video is 7 chunks; `frames_per_s`
counts the 6 passes that encode a chunk for the next, `frames_per_s_with_last_pass` also the seventh, which the official
code runs. Windows are measured when the ring goes round: 12 video frames a chunk. Every row is refused unless chunks
replayed as CUDA graphs are, bit for bit, those of the eager mode. Rows of "cuda" use Hopper's kernels where an op has
one and Triton's elsewhere.

`first_chunk_ms` is wall time from a new video to its first chunk, after the warm-up; `chunk_ms` the same for each chunk
of a video; `idle_percent` the share of replayed chunks in which no kernel ran, from a profile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from harness import DEVICE
from torch.autograd import DeviceType
from wan_step import GIB, Size, automatic, forward_flops, random_model, random_text

from raven.models import CausalWan, WanConfig
from raven.models.fp8 import quantize_linears
from raven.schedule import sampling_levels
from raven.stream import Stream
from raven.testing import assert_bitwise, relative_rms

pytestmark = pytest.mark.usefixtures("freed")
WAN = Size()
TINY = Size(WanConfig(32, 64, 1, 2, 2, 2, 16, 4, 3, (1, 4, 4)), (2, 8, 8), (1, 1, 1), 2)
OFFICIAL = {"official_frames_per_s": 18.05}  # the official code on an H200, measured earlier
# Relative RMS between merged and separate passes, thirty blocks deep: bfloat16; float8, which rounds more coarsely.
MERGED_LIMITS = {False: 2e-2, True: 0.1}
REPEATS = 3 if DEVICE == "cuda" else 1
SEED = 3


@lru_cache(maxsize=1)  # the memory of a case is that of one model
def model_of(config: WanConfig, float8: bool) -> CausalWan:
    """The same weights for all cases, their linear layers in float8 if asked for."""
    model = random_model(config, 0).eval().requires_grad_(False)
    return quantize_linears(model) if float8 else model


class Case:
    """One stream that replays graphs (where there is a GPU) and one that does not, of the same videos."""

    def __init__(self, size: Size, prompts: int, sink: int, window: int | None, float8: bool) -> None:
        self.size, self.prompts, self.sink, self.window, self.float8 = size, prompts, sink, window, float8
        self.model = model_of(size.config, float8)
        text = random_text(size.config, prompts, torch.Generator(DEVICE).manual_seed(1)).to(self.model.dtype)
        self.options = {
            "context": self.model.encode_text(text),
            "latent_shape": size.latent,
            "chunk_frames": size.chunks[0],
            "sink": sink,
            "window": window,
            "max_frames": sum(size.chunks) if window is None else None,
            "cache_dtype": torch.float8_e4m3fn if float8 else None,
        }
        self.generator = torch.Generator(DEVICE)
        self.levels = sampling_levels(size.steps)
        self.eager = Stream(self.model, graphs=False, **self.options)
        self.graphed = Stream(self.model, graphs=DEVICE == "cuda", **self.options)

    @property
    def chunks(self) -> int:
        """Of a video, or of two turns of the ring and the way there."""
        if self.window is None:
            return len(self.size.chunks)
        return self.sink + 1 + 2 * (self.window + 2)

    @property
    def frames(self) -> int:
        """Video frames of what one measurement times: a video, or one chunk of the full ring."""
        latent = self.size.chunks[0]
        return self.prompts * (4 * latent if self.window is not None else 1 + 4 * (self.chunks * latent - 1))

    @property
    def flops(self) -> float:
        """Of the same: every chunk at every level, and once clean unless it is the last of a video."""
        tokens = self.size.chunks[0] * self.size.frame_tokens
        steps = self.size.steps

        def passes(count: int, seen: int) -> float:
            return self.prompts * count * sum(forward_flops(self.size.config, tokens, tokens * tokens * seen))

        if self.window is not None:
            return passes(steps + 1, self.sink + self.window + 1)
        return sum(passes(steps + (i + 1 < self.chunks), i + 1) for i in range(self.chunks))

    def warm_up(self) -> int:
        return self.graphed.warm_up(levels=self.levels)

    def begin(self, stream: Stream) -> None:
        stream.reset()
        self.generator.manual_seed(SEED)

    def chunk(self, stream: Stream) -> torch.Tensor:
        return next(stream.generate(self.size.chunks[0], self.levels, self.generator))

    def video(self, stream: Stream) -> torch.Tensor:
        """All chunks from the first on, joined."""
        self.begin(stream)
        return torch.cat([self.chunk(stream) for _ in range(self.chunks)], dim=2)

    def check(self) -> dict[str, float]:
        """Graphs against eager; what the eager mode computes is tested against float64 elsewhere."""
        want = self.video(self.eager)
        assert want.isfinite().all() and want.std() > 0
        assert_bitwise(self.video(self.graphed), want, "the video of the graphs")
        assert self.graphed.mode == ("graphs" if DEVICE == "cuda" else "eager"), self.graphed.mode
        return {"graphs against eager": 0.0, "merged against separate": self.merged_error()}

    def merged_error(self) -> float:
        """Of the second chunk's first velocity: relative RMS between one forward and two, which round differently."""
        found, stream = [], self.eager
        for merge in (True, False):
            self.begin(stream)
            stream.merge = merge
            stream.commit(stream.noise(self.generator), defer=True)
            found.append(stream.velocity(stream.noise(self.generator), 1.0))
        stream.merge = True
        error = relative_rms(*found)
        assert error <= MERGED_LIMITS[self.float8], f"merged passes: relative RMS difference {error:.2e}"
        return error

    def milliseconds(self, stream: Stream, repeats: int = REPEATS) -> float:
        """Of a video, or of one chunk of the full ring: the median."""
        if self.window is None:
            return statistics.median(milliseconds(lambda: self.video(stream)) for _ in range(repeats))
        self.video(stream)  # the ring is full from here on
        turn = self.window + 2
        return milliseconds(lambda: [self.chunk(stream) for _ in range(turn * repeats)]) / (turn * repeats)

    def each_chunk(self) -> tuple[list[float], float]:
        """Wall milliseconds of each chunk of a video, waited for one by one (medians), and of its last clean pass."""
        found, last = [], []
        for _ in range(REPEATS):
            self.begin(self.graphed)
            found.append([milliseconds(lambda: self.chunk(self.graphed)) for _ in range(self.chunks)])
            last.append(milliseconds(self.graphed.settle))
        # The pass is captured at its second call: the best of all is a replay.
        return [statistics.median(times) for times in zip(*found, strict=True)], min(last)

    def of_one_prompt(self) -> float:
        """Frames per second of all prompts together, divided by those of one alone; they take turns."""
        one = Case(self.size, 1, self.sink, self.window, self.float8)
        one.warm_up()
        times = [[milliseconds(partial(case.video, case.graphed)) for case in (one, self)] for _ in range(REPEATS)]
        alone, together = (statistics.median(column) for column in zip(*times, strict=True))
        return self.prompts * alone / together

    def idle_percent(self) -> float:
        """Share of replayed chunks in which no kernel ran."""
        busy_and_span(lambda: self.begin(self.graphed))  # the profiler's own start
        busy, span, _ = busy_and_span(lambda: self.video(self.graphed))
        return 100 * (1 - busy / span)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object]) -> float:
    """Wall time of work that is queued at once and waited for at its end, as a user of the stream sees it."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def busy_and_span(run: Callable[[], object]) -> tuple[float, float, dict[str, float]]:
    """Microseconds in which any kernel ran, from the first one's start to the last one's end, and of each kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize()
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    if not events:
        return 0.0, 0.0, {}
    ranges = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, reached = 0.0, ranges[0][0]
    for begin, end in ranges:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    kernels: dict[str, float] = {}
    for event in events:
        kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.end - event.time_range.start
    return busy, reached - ranges[0][0], kernels


def measure(bench, name: str, size: Size = WAN, prompts=1, sink=0, window=None, float8=False) -> None:
    backend = automatic(size)
    case, record = Case(size, prompts, sink, window, float8), {}

    def check() -> dict[str, float]:
        bench.progress(f"{name}, {backend}: warm-up")
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        record["warm_up_s"] = milliseconds(case.warm_up) / 1e3
        record["graphs"] = case.warm_up()
        case.video(case.graphed)
        if DEVICE == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated() / GIB  # before the eager stream has its cache
        return case.check()

    def timed() -> float:
        ms = case.milliseconds(case.graphed)
        record["frames_per_s"] = 1e3 * case.frames / ms
        record["eager_frames_per_s"] = 1e3 * case.frames / case.milliseconds(case.eager, 1)
        if window is None:
            record["chunk_ms"], last = case.each_chunk()
            record["frames_per_s_with_last_pass"] = 1e3 * case.frames / (ms + last)
            record["first_chunk_ms"] = record["chunk_ms"][0]
        if DEVICE == "cuda":
            record["idle_percent"] = case.idle_percent()
        if prompts > 1:
            record["of_one_prompt"] = case.of_one_prompt()
        figures = {key: value for key, value in record.items() if not isinstance(value, list)}
        bench.progress(f"{name}, {backend}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        return ms

    bench.row(
        op="stream",
        case=name,
        direction="forward",
        backend=backend,
        check=check,
        measure=timed,
        work=case.flops,
        unit="TFLOP/s",
        extra=lambda: record | (OFFICIAL if size is WAN and prompts == 1 and window is None else {}),
    )


@pytest.mark.gpu
def test_full_history(bench):
    measure(bench, "full-history")


@pytest.mark.gpu
def test_sink_and_window(bench):
    """LongLive's setting: a sink of 3 latent frames, and 9 recent ones with the chunk in flight."""
    measure(bench, "sink-1-window-2", sink=1, window=2)


@pytest.mark.gpu
def test_two_prompts(bench):
    measure(bench, "two-prompts", prompts=2)


@pytest.mark.gpu
@pytest.mark.parametrize("sink, window, name", [(0, None, "full-history-fp8"), (1, 2, "sink-1-window-2-fp8")])
def test_float8(bench, sink, window, name):
    measure(bench, name, sink=sink, window=window, float8=True)


@pytest.mark.parametrize("prompts, sink, window", [(1, 0, None), (2, 1, 1)])
def test_smoke(bench, prompts, sink, window):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, f"smoke-{prompts}", TINY, prompts, sink, window)
