"""One consistency step with given noise: a whole batch of Wan latents, and the single chunk of a stream, in float32.

Bytes that must move: the forward reads v, x_t and noise and writes x_s; the backward reads its gradient and writes v's.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import consistency_step
from raven.reference.consistency_step import consistency_step as reference
from raven.testing import relative_rms

CASES = {"samples-64": (64, 16, 21, 60, 104), "chunk-3-frames": (1, 16, 3, 60, 104)}


def eager(v, x_t, noise, t, s):
    t, s = t.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)
    return (1 - s) * (x_t - t * v) + s * noise


compiled = torch.compile(eager, dynamic=False)


@lru_cache(maxsize=1)
def inputs_of(shape):
    """``(v, x_t, noise, t, s)``, as many sets as keep a small job out of the cache."""
    sets = []
    for _ in range(rounds_beyond_cache(4 * 4 * torch.Size(shape).numel()) if DEVICE == "cuda" else 1):
        v, x_t, noise = (torch.randn(shape, device=DEVICE) for _ in range(3))
        t = torch.full((shape[0],), 0.938, device=DEVICE)
        s = 0.1 + 0.8 * torch.rand(shape[0], device=DEVICE)
        sets.append((v.requires_grad_(), x_t, noise, t, s))
    return sets


def check(v, x_t, noise, t, s):
    grad = torch.randn_like(v)
    got = consistency_step(v, x_t, t, s, noise)
    (d_v,) = torch.autograd.grad(got, v, grad)
    errors = {"forward": 0.0, "backward": 0.0}
    for b in range(len(v)):
        one = slice(b, b + 1)
        v64 = v[one].detach().double().requires_grad_()
        want = reference(v64, x_t[one].double(), noise[one].double(), t[one], s[one])
        (want_grad,) = torch.autograd.grad(want, v64, grad[one].double())
        for name, error in (("forward", relative_rms(got[one], want)), ("backward", relative_rms(d_v[one], want_grad))):
            assert error <= 1e-6, f"{name}: relative RMS error {error:.2e}, expected at most 1e-6"
            errors[name] = max(errors[name], error)
    return errors


def measure(bench, name, direction, shape, peers=True):
    sets = inputs_of(shape)

    def job(f, v, x_t, noise, t, s):
        def forward():
            with torch.no_grad():
                return f(v, x_t, noise, t, s)

        if direction == "forward":
            return forward
        out, grad = f(v, x_t, noise, t, s), torch.randn_like(v)
        return lambda: torch.autograd.grad(out, v, grad, retain_graph=True)

    def ours(v, x_t, noise, t, s):
        return consistency_step(v, x_t, t, s, noise)

    others = {"eager": eager, "torch.compile": compiled} if peers else {}
    bench.row(
        op="consistency_step",
        case=name,
        direction=direction,
        backend=explain("consistency_step", *sets[0][:3]).chosen,
        check=lambda: check(*sets[0]),
        run=[job(ours, *each) for each in sets],
        work=(4 if direction == "forward" else 2) * sets[0][0].nbytes,
        unit="TB/s",
        peers={peer: [job(f, *each) for each in sets] for peer, f in others.items()},
        # A single chunk takes less time than its launch: a stream replays it in a graph.
        graph=DEVICE == "cuda" and shape[0] == 1,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_step(bench, name, direction):
    if CASES[name][0] == 1 and direction == "backward":
        pytest.skip("a captured backward needs its forward in the same capture")
    measure(bench, name, direction, CASES[name])


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "samples-2-smoke", "forward", (2, 4, 2, 8, 8), peers=False)
