"""Log-density of a consistency step on Wan latents, 21 frames at 480x832: [B, 16, 21, 60, 104] in float32.

Bytes that must move: a forward alone reads three tensors; one whose backward follows also writes the velocity's
gradient for a gradient of 1, which the backward reads and writes once more.
"""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from harness import DEVICE

from raven import explain
from raven.ops import gaussian_log_prob
from raven.reference.gaussian_log_prob import gaussian_log_prob as reference
from raven.testing import assert_bitwise, relative_rms, time_ms

WAN = (16, 21, 60, 104)
CHUNKS = (3,) * 7


def eager(v, x_t, x_s, t, s):
    """As a training script writes it."""
    t, s = t.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)
    mean = (1 - s) * (x_t - t * v)
    log_prob = -((x_s - mean) ** 2) / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).sum(1)


compiled = torch.compile(eager, dynamic=False)


class Case:
    """Inputs of one size, and the checks that come before any timing."""

    def __init__(self, samples: int, shape: tuple[int, ...], chunk_frames: tuple[int, ...] | None) -> None:
        self.chunk_frames = chunk_frames
        generator = torch.Generator(DEVICE).manual_seed(samples)
        draw = dict(device=DEVICE, generator=generator)
        self.v, self.x_t, noise = (torch.randn(samples, *shape, **draw) for _ in range(3))
        self.v.requires_grad_()
        self.t = torch.full((samples,), 0.833, device=DEVICE)
        self.s = 0.2 + 0.7 * torch.rand(samples, **draw)
        s, t = (level.view(-1, 1, 1, 1, 1) for level in (self.s, self.t))
        self.x_s = (1 - s) * (self.x_t - t * self.v.detach()) + s * noise
        self.levels = (self.t, self.s)
        if chunk_frames is not None:
            self.levels = tuple(x[:, None].expand(-1, len(chunk_frames)).contiguous() for x in self.levels)
        self.grad = (
            torch.randn(samples, **draw) if chunk_frames is None else torch.randn(samples, len(chunk_frames), **draw)
        )

    def log_prob(self) -> torch.Tensor:
        return gaussian_log_prob(self.v, self.x_t, self.x_s, *self.levels, self.chunk_frames)

    def gradient(self, log_prob: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
        return torch.autograd.grad(log_prob, self.v, self.grad if grad is None else grad)[0]

    def check(self) -> dict[str, float]:
        """Against float64, sample by sample; and the last sample alone gives the bits it gives in the batch."""
        got = self.log_prob()
        d_v = self.gradient(got)
        worst, worst_grad = 0.0, 0.0
        for b in range(len(self.v)):
            one = slice(b, b + 1)
            v, x_t, x_s = (x[one].detach().double() for x in (self.v, self.x_t, self.x_s))
            levels = [x[one].double() for x in self.levels]
            v.requires_grad_()
            want = reference(v, x_t, x_s, *levels, self.chunk_frames)
            (want_grad,) = torch.autograd.grad(want, v, self.grad[one].double())
            # Every term of the sum is negative but d log s: the sum of absolute terms is at least this.
            size = want.abs() + v[0].numel() / want.numel() * levels[1].log().abs().reshape(want.shape)
            worst = max(worst, float(((got[one] - want).abs() / size).detach().max()))
            worst_grad = max(worst_grad, relative_rms(d_v[one], want_grad))
        assert worst <= 1e-6, f"log-density: error {worst:.2e} of the sum of absolute terms, expected at most 1e-6"
        assert worst_grad <= 1e-6, f"gradient: relative RMS error {worst_grad:.2e}, expected at most 1e-6"
        alone = gaussian_log_prob(
            *(x[-1:] for x in (self.v, self.x_t, self.x_s)), *(x[-1:] for x in self.levels), self.chunk_frames
        )
        assert_bitwise(alone, got[-1:], "the last sample alone")
        return {"forward": worst, "backward": worst_grad}


@lru_cache(maxsize=1)
def case_of(samples: int, shape: tuple[int, ...], chunk_frames: tuple[int, ...] | None) -> Case:
    return Case(samples, shape, chunk_frames)


def measure(bench, name, direction, samples, shape, chunk_frames, peers=True):
    case = case_of(samples, shape, chunk_frames)
    inputs = (case.v, case.x_t, case.x_s, case.t, case.s)
    # Device time alone, for everybody; a captured backward needs its forward in the same capture.
    graph = inputs[0].is_cuda and direction != "backward"

    def forward(f):
        with torch.no_grad():
            return f()

    def backward(f):
        out = f()
        return lambda: torch.autograd.grad(out, case.v, case.grad, retain_graph=True)

    def job(f):
        if direction == "forward":
            return lambda: forward(f)
        return backward(f) if direction == "backward" else lambda: case.gradient(f())

    others = {"eager": lambda: eager(*inputs), "torch.compile": lambda: compiled(*inputs)} if peers else {}
    tensors = {"forward": 3, "backward": 2, "forward+backward": 6}[direction]
    run = job(case.log_prob)
    bench.row(
        op="gaussian_log_prob",
        case=name,
        direction=direction,
        backend=explain("gaussian_log_prob", *inputs[:3]).chosen,
        check=case.check,
        run=run,
        work=tensors * case.v.nbytes,
        unit="TB/s",
        peers={peer: job(f) for peer, f in others.items()},
        graph=graph,
        # With the host's time: what a caller without a graph sees where the launches outlast the work.
        extra={f"{who}_events_ms": time_ms(job(f), DEVICE) for who, f in {"raven": case.log_prob, **others}.items()}
        if graph and samples <= 4
        else None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("samples", [4, 64])
def test_samples(bench, samples, direction):
    if samples == 4 and direction == "backward":
        pytest.skip("the launches of a backward alone outlast its work")
    measure(bench, f"samples-{samples}", direction, samples, WAN, None)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_frames", [CHUNKS, (1, 4, 4, 4, 4, 4)], ids=["equal", "ragged"])
def test_chunks(bench, chunk_frames):
    name = f"samples-64-chunks-{len(chunk_frames)}"
    measure(bench, name, "forward+backward", 64, WAN, chunk_frames, peers=False)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "samples-2-smoke", "forward+backward", 2, (4, 4, 8, 8), (2, 2), peers=False)
