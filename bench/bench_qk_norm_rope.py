"""Norm and rotary of queries and keys at Wan shapes: 12 heads of 128 (1.3B) and 40 (14B), bfloat16.

Bytes that must move: the forward reads q and k and writes both; the backward reads q, k and two gradients and writes
two. A 4,680-token call fits the L2 cache, so several sets of inputs and outputs take turns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import DEVICE, failures, first_line, rounds_beyond_cache

from raven import explain
from raven.ops import qk_norm_rope
from raven.ops.qk_norm_rope import _qk_norm_rope_backward
from raven.reference import qk_norm_rope as reference
from raven.testing import relative_rms

# One rounding to 8 bits is 1.7e-3; the weights' gradients are float32 sums over all tokens.
LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}
PEER_LIMIT = 5e-3  # peers round to 8 bits up to three times: normed rows, weights, results
ROWS, COLS = 30, 52  # of tokens in a frame of 480x832


def grid_positions(tokens: int) -> torch.Tensor:
    """Frame, row and column of the tokens of a 480x832 video, int32 [L, 3]."""
    index = torch.arange(tokens, device=DEVICE)
    return torch.stack((index // (ROWS * COLS), index // COLS % ROWS, index % COLS), dim=1).int()


class Case:
    """One set of inputs; q and k are slices of a fused projection, as a model has them."""

    def __init__(self, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
        self.fused = torch.randn(1, tokens, 3 * heads * dim, device=DEVICE, dtype=dtype)
        self.q, self.k, self.v = (x.unflatten(2, (heads, dim)) for x in self.fused.chunk(3, dim=2))
        self.weights = [torch.rand(heads * dim, device=DEVICE) + 0.5 for _ in range(2)]
        self.positions = grid_positions(tokens)
        self.grads = [torch.randn_like(self.q) for _ in range(2)]
        self.inputs = (self.q, self.k, *self.weights, self.positions)
        self.kept: object = None

    def keeping(self, call: Callable[[], object]) -> Callable[[], None]:
        """``call``, its result held until its next turn: a freed output would be written again while in the cache."""

        def run() -> None:
            self.kept = call()

        return run

    def forward(self) -> tuple[torch.Tensor, ...]:
        return qk_norm_rope(*self.inputs)

    def backward(self) -> tuple[torch.Tensor, ...]:
        return _qk_norm_rope_backward(*self.grads, *self.inputs, 1e-6, 10000.0, False, True)

    def check(self, direction: str) -> float:
        """Relative RMS error against float64, the worst of all outputs."""
        exact = [x.double() if x.is_floating_point() else x for x in self.inputs]
        if direction == "forward":
            got, want = self.forward(), reference.qk_norm_rope(*exact)
        else:
            grads = [x.double() for x in self.grads]
            got = self.backward()
            want = reference.qk_norm_rope_backward(*grads, *exact, 1e-6, 10000.0, False)
        worst = 0.0
        for x, y in zip(got, want, strict=True):
            error = relative_rms(x, y)
            assert error <= LIMITS[x.dtype], f"{direction}: relative RMS error {error:.2e} in {x.dtype}"
            worst = max(worst, error)
        return worst

    def check_forward_of(self, other: Callable[[], tuple[torch.Tensor, ...]]) -> float:
        """The same for a peer's forward."""
        exact = [x.double() if x.is_floating_point() else x for x in self.inputs]
        pairs = zip(other(), reference.qk_norm_rope(*exact), strict=False)
        worst = max(relative_rms(x.view_as(y), y) for x, y in pairs)
        assert worst <= PEER_LIMIT, f"relative RMS error {worst:.2e}, expected at most {PEER_LIMIT:.0e}"
        return worst


def as_models_write_it(q, k, q_weight, k_weight, positions):
    """Norm in float32 and cast back; rotary by complex float64 numbers."""
    dim = q.shape[-1]
    axis = [axis for axis, pairs in enumerate(reference.axis_pairs(dim)) for _ in range(pairs)]
    frequency = torch.tensor(reference.frequencies(dim, 10000.0), dtype=torch.float64, device=q.device)

    def one(x, weight):
        wide = x.flatten(2).float()
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        angle = positions[:, axis].double() * frequency
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        pairs = torch.view_as_complex(normed.view(x.shape).double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


compiled = torch.compile(reference.qk_norm_rope, dynamic=False)
FLASHINFER = "flashinfer, values copied too"


def by_flashinfer(case: Case) -> Callable[[], tuple[torch.Tensor, ...]]:
    """flashinfer's kernel for Wan: frames from 0 on, weights in bfloat16; it copies the values as well."""
    function = importlib.import_module("flashinfer.norm").fused_qk_rmsnorm_rope
    heads, dim = case.q.shape[2:]
    grid = {"ppf": case.q.shape[1] // (ROWS * COLS), "pph": ROWS, "ppw": COLS}
    names = ("num_frame_channels", "num_height_channels", "num_width_channels")
    channels = dict(zip(names, (2 * pairs for pairs in reference.axis_pairs(dim)), strict=True))
    counts = {f"num_heads_{x}": heads for x in "qkv"} | {"head_dim": dim}
    options = {"eps": 1e-6, "base": 10000.0, "interleave": True}
    weights = [weight.to(case.q.dtype) for weight in case.weights]
    return partial(function, case.fused, *weights, **grid, **channels, **counts, **options)


def measure(bench, name, direction, tokens, heads, dim=128, dtype=torch.bfloat16, peers=False):
    first = Case(tokens, heads, dim, dtype)
    tensors = {"forward": 4, "backward": 6}[direction]
    bytes_moved = tensors * first.q.numel() * first.q.element_size()
    cases = [first] + [Case(tokens, heads, dim, dtype) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]
    # The peers' forward is not captured in a graph: they make constants on the host. They are far above launch cost.
    others = {"eager": as_models_write_it, "torch.compile": compiled} if peers else {}
    others = {name: partial(function, *first.inputs) for name, function in others.items()}
    if peers and bench.peers:
        try:
            others[FLASHINFER] = by_flashinfer(first)
            bench.recorder.uses("flashinfer-python")
        except failures() as failure:
            bench.recorder.leave_out("flashinfer", first_line(failure))
    bench.row(
        op="qk_norm_rope",
        case=name,
        direction=direction,
        backend=explain("qk_norm_rope", first.q, first.k).chosen,
        check=lambda: first.check(direction),
        run=[case.keeping(getattr(case, direction)) for case in cases],
        work=bytes_moved,
        unit="TB/s",
        peers=others,
        peer_check=lambda name: first.check_forward_of(others[name]),
        graph=DEVICE == "cuda" and not peers,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [60840, 4680])
def test_wan_1_3b(bench, tokens, direction):
    measure(bench, f"tokens-{tokens}", direction, tokens, 12)


@pytest.mark.gpu
def test_beside_peers(bench):
    measure(bench, "tokens-60840-events", "forward", 60840, 12, peers=True)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_wan_14b(bench, direction):
    measure(bench, "tokens-18720-heads-40", direction, 18720, 40)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_smoke(bench, direction):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "tokens-16-smoke", direction, 16, 2, 16, torch.float32)
