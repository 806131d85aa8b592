"""Policy loss of a consistency step with its gradient, on Wan latents of 21 frames at 480x832: [B, 16, 21, 60, 104].

Bytes that must move: velocity, state and next state are read, and the velocity's gradient is written.
"""

from __future__ import annotations

import pytest
import torch
from bench_gaussian_log_prob import CHUNKS, WAN, eager
from harness import DEVICE

from raven import explain
from raven.losses import chunk_weights, reinforce_loss
from raven.ops import gaussian_log_prob, policy_loss
from raven.reference.policy_loss import policy_loss as reference
from raven.testing import relative_rms, time_ms


def eager_loss(v, x_t, x_s, t, s, advantages):
    """As a training script writes it, without chunks."""
    return -100 * (advantages * eager(v, x_t, x_s, t, s) / v[0].numel()).mean()


compiled_loss = torch.compile(eager_loss, dynamic=False)


class Case:
    """Inputs of one size, and the checks that come before any timing."""

    def __init__(self, samples, shape, chunk_frames, dtype):
        self.chunk_frames = chunk_frames
        self.weights = None if chunk_frames is None else tuple(chunk_weights(chunk_frames, -1).tolist())
        generator = torch.Generator(DEVICE).manual_seed(samples)
        draw = dict(device=DEVICE, generator=generator)
        v, self.x_t, noise = (torch.randn(samples, *shape, **draw) for _ in range(3))
        self.v = v.to(dtype).requires_grad_()
        self.t = torch.full((samples,), 0.833, device=DEVICE)
        self.s = 0.2 + 0.7 * torch.rand(samples, **draw)
        s, t = (level.view(-1, 1, 1, 1, 1) for level in (self.s, self.t))
        self.x_s = (1 - s) * (self.x_t - t * v.detach()) + s * noise
        self.advantages = torch.randn(samples, **draw)
        self.inputs = (self.v, self.x_t, self.x_s, self.t, self.s, self.advantages)

    def loss(self):
        return policy_loss(*self.inputs, self.chunk_frames, self.weights)

    def unfused(self):
        frames = self.chunk_frames or (self.v.shape[2],)
        log_prob = gaussian_log_prob(*self.inputs[:5], frames)
        return reinforce_loss(log_prob, self.advantages, [self.v[0].numel() * f // sum(frames) for f in frames])

    def check(self) -> dict[str, float]:
        """Against float64, sample by sample; and the log-density against the unfused op."""
        loss, log_prob = self.loss()
        (d_v,) = torch.autograd.grad(loss, self.v)
        want, size, worst = 0.0, 0.0, 0.0
        samples = len(self.v)
        for b in range(samples):
            v, *others = (x[b : b + 1].detach().double() for x in self.inputs)
            part, terms = reference(v.requires_grad_(), *others, self.chunk_frames, self.weights)
            (want_grad,) = torch.autograd.grad(part / samples, v)
            want += float(part.detach()) / samples
            # Chunk weights of 1 are close enough for a scale of the terms, which have either sign.
            size += 100 / samples * float((others[-1].abs() * terms.detach().abs().sum() / v.numel()).sum())
            worst = max(worst, relative_rms(d_v[b : b + 1], want_grad))
        error = abs(float(loss) - want) / size
        limit = 1e-6 if self.v.dtype == torch.float32 else 6e-3
        assert error <= 1e-6, f"loss: error {error:.2e} of the sum of absolute terms, expected at most 1e-6"
        assert worst <= limit, f"gradient: relative RMS error {worst:.2e}, expected at most {limit}"
        with torch.no_grad():
            other = gaussian_log_prob(*self.inputs[:5], self.chunk_frames)
        # An element's terms sum to about 1.
        apart = float(((log_prob - other).abs() / (other.abs() + self.v.numel() / other.numel())).max())
        assert apart <= 1e-6, f"log-density: {apart:.2e} of its terms from the unfused op's, expected at most 1e-6"
        return {"loss": error, "gradient": worst}


def measure(bench, name, direction, samples, shape, chunk_frames=None, dtype=torch.float32, peers=True):
    case = Case(samples, shape, chunk_frames, dtype)

    def with_gradient(f):
        return lambda: torch.autograd.grad(f(), case.v)

    # The forward alone has done all the work; of others the gradient must be asked for.
    run = case.loss if direction == "forward" else with_gradient(lambda: case.loss()[0])
    others = {"unfused": case.unfused}
    if peers:
        others |= {"eager": lambda: eager_loss(*case.inputs), "torch.compile": lambda: compiled_loss(*case.inputs)}
    events = {f"{who}_events_ms": with_gradient(f) for who, f in others.items()} | {"raven_events_ms": run}
    bench.row(
        op="policy_loss",
        case=name,
        direction=direction,
        backend=explain("policy_loss", *case.inputs[:3]).chosen,
        check=case.check,
        run=run,
        work=2 * case.v.nbytes + case.x_t.nbytes + case.x_s.nbytes,
        unit="TB/s",
        peers={peer: with_gradient(f) for peer, f in others.items()},
        graph=case.v.is_cuda,  # device time alone, for everybody
        # With the host's time: what a caller without a graph sees where the launches outlast the work.
        extra={who: time_ms(job, DEVICE) for who, job in events.items()} if case.v.is_cuda and samples <= 4 else None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("samples", [4, 64])
def test_samples(bench, samples, direction):
    measure(bench, f"samples-{samples}", direction, samples, WAN)


@pytest.mark.gpu
def test_bfloat16_velocity(bench):
    measure(bench, "samples-64-bfloat16-velocity", "forward", 64, WAN, dtype=torch.bfloat16, peers=False)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_frames", [CHUNKS, (1, 4, 4, 4, 4, 4)], ids=["equal", "ragged"])
def test_chunks(bench, chunk_frames):
    measure(bench, f"samples-64-chunks-{len(chunk_frames)}", "forward", 64, WAN, chunk_frames, peers=False)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "samples-2-smoke", "forward+backward", 2, (4, 4, 8, 8), (2, 2), peers=False)
