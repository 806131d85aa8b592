"""What the benches of whole training steps share: random models on the device, work counts, errors of a small slice."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from harness import DEVICE

import raven
from raven.backends import get_backend
from raven.layout import ChunkLayout
from raven.models import CausalWan, WanConfig
from raven.ops import chunk_attention
from raven.repack import repacked_forward
from raven.testing import Tolerance, assert_as_accurate, relative_rms

GIB = 2**30
# Two blocks in bfloat16 with every backend: velocity and gradient have about half of this error.
SLICE = Tolerance(rms=1e-2, factor=2.0)


@dataclass(frozen=True)
class Size:
    """A model and the latents it is trained on; ``steps`` are the passes of a rollout at each chunk's noise levels."""

    config: WanConfig = WanConfig()  # noqa: RUF009 (frozen)
    latent: tuple[int, int, int] = (16, 60, 104)  # 480x832
    chunks: tuple[int, ...] = (3,) * 7  # 81 frames
    steps: int = 4

    @property
    def grid(self) -> tuple[int, int]:
        _, rows, columns = self.config.patch_size
        return self.latent[1] // rows, self.latent[2] // columns

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def video_tokens(self) -> int:
        return sum(self.chunks) * self.frame_tokens

    @cached_property
    def layout(self) -> ChunkLayout:
        return ChunkLayout.repacked(self.chunks, self.frame_tokens)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        channels, rows, columns = self.latent
        return channels, sum(self.chunks), rows, columns

    def slice(self) -> Size:
        """Two blocks on the first three chunks: the same kernels and segments, and small enough for float64."""
        return replace(self, config=replace(self.config, num_layers=2), chunks=self.chunks[:3])


def forward_flops(config: WanConfig, tokens: int, pairs: int, last: int | None = None) -> tuple[float, float]:
    """Operations of one forward in its (matrix products, attention): ``pairs`` are a layer's visible ones.

    ``last``: tokens that go on after the last block's self-attention.
    """
    d, layers = config.dim, config.num_layers
    last = tokens if last is None else last
    after = 2 * d * (3 * d + 2 * config.ffn_dim)  # output, the text's query and output, MLP
    linear = layers * 6 * d * d * tokens + after * ((layers - 1) * tokens + last)
    linear += layers * 4 * d * d * config.text_len + 2 * d * (config.text_dim + d) * config.text_len
    text = 4 * d * config.text_len * ((layers - 1) * tokens + last)
    return linear, 4 * d * pairs * layers + text


def with_backward(flops: tuple[float, float]) -> float:
    """Operations of forward and backward, without what is recomputed."""
    return 3 * flops[0] + 3.5 * flops[1]


def repacked_flops(size: Size) -> tuple[float, float]:
    return forward_flops(size.config, size.layout.length, size.layout.spans.pairs, size.video_tokens)


def bidirectional_flops(size: Size) -> tuple[float, float]:
    return forward_flops(size.config, size.video_tokens, size.video_tokens**2)


def rollout_flops(size: Size) -> float:
    """Every chunk at every level, and its clean pass unless it is the last."""
    total, seen = 0.0, 0
    for i, frames in enumerate(size.chunks):
        tokens = frames * size.frame_tokens
        seen += tokens
        total += (size.steps + (i + 1 < len(size.chunks))) * sum(forward_flops(size.config, tokens, tokens * seen))
    return total


def random_model(config: WanConfig, seed: int, dtype: torch.dtype = torch.bfloat16) -> CausalWan:
    """Random weights made on the device, with a head that is not zero, so that every weight has a gradient."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = CausalWan(config)
        torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return model.to(dtype)


def random_text(config: WanConfig, count: int, generator: torch.Generator) -> torch.Tensor:
    """Prompt embeddings ``[count, text_len, text_dim]`` float32."""
    shape = (count, config.text_len, config.text_dim)
    return 0.2 * torch.randn(shape, generator=generator, device=generator.device)


class Inputs:
    """A repacked step of one sample: noisy states, end points, a level, a text, and the gradient of the velocity."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(DEVICE).manual_seed(5)
        draws = [torch.randn(1, *size.shape, generator=generator, device=DEVICE) for _ in range(3)]
        text = random_text(size.config, 1, generator)
        # Numbers that every precision holds.
        self.x_t, self.x_0, self.grad, self.text = (x.bfloat16().to(dtype) for x in (*draws, text))
        self.size = size

    def forward(self, model: CausalWan) -> torch.Tensor:
        return repacked_forward(model, self.x_t, self.x_0, 0.625, self.text, self.size.chunks)


@contextmanager
def chosen(backend: str):
    """One backend for every op meanwhile."""
    previous = get_backend()
    raven.set_backend(backend)
    try:
        yield
    finally:
        raven.set_backend(previous)


def automatic(size: Size) -> str:
    """The name of what runs here. "cuda" asks for the automatic choice: Hopper's kernels, and Triton's where an op has
    no others. ``BackendUnavailableError`` when not even the attention would run on it."""
    if get_backend() == "cuda":
        config = size.config
        q = torch.empty(1, 1, config.num_heads, config.head_dim, dtype=torch.bfloat16, device=DEVICE)
        chunk_attention(q, q, q, ChunkLayout.bidirectional(1, 1))  # raises with the reason
        raven.set_backend(None)
        return "cuda"
    return get_backend() or "reference"


def slice_errors(size: Size, mode: str) -> dict[str, float]:
    """Errors of velocity and gradients of ``size.slice()`` against the reference backend in float64.

    Asserts that they are at most twice those of the reference backend in bfloat16: all gradients as one, and every
    matrix by itself.
    """
    small = size.slice()
    model = random_model(small.config, 1)

    def results(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.to(dtype).zero_grad(set_to_none=True)
        inputs = Inputs(small, torch.float64 if dtype == torch.float64 else torch.float32)
        v = inputs.forward(model)
        v.backward(inputs.grad)
        return v.detach(), {name: p.grad for name, p in model.named_parameters()}

    with chosen("reference"):
        baseline, base = results(torch.bfloat16)
        wanted, want = results(torch.float64)
    model.gradient_checkpointing = mode
    got, grads = results(torch.bfloat16)
    errors = {"velocity": assert_as_accurate(got, wanted, baseline, SLICE, "velocity")}
    flat = [torch.cat([g.flatten().double() for g in part.values()]) for part in (grads, want, base)]
    errors["gradient"] = assert_as_accurate(*flat, SLICE, "gradient")
    matrices = {name: relative_rms(g, want[name]) for name, g in grads.items() if g.ndim >= 2}
    for name in matrices:
        assert_as_accurate(grads[name], want[name], base[name], replace(SLICE, rms=1.0), f"gradient of {name}")
    errors["gradient of the worst matrix"] = max(matrices.values())
    return errors


def assert_finite(what: str, tensors: Sequence[torch.Tensor | None]) -> float:
    """Assert that there is every tensor, all numbers are finite, and not all are zero; returns the 2-norm."""
    missing = sum(t is None for t in tensors)
    assert not missing and tensors, f"{what}: {missing} of {len(tensors)} are missing"
    norm = float(torch.stack(torch._foreach_norm([t.detach() for t in tensors])).float().norm())
    assert 0 < norm < float("inf"), f"{what}: norm {norm}, expected a finite one above 0"
    return norm


def peak_gib(run: Callable[[], object]) -> float | None:
    """Most GPU memory held at once while ``run`` runs, weights and everything else included, in GiB."""
    if DEVICE != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB


def median_of(records: Sequence[dict], key: str = "ms") -> dict:
    """The record in the middle (the faster one of two)."""
    middle = statistics.median_low([record[key] for record in records])
    return next(record for record in records if record[key] == middle)
