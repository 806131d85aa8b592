"""Ten thousand latent frames on a small model: time per chunk and memory, from beginning to end; and what it costs.

One row for each rule of the cache that a video without an end can use. A row's ``ms`` is the median chunk, four steps
and the commit, at the end of the video; ``blocks`` holds what was measured on the way, for every ``every`` chunks:
frames so far, milliseconds a chunk, bytes that tensors hold and that the allocator took, resident bytes of the process,
and how many objects Python's collector tracks. The row is refused when any of it grows, or when the last chunks are not
what a stream without graphs gives.

The rows of Wan2.1-1.3B's size (480x832) say what raw keys and a blended sink cost beside rotated keys.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from harness import DEVICE
from wan_step import Size, automatic, random_model, random_text

from raven import native
from raven.backends import get_backend
from raven.models import CausalWan, WanConfig
from raven.presets import preset
from raven.stream import Stream
from raven.testing import relative_rms

pytestmark = pytest.mark.usefixtures("freed")
WAN = Size()
SMALL = Size(WanConfig(256, 1024, 2, 4, text_dim=64, text_len=16), (16, 16, 16))
TINY = Size(WanConfig(32, 64, 1, 1, 2, 2, 16, 4, 3), (2, 4, 4))
RULES = ("longlive", "longlive_inf", "reward_forcing")
# How much later blocks may exceed earlier ones: clocks and other processes of the machine move times by a few percent.
GROWTH = {"ms": 1.10, "allocated": 1.0, "reserved": 1.0, "resident": 1.01, "objects": 1.001}


def resident_bytes() -> int:
    """Of this process now; at most, where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@lru_cache(maxsize=1)
def model_of(size: Size) -> CausalWan:
    return random_model(size.config, 1, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


class LongVideo:
    """A stream of one of ``RULES``, measured in blocks of chunks."""

    def __init__(self, size: Size, rule: str, frames: int, blocks: int) -> None:
        self.size, self.rule = size, rule
        self.model = model_of(size)
        self.text = random_text(size.config, 1, torch.Generator(DEVICE).manual_seed(2))
        self.stream = self.make()
        self.chunk = self.stream.sizes[-1]
        self.every = -(-frames // (self.chunk * blocks))
        self.count = blocks
        self.blocks: list[dict[str, float]] = []

    def make(self, **options) -> Stream:
        generator = torch.Generator(DEVICE).manual_seed(3)
        return Stream(
            self.model, self.text, self.size.latent, generator=generator, **preset(self.rule, recache=0, **options)
        )

    def check(self) -> float:
        """Two turns of the ring with graphs and merged passes, against separate passes without graphs."""
        plain, count = self.make(merge=False, graphs=False), 2 * self.stream.cache.num_slots
        want = torch.cat(list(plain.generate(count * self.chunk)), dim=2)
        self.stream.warm_up()
        got = torch.cat(list(self.stream.generate(count * self.chunk)), dim=2)
        error = relative_rms(got, want)
        assert error <= (0.1 if got.is_cuda else 1e-3), f"relative RMS {error:.2e} from the stream without graphs"
        return error

    def run(self) -> float:
        """Milliseconds of a chunk at the end; fills ``blocks``. ``check`` comes first."""
        chunks = self.stream.generate()
        for _ in range(self.count):
            gc.collect()
            self._synchronize()
            start = time.perf_counter()
            for _ in range(self.every):
                last = next(chunks)
            self._synchronize()
            spent = time.perf_counter() - start
            assert last.isfinite().all()
            self.blocks.append(
                {
                    "frames": self.stream.frame,
                    "ms": 1e3 * spent / self.every,
                    "allocated": torch.cuda.memory_allocated() if DEVICE == "cuda" else 0,
                    "reserved": torch.cuda.memory_reserved() if DEVICE == "cuda" else 0,
                    "resident": resident_bytes(),
                    "objects": len(gc.get_objects()),
                }
            )
        return self.ms

    @property
    def ms(self) -> float:
        """Milliseconds of a chunk at the end."""
        return statistics.median(block["ms"] for block in self.blocks[-max(1, self.count // 4) :])

    def _synchronize(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def growth(self) -> dict[str, float]:
        """The last quarter of the blocks over the first; the very first block does not count.

        Of memory the median, of time the fastest block: a host that others use too only ever makes one slower.
        """
        quarter = max(1, self.count // 4)
        found = {}
        for name in GROWTH:
            values = [block[name] for block in self.blocks[1:]]
            of = min if name == "ms" else statistics.median
            early, late = of(values[:quarter]), of(values[-quarter:])
            found[name] = late / early if early else 1.0
        return found

    def assert_flat(self) -> None:
        for name, ratio in self.growth().items():
            course = [block[name] for block in self.blocks[:: max(1, self.count // 8)]]
            assert ratio <= GROWTH[name], f"{name} grew by a factor of {ratio:.4f}: {course}"

    @property
    def flops(self) -> float:
        """Useful operations of one chunk: every matrix product and attention of four steps and the clean pass."""
        config, tokens = self.size.config, self.chunk * self.size.frame_tokens
        cache = self.stream.cache
        keys = tokens * (cache.sink + (cache.window or 0) + 1)
        linear = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
        attention = 4 * tokens * config.dim * (keys + config.text_len)
        return 5 * config.num_layers * (linear + attention)


def measure(bench, size, rule, frames, blocks, flat=True):
    if get_backend() == "triton" and native.unavailable() is None:
        pytest.skip("where the compiled library is, its rows say it all")
    backend = automatic(size)
    video = LongVideo(size, rule, frames, blocks)

    def run() -> float:
        ms = video.run()
        if flat:
            video.assert_flat()
        return ms

    bench.row(
        op="long",
        case=f"{rule}-{frames}" + ("-wan-1.3b" if size is WAN else ""),
        direction="forward",
        backend=backend,
        check=video.check,
        measure=run,
        work=video.flops,
        unit="TFLOP/s",
        extra=lambda: {
            "frames": video.stream.frame,
            "latent_frames_per_s": 1e3 * video.chunk / video.ms,
            "mode": video.stream.mode,
            "cache_bytes": video.stream.cache.nbytes,
            "growth": video.growth(),
            "time_growth": video.growth()["ms"],
            "memory_growth": max(video.growth()[name] for name in ("allocated", "reserved", "resident")),
            "every": video.every,
            "blocks": video.blocks,
        },
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_frames(bench, rule):
    measure(bench, SMALL, rule, 10_000, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_wan_size(bench, rule):
    measure(bench, WAN, rule, 45, 3, flat=False)


@pytest.mark.parametrize("rule", RULES)
def test_smoke(bench, rule):
    """Small enough for any machine, and the same code path."""
    measure(bench, TINY, rule, 60, 4, flat=False)
