"""Rows to float8 at the widths of Wan 1.3B, bfloat16: 1,536 channels, and GELU of the MLP's 8,960.

Bytes that must move: two an element read, one written, four a row for the scale. Several sets of rows take turns, so
that each comes from memory; the row `in-cache` is what a forward sees, where the rows were written just before.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.ops import quantize_rows
from raven.reference.quantize_rows import quantize_rows as plainly
from raven.testing import relative_rms


def check(x: torch.Tensor, gelu: bool) -> dict[str, float]:
    """Scales to rounding, numbers to the bit (after GELU all but a few, that lie between two float8 numbers), no bias.

    The rule is taken in float32: of bfloat16 numbers many lie just between two float8 ones, and how the scale is
    rounded decides.
    """
    stored, scale = quantize_rows(x, gelu)
    want, want_scale = plainly(x, gelu)
    torch.testing.assert_close(scale, want_scale, rtol=2e-6, atol=0)
    different = float((stored.view(torch.uint8) != want.view(torch.uint8)).double().mean())
    assert different <= (1e-4 if gelu else 0), f"{different:.1e} of the numbers differ from the rule"
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh") if gelu else x.double()
    error = relative_rms(stored.double() * scale.double().unsqueeze(-1), exact)
    assert error <= 0.04, f"relative RMS error {error:.3f} of what is stored"
    return {"differing": different, "stored": error}


def measure(bench, name, tokens, channels, gelu, dtype=torch.bfloat16, cached=False):
    bytes_moved = tokens * channels * (dtype.itemsize + 1) + 4 * tokens
    count = 1 if cached else rounds_beyond_cache(bytes_moved)
    inputs = [torch.randn(1, tokens, channels, device=DEVICE, dtype=dtype) for _ in range(count)]
    results: list = [None] * count  # kept, so that each has memory of its own

    def run(i):
        results[i] = quantize_rows(inputs[i], gelu)

    bench.row(
        op="quantize_rows",
        case=name,
        direction="forward",
        backend=explain("quantize_rows", inputs[0]).chosen,
        check=lambda: check(inputs[0], gelu),
        run=[partial(run, i) for i in range(count)],
        work=bytes_moved,
        unit="TB/s",
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4680, 9360, 60840])
@pytest.mark.parametrize(("channels", "gelu"), [(1536, False), (8960, True)], ids=["1536", "8960-gelu"])
def test_wan_1_3b(bench, tokens, channels, gelu):
    measure(bench, f"tokens-{tokens}-channels-{channels}{'-gelu' * gelu}", tokens, channels, gelu)


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "gelu"), [(1536, False), (8960, True)], ids=["1536", "8960-gelu"])
def test_in_cache(bench, channels, gelu):
    measure(bench, f"tokens-4680-channels-{channels}{'-gelu' * gelu}-in-cache", 4680, channels, gelu, cached=True)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "tokens-16-smoke", 16, 48, True, torch.float32)
