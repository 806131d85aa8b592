"""LayerNorm with scale and shift from a table, at the widths of Wan (1.3B: 1,536 channels, 14B: 5,120), bfloat16.

Bytes that must move: the forward reads x and writes y; the backward reads x and the gradient of y and writes that of x.
The tables are float32, a few rows. A 4,680-token call fits the L2 cache, so several sets of inputs and outputs take
turns. Rows of `quantized` write y in float8 with a scale for each token, beside the two ops apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import modulate, quantize_rows
from raven.ops.gated_residual import _backward
from raven.ops.modulate import _modulate
from raven.reference import gated_residual as reference_backward
from raven.reference import modulate as reference
from raven.testing import assert_bitwise, relative_rms

# One rounding to 8 bits is 1.7e-3; gradients of tables are float32 sums over all tokens of a segment.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}


class Case:
    """One set of inputs: x [1, L, C], shift and scale slices of a table of float32 rows for each segment."""

    def __init__(self, tokens: int, segments: int, channels: int = 1536, dtype: torch.dtype = torch.bfloat16) -> None:
        self.x, self.grad = (torch.randn(1, tokens, channels, device=DEVICE, dtype=dtype) for _ in range(2))
        self.shift, self.scale = torch.randn(1, segments, 6, channels, device=DEVICE).unbind(2)[:2]
        self.stats = _modulate(self.x, self.shift, self.scale, None, 1e-6, dtype)[1]
        self.kept: object = None

    def keeping(self, call: Callable[[], object]) -> Callable[[], None]:
        """``call``, its result held until its next turn: a freed output would be written again while in the cache."""

        def run() -> None:
            self.kept = call()

        return run

    def forward(self) -> list[torch.Tensor]:
        return [modulate(self.x, self.shift, self.scale)]

    def quantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        return modulate(self.x, self.shift, self.scale, quantize=True)

    def apart(self) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_rows(modulate(self.x, self.shift, self.scale))

    def check_quantized(self) -> float:
        """Bit for bit the two ops apart; error of the norm before that."""
        for got, want in zip(self.quantized(), self.apart(), strict=True):
            assert_bitwise(got, want, "quantised")
        return self.check("forward")

    def backward(self) -> list[torch.Tensor]:
        kinds = (self.x.dtype, self.x.dtype)
        wanted = [True, False, False, True, True]
        return _backward(None, self.grad, self.x, self.stats, None, None, self.scale, None, *kinds, wanted)

    def check(self, direction: str) -> float:
        """Relative RMS error against float64, the worst of all outputs."""
        x, shift, scale, grad = (t.double() for t in (self.x, self.shift, self.scale, self.grad))
        y, stats = reference.modulate(x, shift, scale, None, 1e-6, torch.float64)
        want = [y]
        if direction == "backward":
            wanted = (True, False, False, True, True)
            want = reference_backward.backward(
                None, grad, x, stats, None, None, scale, None, (torch.float64, torch.float64), wanted
            )
        worst = 0.0
        for a, b in zip(getattr(self, direction)(), want, strict=True):
            error = relative_rms(a, b)
            assert error <= LIMITS[a.dtype], f"{direction}: relative RMS error {error:.2e} in {a.dtype}"
            worst = max(worst, error)
        return worst


def as_models_write_it(x, shift, scale):
    """In float32 and cast back, segments as a dimension."""
    wide = x.unflatten(1, (shift.shape[1], x.shape[1] // shift.shape[1])).float()
    y = F.layer_norm(wide, wide.shape[-1:]) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)
    return y.to(x.dtype).flatten(1, 2)


compiled = torch.compile(as_models_write_it, dynamic=False)


def backward_of(f: Callable, case: Case) -> Callable[[], object]:
    inputs = [t.detach().requires_grad_() for t in (case.x, case.shift, case.scale)]
    y = f(*inputs)
    return lambda: torch.autograd.grad(y, inputs, case.grad, retain_graph=True)


def measure(bench, name, direction, tokens, segments, peers=False, **sizes):
    first = Case(tokens, segments, **sizes)
    bytes_moved = (2 if direction == "forward" else 3) * first.x.numel() * first.x.element_size()
    cases = [first] + [Case(tokens, segments, **sizes) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]

    def others():
        jobs = {"eager": as_models_write_it, "torch.compile": compiled}
        if direction == "backward":
            return {peer: backward_of(f, first) for peer, f in jobs.items()}
        return {peer: lambda f=f: f(first.x, first.shift, first.scale) for peer, f in jobs.items()}

    bench.row(
        op="modulate",
        case=name,
        direction=direction,
        backend=explain("modulate", first.x, first.shift, first.scale).chosen,
        check=lambda: first.check(direction),
        run=[case.keeping(getattr(case, direction)) for case in cases],
        work=bytes_moved,
        unit="TB/s",
        peers=others if peers else None,
        graph=DEVICE == "cuda" and not peers,
    )


def measure_quantized(bench, name, tokens, segments, **sizes):
    first = Case(tokens, segments, **sizes)
    bytes_moved = first.x.numel() * (first.x.element_size() + 1) + 4 * tokens
    cases = [first] + [Case(tokens, segments, **sizes) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]
    bench.row(
        op="modulate",
        case=name,
        direction="forward",
        backend=explain("modulate", first.x, first.shift, first.scale).chosen,
        check=first.check_quantized,
        run=[case.keeping(case.quantized) for case in cases],
        work=bytes_moved,
        unit="TB/s",
        peers={"apart": [case.keeping(case.apart) for case in cases]},
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "segments"), [(60840, 13), (9360, 2), (4680, 1)])
def test_wan_1_3b(bench, tokens, segments, direction):
    measure(bench, f"tokens-{tokens}", direction, tokens, segments)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "segments"), [(60840, 13), (4680, 1)])
def test_wan_14b(bench, tokens, segments, direction):
    measure(bench, f"tokens-{tokens}-channels-5120", direction, tokens, segments, channels=5120)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "segments"), [(9360, 2), (4680, 1)])
def test_quantized(bench, tokens, segments):
    measure_quantized(bench, f"tokens-{tokens}-quantized", tokens, segments)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_beside_peers(bench, direction):
    measure(bench, "tokens-60840-events", direction, 60840, 13, peers=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_smoke(bench, direction):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "tokens-16-smoke", direction, 16, 2, channels=32, dtype=torch.float32)


def test_smoke_quantized(bench):
    measure_quantized(bench, "tokens-16-quantized-smoke", 16, 2, channels=32, dtype=torch.float32)
