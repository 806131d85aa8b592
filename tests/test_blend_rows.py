"""blend_rows: a moving average in place, exact to the last bit it can hold, and nothing else touched."""

import pytest
import torch

import raven
from raven.ops import blend_rows
from raven.ops.blend_rows import _blend_rows, _blend_rows_exactly

ALPHA = 0.875


def make(dtype=torch.float32, device="cpu", kept=True, B=2, S=12, T=5, H=3, D=16):
    """(cache, lost, target, source, tokens, alpha): rows 1 .. 4 take in rows 7 .. 10."""
    cache = torch.randn(B, S, H, D, device=device).to(dtype)
    lost = (torch.randn(B, T, H, D, device=device) * torch.finfo(dtype).eps).to(dtype) if kept else None
    return cache, lost, 1, 7, 4, ALPHA


def check(arguments):
    cache, lost, target, source, tokens, alpha = arguments
    before = cache.clone()
    kept = None if lost is None else lost.clone()
    mean = before[:, target : target + tokens].double()
    if kept is not None:
        mean = mean + kept[:, :tokens].double()
    want = alpha * mean + (1 - alpha) * before[:, source : source + tokens].double()
    blend_rows(*arguments)
    got = cache[:, target : target + tokens].double()
    unit = torch.finfo(cache.dtype).eps
    computed = 4 * torch.finfo(torch.float64 if cache.dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(got, want, rtol=unit, atol=computed)  # the two terms are of size 4 at most
    if lost is not None:
        # Both together are as exact as the computation is, or as two numbers of this dtype can be.
        torch.testing.assert_close(got + lost[:, :tokens].double(), want, rtol=unit * unit, atol=computed)
        assert torch.equal(lost[:, tokens:], kept[:, tokens:])
    others = [i for i in range(cache.shape[1]) if not target <= i < target + tokens]
    assert torch.equal(cache[:, others], before[:, others])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rule(dtype, kept):
    check(make(dtype, kept=kept))


def test_ends_of_alpha():
    for alpha, first in ((1.0, 1), (0.0, 7)):
        cache, _, target, source, tokens, _ = make()
        want = cache[:, first : first + tokens].clone()
        blend_rows(cache, None, target, source, tokens, alpha)
        assert torch.equal(cache[:, 1:5], want)


def test_empty_and_strided():
    cache, lost, *_ = make()
    before = cache.clone()
    blend_rows(cache, lost, 3, 3, 0, ALPHA)
    assert torch.equal(cache, before)
    turned = cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert "cache has strides" in raven.explain("blend_rows", turned, None).reasons["triton"]
    many = torch.empty(65536, 2, 1, 16, device="meta")
    assert "cache has batch 65536, more than the 65535" in raven.explain("blend_rows", many, None).reasons["triton"]
    check((turned, lost, 1, 7, 4, ALPHA))


@pytest.mark.parametrize("kept", [False, True])
def test_opcheck(kept):
    cache, lost, *rest = make(kept=kept)
    if kept:
        torch.library.opcheck(_blend_rows_exactly, (cache, lost, *rest))
    else:
        torch.library.opcheck(_blend_rows, (cache, *rest))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: torch.zeros(1, 2, 3)}, ValueError, "cache: got shape"),
        ({0: torch.zeros(2, 12, 3, 16, dtype=torch.int32)}, TypeError, "cache: got dtype int32"),
        ({1: torch.zeros(2, 5, 3, 8)}, ValueError, "lost: got shape"),
        ({1: torch.zeros(2, 3, 3, 16)}, ValueError, "lost: got 3 rows, expected at least 4"),
        ({1: torch.zeros(2, 5, 3, 16, dtype=torch.float64)}, TypeError, "lost: got dtype float64"),
        ({2: 9}, ValueError, "target: got rows 9 to 13, expected rows below 12"),
        ({3: -1}, ValueError, "source: got -1"),
        ({3: 4}, ValueError, "source: got row 4, expected 4 rows that do not overlap"),
        ({5: 1.5}, ValueError, "alpha: got 1.5"),
        ({0: torch.zeros(2, 12, 3, 16, requires_grad=True)}, ValueError, "cache: got requires_grad"),
    ],
)
def test_bad_arguments(change, error, match):
    arguments = [change.get(i, x) for i, x in enumerate(make())]
    with pytest.raises(error, match=match):
        blend_rows(*arguments)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", [False, True])
def test_interpreted(triton_backend, dtype, kept):
    check(make(dtype, kept=kept))
    check(make(dtype, kept=kept, B=1, H=40, D=64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
def test_gpu(dtype, kept):
    raven.set_backend("triton")
    try:
        check(make(dtype, "cuda", kept))
        check(make(dtype, "cuda", kept, H=12, D=128))
    finally:
        raven.set_backend(None)
