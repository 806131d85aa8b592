"""Rows of a cache into the buffer that layers share, at Wan shapes: 12 heads of 128, bfloat16 from float8 or raw keys.

Bytes that must move: a row is read as it is stored, with four bytes a head for its scale, and written in bfloat16.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import read_rows
from raven.reference.kv_append import dequantize, quantize
from raven.reference.read_rows import read_rows as plainly
from raven.testing import relative_rms

LIMITS = {torch.bfloat16: 2.5e-3, torch.float32: 1e-6}


class Case:
    """One layer's keys, of which ``tokens`` rows are read into a buffer."""

    def __init__(self, tokens, heads, dim, stored, rotated, dtype):
        keys = torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=dtype)
        float8 = stored == torch.float8_e4m3fn
        self.cache, self.scale = quantize(keys.float()) if float8 else (keys, None)
        self.out = torch.empty_like(keys)
        self.rows = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
        self.positions = torch.stack([self.rows // 1560, self.rows // 52 % 30, self.rows % 52], 1) if rotated else None

    @property
    def bytes_moved(self) -> int:
        scales = 0 if self.scale is None else self.scale.nbytes
        return self.cache.nbytes + self.out.nbytes + scales

    def run(self) -> None:
        read_rows(self.cache, self.rows, self.out, self.scale, self.positions)

    def eager(self) -> torch.Tensor:
        """Plain PyTorch, into fresh memory."""
        return dequantize(self.cache, self.scale, self.out.dtype)

    def check(self) -> float:
        want = torch.empty_like(self.out, dtype=torch.float64)
        plainly(self.cache, self.rows, want, self.scale, self.positions)
        self.run()
        error = relative_rms(self.out, want)
        assert error <= LIMITS[self.out.dtype], f"relative RMS error {error:.2e}"
        return error


def measure(bench, name, tokens, heads, dim, stored=torch.float8_e4m3fn, rotated=False, dtype=torch.bfloat16):
    first = Case(tokens, heads, dim, stored, rotated, dtype)
    cases = [first]
    cases += [
        Case(tokens, heads, dim, stored, rotated, dtype) for _ in range(rounds_beyond_cache(first.bytes_moved) - 1)
    ]
    bench.row(
        op="read_rows",
        case=name,
        direction="forward",
        backend=explain("read_rows", first.cache, first.out, first.scale).chosen,
        check=first.check,
        run=[partial(case.run) for case in cases],
        work=first.bytes_moved,
        unit="TB/s",
        peers={} if rotated or first.scale is None else {"eager": [partial(case.eager) for case in cases]},
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4680, 18720, 32760])
def test_float8(bench, tokens):
    measure(bench, f"tokens-{tokens}-float8", tokens, 12, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn], ids=["bfloat16", "float8"])
def test_rotated(bench, stored):
    measure(bench, f"tokens-18720-raw-{str(stored).split('_')[0][6:]}", 18720, 12, 128, stored, rotated=True)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "tokens-16-smoke", 16, 2, 16, rotated=True, dtype=torch.float32)
