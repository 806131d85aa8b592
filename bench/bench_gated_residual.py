"""What lies between two sub-layers of a Wan block: gated residual and the next norm, bfloat16, 1,536 channels (1.3B).

Bytes that must move: the forward reads x and branch and writes their sum and y; the backward reads two gradients, the
sum and the branch and writes the gradients of x and branch. Without a norm it is x, branch and sum, and the gradient
of the sum, branch and its gradient. The tables are float32, a few rows. A 4,680-token call fits the L2 cache, so
several sets of inputs and outputs take turns. Rows of `quantized` write y in float8 with a scale for each token, beside
the two ops apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import gated_residual, quantize_rows
from raven.ops.gated_residual import _backward, _gated_residual_norm
from raven.reference import gated_residual as reference
from raven.testing import assert_bitwise, relative_rms

# One rounding to 8 bits is 1.7e-3; gradients of tables are float32 sums over all tokens of a segment.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}


class Case:
    """One set of inputs: x and branch [1, L, C], a table of float32 rows for each segment."""

    def __init__(self, tokens: int, segments: int, kind: str, channels: int = 1536, dtype=torch.bfloat16) -> None:
        self.x, self.branch, self.grad_total, self.grad_y = (
            torch.randn(1, tokens, channels, device=DEVICE, dtype=dtype) for _ in range(4)
        )
        rows = torch.randn(1, segments, 6, channels, device=DEVICE).unbind(2)
        self.gate = None if kind == "ungated" else rows[2]
        self.shift, self.scale = None, None
        if kind == "affine":
            self.shift, self.scale = torch.randn(2, channels, device=DEVICE).unbind(0)
        elif kind != "sum":
            self.shift, self.scale = rows[3:5]
        names = ("bias", "weight") if kind == "affine" else ("shift", "scale")
        self.norm = dict(zip(names, (self.shift, self.scale), strict=True)) if kind != "sum" else {}
        self.kept: object = None
        self.saved: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def tensors(self, direction: str) -> int:
        """How many of the size of x must move."""
        if not self.norm:
            return 3
        return 4 if direction == "forward" else 5 if self.gate is None else 6

    def keeping(self, call: Callable[[], object]) -> Callable[[], None]:
        """``call``, its result held until its next turn: a freed output would be written again while in the cache."""

        def run() -> None:
            self.kept = call()

        return run

    def prepare(self) -> None:
        """What a forward leaves to the backward."""
        if self.norm:
            inputs = (self.x, self.branch, self.gate, self.shift, self.scale, None, 1e-6, self.x.dtype)
            total, _, stats = _gated_residual_norm(*inputs)
            self.saved = (total, stats)

    def forward(self) -> tuple[torch.Tensor, ...]:
        out = gated_residual(self.x, self.branch, self.gate, **self.norm)
        return out if isinstance(out, tuple) else (out,)

    def quantized(self) -> tuple[torch.Tensor, ...]:
        return gated_residual(self.x, self.branch, self.gate, **self.norm, quantize=True)

    def apart(self) -> tuple[torch.Tensor, ...]:
        total, y = self.forward()
        return total, *quantize_rows(y)

    def check_quantized(self) -> float:
        """Bit for bit the two ops apart; error of the sum and the norm before that."""
        for got, want in zip(self.quantized(), self.apart(), strict=True):
            assert_bitwise(got, want, "quantised")
        return self.check("forward")

    def wanted(self) -> list[bool]:
        """The gradient of x is that of the sum where no norm follows, that of the branch where there is no gate."""
        norm = bool(self.norm)
        return [norm, self.gate is not None, self.gate is not None, norm, norm]

    def backward(self) -> list[torch.Tensor]:
        grad_y = self.grad_y if self.norm else None
        branch = None if self.gate is None else self.branch
        return _backward(
            self.grad_total, grad_y, *self.saved, branch, self.gate, self.scale, None, self.x.dtype, self.x.dtype,
            self.wanted(),
        )  # fmt: skip

    def check(self, direction: str) -> float:
        """Relative RMS error against float64, the worst of all outputs; after the sum from the rounded sum on."""
        total = self.forward()[0].double()
        x, branch, grad_total, grad_y = (t.double() for t in (self.x, self.branch, self.grad_total, self.grad_y))
        gate, shift, scale = (None if t is None else t.double() for t in (self.gate, self.shift, self.scale))
        stats = None
        if self.norm:
            y, stats = reference.modulate(total, shift, scale, None, 1e-6, torch.float64)
        if direction == "forward":
            got, want = self.forward(), [reference.gated_sum(x, branch, gate, None), *([y] if self.norm else [])]
        else:
            got = self.backward()
            want = reference.backward(
                grad_total, grad_y if self.norm else None, total, stats, branch, gate, scale, None,
                (torch.float64, torch.float64), self.wanted(),
            )  # fmt: skip
        worst = 0.0
        for a, b in zip(got, want, strict=True):
            error = relative_rms(a, b)
            assert error <= LIMITS[a.dtype], f"{direction}: relative RMS error {error:.2e} in {a.dtype}"
            worst = max(worst, error)
        return worst


def as_models_write_it(x, branch, gate, shift, scale):
    """Residual in float32 and cast back, then norm and modulation in float32 and cast back, segments as a dimension."""
    shape = (gate.shape[1], x.shape[1] // gate.shape[1])
    wide, gate, shift, scale = x.unflatten(1, shape).float(), *(row.unsqueeze(2) for row in (gate, shift, scale))
    total = (wide + branch.unflatten(1, shape) * gate).to(x.dtype)
    y = F.layer_norm(total.float(), total.shape[-1:]) * (1 + scale) + shift
    return total.flatten(1, 2), y.to(x.dtype).flatten(1, 2)


compiled = torch.compile(as_models_write_it, dynamic=False)


def backward_of(f: Callable, case: Case) -> Callable[[], object]:
    inputs = [t.detach().requires_grad_() for t in (case.x, case.branch, case.gate, case.shift, case.scale)]
    outputs, grads = f(*inputs), (case.grad_total, case.grad_y)
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def measure(bench, name, direction, tokens, segments, kind="modulated", peers=False, **sizes):
    first = Case(tokens, segments, kind, **sizes)
    bytes_moved = first.tensors(direction) * first.x.numel() * first.x.element_size()
    cases = [first] + [Case(tokens, segments, kind, **sizes) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]
    for case in cases:
        case.prepare()

    def others():
        jobs = {"eager": as_models_write_it, "torch.compile": compiled}
        if direction == "backward":
            return {peer: backward_of(f, first) for peer, f in jobs.items()}
        inputs = (first.x, first.branch, first.gate, first.shift, first.scale)
        return {peer: lambda f=f: f(*inputs) for peer, f in jobs.items()}

    bench.row(
        op="gated_residual",
        case=name,
        direction=direction,
        backend=explain("gated_residual", first.x, first.branch).chosen,
        check=lambda: first.check(direction),
        run=[case.keeping(getattr(case, direction)) for case in cases],
        work=bytes_moved,
        unit="TB/s",
        peers=others if peers else None,
        graph=DEVICE == "cuda" and not peers,
    )


def measure_quantized(bench, name, tokens, segments, kind, **sizes):
    first = Case(tokens, segments, kind, **sizes)
    bytes_moved = first.x.numel() * (3 * first.x.element_size() + 1) + 4 * tokens
    cases = [first] + [Case(tokens, segments, kind, **sizes) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]
    bench.row(
        op="gated_residual",
        case=name,
        direction="forward",
        backend=explain("gated_residual", first.x, first.branch).chosen,
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
@pytest.mark.parametrize("kind", ["affine", "ungated", "sum"])
def test_other_kinds(bench, kind, direction):
    """Before cross-attention, after it, and at the end of the last block."""
    measure(bench, f"tokens-60840-{kind}", direction, 60840, 13, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_beside_peers(bench, direction):
    measure(bench, "tokens-60840-events", direction, 60840, 13, peers=True)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "segments"), [(60840, 13), (18720, 4), (4680, 1)])
def test_wan_14b(bench, tokens, segments, direction):
    measure(bench, f"tokens-{tokens}-channels-5120", direction, tokens, segments, channels=5120)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["affine", "ungated"])
def test_quantized(bench, kind):
    """Before cross-attention and before the MLP, as a chunk of a stream has them."""
    measure_quantized(bench, f"tokens-4680-{kind}-quantized", 4680, 1, kind)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["modulated", "affine", "ungated", "sum"])
def test_smoke(bench, kind, direction):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, f"tokens-16-{kind}-smoke", direction, 16, 2, kind, channels=32, dtype=torch.float32)


def test_smoke_quantized(bench):
    measure_quantized(bench, "tokens-16-quantized-smoke", 16, 2, "affine", channels=32, dtype=torch.float32)
