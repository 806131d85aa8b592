"""RMS norm and SiLU in one pass, at the shapes of Wan's VAE decoder for one latent frame of 480x832, bfloat16.

Bytes that must move: every tensor is read or written once.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import norm_silu
from raven.reference.norm_silu import norm_silu as plainly
from raven.testing import relative_rms

LIMITS = {torch.bfloat16: 3e-3, torch.float32: 1e-6}


class Case:
    """Rows with their norm, or (without a weight) the sum that ends a residual block."""

    def __init__(self, rows: int, channels: int, normed: bool, dtype: torch.dtype) -> None:
        self.x, self.residual = (torch.randn(rows, channels, device=DEVICE, dtype=dtype) for _ in range(2))
        self.weight, self.bias = (torch.randn(channels, device=DEVICE, dtype=dtype) for _ in range(2))
        self.out = torch.empty_like(self.x)
        if normed:
            self.residual = None
        else:
            self.weight = None

    @property
    def bytes_moved(self) -> int:
        return sum(x.nbytes for x in (self.x, self.out, self.residual) if x is not None)

    def run(self) -> None:
        norm_silu(self.x, self.weight, bias=self.bias, residual=self.residual, out=self.out)

    def eager(self) -> torch.Tensor:
        """PyTorch's own kernels."""
        total = self.x + self.bias
        if self.weight is None:
            return total + self.residual
        return F.silu(F.rms_norm(total, total.shape[-1:], self.weight, eps=1e-24))

    def check(self) -> float:
        rows = slice(None, 4096)  # float64 of all would not be small
        want = torch.empty_like(self.out[rows], dtype=torch.float64)
        terms = [None if x is None else x.double() for x in (self.weight, self.bias)]
        residual = None if self.residual is None else self.residual[rows].double()
        plainly(self.x[rows].double(), want, *terms, residual)
        self.run()
        error = relative_rms(self.out[rows], want)
        assert error <= LIMITS[self.out.dtype], f"relative RMS error {error:.2e}"
        return error


def measure(bench, name: str, rows: int, channels: int, normed: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    first = Case(rows, channels, normed, dtype)
    cases = [first, *(Case(rows, channels, normed, dtype) for _ in range(rounds_beyond_cache(first.bytes_moved) - 1))]
    bench.row(
        op="norm_silu",
        case=name,
        direction="forward",
        backend=explain("norm_silu", first.x, first.out, first.weight, first.bias, first.residual).chosen,
        check=first.check,
        run=[partial(case.run) for case in cases],
        work=first.bytes_moved,
        unit="TB/s",
        peers={"eager": [partial(case.eager) for case in cases]},
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "sum"])
@pytest.mark.parametrize("rows, channels", [(4 * 480 * 832, 96), (4 * 240 * 416, 192), (2 * 120 * 208, 384)])
def test_decoder(bench, rows, channels, normed):
    measure(bench, f"rows-{rows}-channels-{channels}-{'norm' if normed else 'sum'}", rows, channels, normed)


@pytest.mark.parametrize("normed", [True, False], ids=["norm", "sum"])
def test_smoke(bench, normed):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, f"smoke-{'norm' if normed else 'sum'}", 32, 24, normed, torch.float32)
