"""Attention on keys of a float8 cache, 4,680 queries of Wan 1.3B (12 heads of 128): beside scaling the keys back first.

Useful work is that of the attention; rounding the queries counts as time. The peer `scaled back` is what the cached
forward does without this op: `read_rows` of the keys, then `chunk_attention` in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE

import raven
from raven.ops import chunk_attention, chunk_attention_float8, quantize_rows, read_rows
from raven.reference.kv_append import dequantize, quantize
from raven.spans import Spans
from raven.testing import relative_rms


def measure(bench, name, queries, keys, heads, dim, dtype=torch.bfloat16):
    q, k, v = (torch.randn(1, n, heads, dim, device=DEVICE, dtype=dtype) for n in (queries, keys, keys))
    stored, scale = quantize(k.float())
    spans = Spans.build([((0, queries), [(0, keys)])])
    rows = torch.arange(keys, dtype=torch.int32, device=DEVICE)
    scratch = torch.empty_like(k)

    def run():
        return chunk_attention_float8(q, stored, v, spans, scale)

    def scaled_back():
        read_rows(stored, rows, scratch, scale)
        forced = raven.get_backend()
        raven.set_backend(None)  # the fastest kernel there is
        try:
            return chunk_attention(q, scratch, v, spans)
        finally:
            raven.set_backend(forced)

    def check():
        """A few queries, against float64 of the numbers that were rounded, and of those before rounding."""
        some = slice(0, queries, max(1, queries // 64))
        rounded = dequantize(*quantize_rows(q), torch.float64)[:, some], dequantize(stored, scale, torch.float64)
        given = q.double()[:, some], k.double()
        want, exact = (
            torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (*pair, v.double())))
            for pair in (rounded, given)
        )
        out = run()[:, some].transpose(1, 2)
        error = relative_rms(out, want)
        assert error <= 6e-3, f"relative RMS error {error:.2e} on the rounded numbers"
        return {"rounded": error, "float8": relative_rms(out, exact)}

    bench.row(
        op="chunk_attention_float8",
        case=name,
        direction="forward",
        backend=raven.explain("chunk_attention_float8", v).chosen,
        check=check,
        run=run,
        work=4 * queries * keys * heads * dim,
        unit="TFLOP/s",
        peers={"scaled back": scaled_back},
        graph=DEVICE == "cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [4680, 18720, 32760])
def test_decode(bench, keys):
    measure(bench, f"decode-4680x{keys}", 4680, keys, 12, 128)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "decode-16x48-smoke", 16, 48, 2, 16, torch.float32)
