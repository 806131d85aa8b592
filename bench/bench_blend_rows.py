"""The blended sink of one layer's keys (or values) at Wan shapes: 4,680 tokens, 12 heads of 128, bfloat16.

Bytes that must move: the sink and what rounding took from it are read and written, the evicted rows are read.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import blend_rows
from raven.testing import relative_rms

ALPHA = 0.999


class Case:
    """A cache of two chunks, of which the second is blended into the first."""

    def __init__(self, tokens, heads, dim, dtype):
        self.tokens = tokens
        self.cache = torch.randn(1, 2 * tokens, heads, dim, device=DEVICE, dtype=dtype)
        self.lost = torch.zeros(1, tokens, heads, dim, device=DEVICE, dtype=dtype)

    @property
    def bytes_moved(self) -> int:
        return 5 * self.lost.nbytes

    def run(self) -> None:
        blend_rows(self.cache, self.lost, 0, self.tokens, self.tokens, ALPHA)

    def eager(self) -> None:
        """Plain PyTorch, as published code has it: what rounding takes away is lost."""
        sink, evicted = self.cache.split(self.tokens, dim=1)
        sink.copy_(ALPHA * sink + (1 - ALPHA) * evicted)

    def check(self) -> float:
        """A hundred steps against float64: as exact as one rounding."""
        sink, evicted = self.cache.clone().double().split(self.tokens, dim=1)
        for _ in range(100):
            self.run()
            sink = ALPHA * sink + (1 - ALPHA) * evicted
        error = relative_rms(self.cache[:, : self.tokens], sink)
        assert error <= torch.finfo(self.cache.dtype).eps / 2, f"relative RMS error {error:.2e}"
        return error


def measure(bench, name, tokens, heads, dim, dtype=torch.bfloat16):
    first = Case(tokens, heads, dim, dtype)
    cases = [first, *(Case(tokens, heads, dim, dtype) for _ in range(rounds_beyond_cache(first.bytes_moved) - 1))]
    bench.row(
        op="blend_rows",
        case=name,
        direction="forward",
        backend=explain("blend_rows", first.cache, first.lost).chosen,
        check=first.check,
        run=[case.run for case in cases],
        work=first.bytes_moved,
        unit="TB/s",
        peers={"eager": [case.eager for case in cases]},
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
def test_wan_1_3b(bench):
    measure(bench, "tokens-4680", 4680, 12, 128)


def test_smoke(bench):
    """Small enough for any machine, and the same code path."""
    measure(bench, "tokens-16-smoke", 16, 2, 16)
