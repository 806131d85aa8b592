"""Norm, rotary and the write into the cache at Wan shapes: 12 heads of 128 (1.3B) and 40 (14B), bfloat16.

Bytes that must move: q, k and v are read, q and the cache rows of k and v are written; in float8 rows one byte an
element, and four a head for the scale. A 4,680-token call nearly fits
the L2 cache, so several sets of inputs, outputs and caches take turns.
"""

from __future__ import annotations

import pytest
import torch
from bench_qk_norm_rope import LIMITS, Case, as_models_write_it
from harness import DEVICE, rounds_beyond_cache

from raven import explain
from raven.cache import KVCache
from raven.ops import kv_append, qk_norm_rope
from raven.reference import qk_norm_rope as reference
from raven.reference.kv_append import dequantize
from raven.testing import assert_bitwise, relative_rms


class Append(Case):
    """Inputs as of qk_norm_rope, and a cache of three chunks whose second is in flight."""

    def __init__(self, tokens: int, heads: int, dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
        super().__init__(tokens, heads, dim, dtype)
        self.cache = KVCache(1, 1, heads, dim, tokens, max_chunks=3, dtype=stored, device=DEVICE)
        self.cache.begin(tokens, 0, 3)
        self.cache.commit()
        self.cache.begin(tokens, 3, 3)

    def append(self) -> torch.Tensor:
        with torch.no_grad():
            return kv_append(self.q, self.k, self.v, *self.weights, self.positions, self.cache, 0)

    def eager(self) -> torch.Tensor:
        """The usual code, with a copy into the slot."""
        q, k = as_models_write_it(*self.inputs)
        rows = slice(self.q.shape[1], 2 * self.q.shape[1])
        self.cache.k[0][:, rows] = k
        self.cache.v[0][:, rows] = self.v
        return q

    @property
    def bytes_moved(self) -> int:
        """Of one call."""
        written = self.cache.nbytes // 3  # one chunk of three
        return (2 * self.q.numel() + 2 * self.k.numel()) * self.q.element_size() + written

    def check_float8(self) -> float:
        """Queries are as exact as those of qk_norm_rope; what is read back is as near as three bits allow."""
        q, k = reference.qk_norm_rope(*(x.double() if x.is_floating_point() else x for x in self.inputs))
        error = relative_rms(self.append(), q)
        assert error <= LIMITS[self.q.dtype], f"relative RMS error {error:.2e} of q"
        tokens = self.q.shape[1]
        stored = ((self.cache.k[0], self.cache.k_scale[0]), (self.cache.v[0], self.cache.v_scale[0]))
        errors = [
            relative_rms(dequantize(*(x[:, tokens : 2 * tokens] for x in pair), torch.float32), want)
            for pair, want in zip(stored, (k, self.v), strict=True)
        ]
        assert max(errors) <= 3e-2, f"relative RMS errors {errors} of what is read back"
        return max(errors)

    def check_append(self) -> float:
        """Bit for bit what qk_norm_rope gives, in its rows and nowhere else; qk_norm_rope is held against float64."""
        for buffer in (self.cache.k[0], self.cache.v[0]):
            buffer.fill_(-77.0)
        q, k = qk_norm_rope(*self.inputs)
        assert_bitwise(self.append(), q, "q")
        tokens = self.q.shape[1]
        for buffer, want in ((self.cache.k[0], k), (self.cache.v[0], self.v)):
            assert_bitwise(buffer[:, tokens : 2 * tokens], want, "cache rows")
            assert (buffer[:, :tokens] == -77.0).all() and (buffer[:, 2 * tokens :] == -77.0).all()
        return self.check("forward")


def measure(bench, name, tokens, heads, dim=128, dtype=torch.bfloat16, stored=None, peers=False):
    stored = stored or dtype
    first = Append(tokens, heads, dim, dtype, stored)
    bytes_moved = first.bytes_moved
    cases = [first]
    cases += [Append(tokens, heads, dim, dtype, stored) for _ in range(rounds_beyond_cache(bytes_moved) - 1)]
    bench.row(
        op="kv_append",
        case=name,
        direction="forward",
        backend=explain(
            "kv_append", first.q, first.k, first.v, *first.weights, first.cache.k[0], first.cache.v[0]
        ).chosen,
        check=first.check_append if stored == dtype else first.check_float8,
        run=[case.keeping(case.append) for case in cases],
        work=bytes_moved,
        unit="TB/s",
        peers={"eager": first.eager} if peers else {},
        graph=DEVICE == "cuda" and not peers,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [60840, 4680])
def test_wan_1_3b(bench, tokens):
    measure(bench, f"tokens-{tokens}", tokens, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [60840, 4680])
def test_float8(bench, tokens):
    measure(bench, f"tokens-{tokens}-float8", tokens, 12, stored=torch.float8_e4m3fn)


@pytest.mark.gpu
def test_beside_peers(bench):
    measure(bench, "tokens-60840-events", 60840, 12, peers=True)


@pytest.mark.gpu
def test_wan_14b(bench):
    measure(bench, "tokens-4680-heads-40", 4680, 40)


def test_smoke(bench):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, "tokens-16-smoke", 16, 2, 16, torch.float32)
