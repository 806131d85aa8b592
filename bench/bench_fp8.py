"""What float8 costs in error and gains in time and memory: the cache, the linear layers, and both.

Three kinds of rows:
- `linear-*`: a linear layer at Wan 1.3B's sizes with the quantisation of its input, beside bfloat16.
- `wan-1.3b-*`: a forward at 480x832 with 3 chunks of history, random weights: error of the velocity and, block by
  block, of the residual stream, against the same weights in float32.
- `demo-*`: the demo's trained model on videos of its world, so real activations: error of the velocity against float32
  and bfloat16 at every chunk and level, and what the world's metrics say about videos sampled with each option.

`raven bench fp8` writes them like every bench.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from harness import DEVICE

import raven
from raven.cache import KVCache
from raven.checkpoint import load_model
from raven.demo.evaluate import noise_generators
from raven.demo.stages import ASSETS
from raven.models import CausalWan, WanConfig
from raven.models.fp8 import Float8Linear, quantize_linears
from raven.ops import quantize_rows
from raven.schedule import sampling_levels
from raven.stream import Stream
from raven.testing import relative_rms
from raven.worlds import Shapes

FLOAT8 = torch.float8_e4m3fn
OPTIONS = {"bfloat16": (), "cache": ("cache",), "linears": ("linears",), "cache-linears": ("cache", "linears")}
LEVELS = sampling_levels(4).tolist()
METRICS = ("quality", "semantic", "dynamic")
# Most that float8 may do to a velocity (relative RMS): three mantissa bits, a hundred products deep.
LIMIT = 0.15


@pytest.fixture
def automatic(bench):
    """Whole models run on what is fastest for each op, so once and not once per backend."""
    if raven.get_backend() == "cuda":
        pytest.skip("measured once, with the automatic choice of backends")
    raven.set_backend(None)
    return bench


# Linear layers


def measure_linear(bench, tokens, channels, outputs, gelu=False, dtype=torch.bfloat16):
    x = torch.randn(1, tokens, channels, device=DEVICE, dtype=dtype)
    linear = torch.nn.Linear(channels, outputs, device=DEVICE, dtype=dtype).requires_grad_(False)
    layer = Float8Linear(linear)

    def run():
        return layer.product(*quantize_rows(x, gelu), dtype)

    def in_dtype():
        return linear(torch.nn.functional.gelu(x, approximate="tanh") if gelu else x)

    def check():
        """Against the same float8 numbers in float64 the product is as exact as bfloat16 is; and the whole error."""
        stored, scale = quantize_rows(x, gelu)
        value, weight = stored.double() * scale.double().unsqueeze(-1), layer.weight.double() * layer.scale[:, None]
        error = relative_rms(run(), torch.nn.functional.linear(value, weight, linear.bias.double()))
        assert error <= 4e-3, f"relative RMS error {error:.2e} of the product"
        exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
        want = torch.nn.functional.linear(exact, linear.weight.double(), linear.bias.double())
        return {"product": error, "float8": relative_rms(run(), want), "bfloat16": relative_rms(in_dtype(), want)}

    bench.row(
        op="fp8",
        case=f"linear-{tokens}x{outputs}x{channels}{'-gelu' * gelu}",
        direction="forward",
        backend=raven.explain("quantize_rows", x).chosen,
        check=check,
        run=run,
        work=2 * tokens * channels * outputs,
        unit="TFLOP/s",
        peers={"bfloat16": in_dtype},
        graph=DEVICE == "cuda",
        extra={"weight_bytes": layer.nbytes, "bfloat16_weight_bytes": 2 * (channels + 1) * outputs},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4680, 9360])
@pytest.mark.parametrize(("channels", "outputs"), [(1536, 1536), (1536, 4608), (1536, 8960), (8960, 1536)])
def test_linear(bench, tokens, channels, outputs):
    measure_linear(bench, tokens, channels, outputs, gelu=channels == 8960)


# Whole models


def teacher_forced(model, text, video, option, chunk_frames=3, levels=LEVELS) -> Iterator[tuple[str, torch.Tensor]]:
    """Velocities of every chunk at every level with the clean chunks before it as history; yields (name, velocity)."""
    batch, _, frames, height, width = video.shape
    tokens = chunk_frames * (height // model.config.patch_size[1]) * (width // model.config.patch_size[2])
    config = model.config
    cache = KVCache(
        config.num_layers, batch, config.num_heads, config.head_dim, tokens,
        max_chunks=frames // chunk_frames, device=DEVICE, dtype=cache_dtype(model, option),
    )  # fmt: skip
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(5)).to(video)
    for chunk, frame in enumerate(range(0, frames, chunk_frames)):
        x, e = (v[:, :, frame : frame + chunk_frames] for v in (video, noise))
        for level in levels:
            yield (
                f"chunk-{chunk}-level-{level:.3f}",
                model((1 - level) * x + level * e, level, text, cache=cache, frame=frame),
            )
        if frame + chunk_frames < frames:
            model(x, 0.0, text, cache=cache, frame=frame, write_only=True)
            cache.commit()


def variant(model: CausalWan, option: str) -> CausalWan:
    """A bfloat16 copy of the float32 model, its linear layers as ``option`` says."""
    made = copy.deepcopy(model).to(torch.bfloat16)
    return quantize_linears(made) if "linears" in OPTIONS[option] else made


def cache_dtype(model: CausalWan, option: str | None) -> torch.dtype:
    """The model's, or float8; ``None`` is no option at all."""
    return FLOAT8 if "cache" in OPTIONS.get(option, ()) else model.dtype


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def flops(config: WanConfig, tokens: int, keys: int) -> int:
    """Of the blocks' matrix products and attention for one video."""
    linears = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    return 2 * config.num_layers * tokens * (linears + 2 * config.dim * (keys + config.text_len))


def model_row(bench, case, option, run, check, work, extra):
    """A row of a whole model, under the backend of its attention."""
    q = torch.empty(1, 16, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    backend = raven.explain("chunk_attention", q, q, q).chosen
    bench.row(
        op="fp8",
        case=f"{case}-{option}",
        direction="forward",
        backend=backend,
        check=check,
        run=run,
        work=work,
        unit="TFLOP/s",
        extra=extra,
    )


# The trained model of the demo


@lru_cache(maxsize=2)
def demo_model(name: str) -> CausalWan:
    return load_model(ASSETS / f"{name}.safetensors", device=DEVICE, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def demo_errors(option: str, videos: int) -> dict[str, float]:
    """Relative RMS errors of all velocities, and of the worst chunk and level, against float32 and bfloat16."""
    model, world = demo_model("start"), Shapes()
    batch = world.sample(videos, 12, seed=77, device=DEVICE)
    text = world.encode(batch.prompts, device=DEVICE)
    exact = dict(teacher_forced(model, text, batch.video, None))
    plain = dict(teacher_forced(variant(model, "bfloat16"), text, batch.video, None))
    got = dict(teacher_forced(variant(model, option), text, batch.video, option))
    every = [torch.cat([run[name].flatten() for name in got]) for run in (got, exact, plain)]
    errors = {name: relative_rms(got[name], exact[name]) for name in got}
    return {
        "against_float32": relative_rms(every[0], every[1]),
        "against_bfloat16": relative_rms(every[0], every[2]),
        "worst_against_float32": max(errors.values()),
    }


@torch.no_grad()
def demo_scores(option: str, prompts: int, seeds: int, frames: int = 24, steps: int = 16) -> dict[str, float]:
    """Mean scores, and the spread of the seeds' means, of streamed videos; same prompts and noise for every option."""
    world = Shapes()
    model = variant(demo_model("start"), option)
    chosen, means = world.prompts(prompts, seed=990_000), {metric: [] for metric in METRICS}
    for seed in range(1, seeds + 1):
        text = world.encode(chosen, device=DEVICE)
        stream = Stream(
            model, text, (3, 32, 32), 3, max_frames=frames, graphs=False, cache_dtype=cache_dtype(model, option)
        )
        noise = noise_generators(range(prompts), seed)
        chunks = stream.generate(frames, sampling_levels(steps, 3.0), generator=noise, sampler="ode")
        scores = world.score(torch.cat([chunk.float() for chunk in chunks], dim=2), chosen, 3)
        for metric in METRICS:
            means[metric].append(float(getattr(scores, metric).mean()))
    result = {metric: statistics.fmean(values) for metric, values in means.items()}
    return result | {f"{metric}_spread": statistics.pstdev(values) for metric, values in means.items()}


def measure_demo(bench, case, option, videos, prompts, seeds, **sampling):
    model = variant(demo_model("start"), option)
    world = Shapes()
    text = model.encode_text(world.encode(world.prompts(videos), device=DEVICE))
    x = torch.randn(videos, 3, 3, 32, 32, device=DEVICE)
    config = model.config
    cache = KVCache(
        config.num_layers, videos, config.num_heads, config.head_dim, 192,
        max_chunks=1, device=DEVICE, dtype=cache_dtype(model, option),
    )  # fmt: skip

    def check():
        errors = demo_errors(option, videos)
        assert errors["against_float32"] <= LIMIT, errors
        return errors

    @torch.no_grad()
    def run():
        return model(x, 0.5, text, cache=cache)

    sampled = demo_scores(option, prompts, seeds, **sampling)
    extra = {"scores": sampled, "videos": prompts * seeds, "weight_bytes": weight_bytes(model)}
    model_row(bench, case, option, run, check, videos * flops(config, 192, 192), extra)


@pytest.mark.gpu
@pytest.mark.parametrize("option", OPTIONS)
def test_demo(automatic, option):
    measure_demo(automatic, "demo-tiny-start", option, videos=32, prompts=32, seeds=4)


def test_smoke_linear(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure_linear(bench, 16, 48, 32, gelu=True, dtype=torch.float32)


def test_smoke_demo(bench):
    measure_demo(bench, "demo-smoke", "cache-linears", videos=1, prompts=1, seeds=1, frames=3, steps=1)


# The size of Wan 1.3B


@dataclass(frozen=True)
class Wan:
    """A size of the transformer, and latents of 4 chunks for it."""

    name: str
    config: WanConfig
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return 3 * self.height * self.width // 4


FULL = Wan("wan-1.3b", WanConfig(), 60, 104)
TINY = Wan("wan-smoke", WanConfig(32, 64, 2, 2, 2, 2, 16, 4, 3), 4, 4)


@lru_cache(maxsize=1)
def wan_model(config: WanConfig) -> CausalWan:
    with torch.device(DEVICE):
        model = CausalWan(config).requires_grad_(False)
    model.head.head.weight.normal_(std=0.02)  # Wan's own start is zero: a velocity without error
    return model


@torch.no_grad()
def wan_run(model, option, video, text) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The velocity of the last chunk and the residual stream after every block."""
    blocks: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: blocks.append(out)) for block in model.blocks]
    try:
        for _, velocity in teacher_forced(model, text, video, option, levels=LEVELS[1:2]):
            last = velocity, blocks[-len(hooks) :]
            blocks.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return last


@lru_cache(maxsize=1)
def wan_exact(size: Wan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Latents, prompt, and what plain PyTorch in float32 makes of them."""
    config = size.config
    video = torch.randn(1, config.in_dim, 12, size.height, size.width, device=DEVICE)
    text = torch.randn(1, config.text_len, config.text_dim, device=DEVICE)
    chosen = raven.get_backend()
    raven.set_backend("reference")
    try:
        return video, text, *wan_run(wan_model(config), None, video, text)
    finally:
        raven.set_backend(chosen)


@torch.no_grad()
def measure_wan(bench, size, option):
    config = size.config
    video, text, exact, exact_blocks = wan_exact(size)
    model = variant(wan_model(config), option)
    encoded = model.encode_text(text)
    cache = KVCache(
        config.num_layers, 1, config.num_heads, config.head_dim, size.tokens,
        max_chunks=4, device=DEVICE, dtype=cache_dtype(model, option),
    )  # fmt: skip
    chunk = video[:, :, :3].to(torch.bfloat16)
    for i in range(3):
        model(chunk, 0.0, encoded, cache=cache, frame=3 * i, write_only=True)
        cache.commit()
    by_block: list[float] = []

    @torch.no_grad()
    def run():
        return model(chunk, 0.9, encoded, cache=cache, frame=9)

    def check():
        velocity, blocks = wan_run(model, option, video, encoded)
        by_block.extend(relative_rms(got, want) for got, want in zip(blocks, exact_blocks, strict=True))
        error = relative_rms(velocity, exact)
        assert error <= LIMIT, f"relative RMS error {error:.3f} of the velocity"
        return {"velocity": error, "first_block": by_block[0], "last_block": by_block[-1]}

    def extra():
        return {"error_by_block": list(by_block), "weight_bytes": weight_bytes(model), "cache_bytes": cache.nbytes}

    work = flops(config, size.tokens, 4 * size.tokens)
    model_row(bench, f"{size.name}-keys-{4 * size.tokens}", option, run, check, work, extra)


@pytest.mark.gpu
@pytest.mark.parametrize("option", OPTIONS)
def test_wan_1_3b(automatic, option):
    measure_wan(automatic, FULL, option)


def test_smoke_wan(bench):
    measure_wan(bench, TINY, "cache-linears")
