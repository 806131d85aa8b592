"""kv_append into a float8 cache: the rule of its scales, and rows written exactly where they should be."""

import pytest
import torch
from append_cases import CANARY, low_level, make_all
from rope_cases import assert_rounded, in_double

import raven
from raven.cache import KVCache
from raven.ops import kv_append
from raven.ops.kv_append import _kv_append_float8
from raven.reference import qk_norm_rope as reference

EVERY_GPU_BACKEND = True
FLOAT8 = torch.float8_e4m3fn


def plainly_quantized(x):
    """The rule, one head of one token at a time: x [B, L, H, D] to float8 [B, L, H, D] and scales [B, L, H]."""
    stored, scales = torch.empty(x.shape, dtype=FLOAT8), torch.empty(x.shape[:3])
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for h in range(x.shape[2]):
                largest = max(abs(number) for number in x[b, n, h].tolist())
                scales[b, n, h] = max(largest, 2.0**-64) / 448
                stored[b, n, h] = torch.tensor([number / float(scales[b, n, h]) for number in x[b, n, h].tolist()])
    return stored, scales


def check_float8(arguments, cache):
    """Append to layer 1 and compare with the rule; only what lies between two float8 numbers may go either way."""
    q, k, v, *rest = arguments
    before = [x.view(torch.uint8).clone() for x in (cache.k[0], cache.k[1], cache.v[0], cache.v[1])]
    q_out = kv_append(*arguments, cache, 1)
    q_want, k_want = reference.qk_norm_rope(*in_double((q, k, *rest)))
    assert_rounded(q_out, q_want)
    rows = cache.slots.long()
    for x, buffer, scale in ((k_want, cache.k[1], cache.k_scale[1]), (v, cache.v[1], cache.v_scale[1])):
        stored, scales = plainly_quantized(x.double().cpu())
        torch.testing.assert_close(scale[:, rows].cpu(), scales, rtol=1e-5, atol=0)
        got = buffer.view(torch.uint8)[:, rows].view(FLOAT8).double().cpu()
        different = got != stored.double()
        exact = (x.double().cpu() / scales.unsqueeze(-1))[different]
        middle = (got + stored.double())[different] / 2
        torch.testing.assert_close(exact, middle, rtol=1e-4, atol=0)
    k_read, v_read = cache.read(1, torch.float32)
    for got, want in ((k_read[:, rows], k_want), (v_read[:, rows], v.double())):
        # Half of the last of three mantissa bits, or half a step of the smallest numbers.
        limit = want.abs() * 2.0**-4 + want.abs().amax(-1, keepdim=True) * 2.0**-10 / 448
        assert ((got - want).abs() <= 1.001 * limit + 1e-6).all()
    others = torch.ones(cache.k[1].shape[1], dtype=torch.bool)
    others[rows.cpu()] = False
    now = (cache.k[0], cache.k[1], cache.v[0], cache.v[1])
    for layer, (buffer, kept) in enumerate(zip(now, before, strict=True)):
        which = others.to(buffer.device) if layer % 2 else slice(None)
        assert torch.equal(buffer.view(torch.uint8)[:, which], kept[:, which])


def make_float8_cache(**kwargs):
    cache = KVCache(2, 2, kwargs.pop("Hk", 2), kwargs.pop("D", 16), 5, window=1, dtype=FLOAT8, **kwargs)
    for buffer in (*cache.k, *cache.v):
        buffer.view(torch.uint8).fill_(0x55)
    for scale in (*cache.k_scale, *cache.v_scale):
        scale.fill_(CANARY)
    cache.begin(5, frame=0, frames=1)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float8(dtype):
    check_float8(make_all(dtype=dtype), make_float8_cache())


def test_float8_scales_are_written_in_their_rows_only():
    cache = make_float8_cache()
    cache.commit()
    cache.begin(5, frame=1, frames=1)
    kv_append(*make_all(), cache, 0)
    for scale in (cache.k_scale, cache.v_scale):
        assert (scale[0][:, :5] == CANARY).all() and (scale[0][:, 5:] > 0).all() and (scale[1] == CANARY).all()


def check_float8_extremes(device="cpu"):
    """Zeros, numbers too small and too large for float8, and NaN and infinity, which spoil their own head only."""
    cache = make_float8_cache(device=device)
    q, k, v, _, _, positions = make_all(device=device)
    v[0, 0], v[0, 1], v[0, 2] = 0.0, v[0, 1] * 1e-30, v[0, 2] * 1e30
    v[1, 0, 0, 3], v[1, 1, 1, 0] = torch.nan, torch.inf
    kv_append(q, k, v, None, None, positions, cache, 0)
    _, got = cache.read(0, torch.float32)
    assert got[1, 0, 0].isnan().all() and got[1, 1, 1].isnan().all()
    for b, n, h in ((1, 0, 1), (1, 1, 0), (0, 0, 0), (0, 2, 1)):
        torch.testing.assert_close(got[b, n, h], v[b, n, h], rtol=0.07, atol=float(v[b, n, h].abs().max()) * 2e-3)
    assert got[0, 1].abs().max() < 1e-28  # below the smallest scale


def test_float8_extremes():
    check_float8_extremes()


def test_float8_is_not_for_every_backend(monkeypatch):
    q, k, v, *rest = make_all()
    cache = make_float8_cache()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = raven.explain("kv_append", q, k, v, *rest[:2], cache.k[0], cache.v[0]).reasons
    assert "float8_e4m3fn, which Triton's interpreter" in reasons["triton"] or "not installed" in reasons["triton"]
    assert reasons["reference"] is None


def test_float8_caches_agree_in_dtype():
    cache = make_float8_cache()
    cache.v = tuple(x.float() for x in cache.v)
    with pytest.raises(TypeError, match="cache.v: got dtype float32, expected float8_e4m3fn"):
        kv_append(*make_all(), cache, 0)


def low_level_float8(**kwargs):
    """Arguments of the float8 op: the middle row is left out."""
    *head, k_cache, v_cache, eps, theta, per_head = low_level(**kwargs)
    caches = [x.to(FLOAT8) for x in (k_cache, v_cache)]
    scales = [torch.full(x.shape[:3], CANARY, device=x.device) for x in caches]
    return (*head, *caches, *scales, eps, theta, per_head)


def check_float8_rows(arguments):
    caches, scales = arguments[7:9], arguments[9:11]
    before = [x.view(torch.uint8).clone() for x in caches]
    _kv_append_float8(*arguments)
    written = [6, 0, 2]
    others = [row for row in range(8) if row not in written]
    for cache, kept, scale in zip(caches, before, scales, strict=True):
        assert torch.equal(cache.view(torch.uint8)[:, others], kept[:, others])
        assert (scale[:, others] == CANARY).all() and (scale[:, written] > 0).all()


def test_float8_leaves_out_negative_slots():
    check_float8_rows(low_level_float8())


def test_float8_opcheck():
    # Not its check of the schema, which multiplies every argument by 0: PyTorch has no product of float8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_kv_append_float8, low_level_float8(), test_utils=checks)


def test_float8_compiles_to_one_graph():
    arguments = make_all()
    eager, compiled = make_float8_cache(), make_float8_cache()
    f = torch.compile(kv_append, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(*arguments, compiled, 1), kv_append(*arguments, eager, 1))
    for got, want in zip((*compiled.k, *compiled.v), (*eager.k, *eager.v), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    for got, want in zip((*compiled.k_scale, *compiled.v_scale), (*eager.k_scale, *eager.v_scale), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(12, 12, 128), (40, 40, 128), (8, 2, 64), (3, 5, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_float8(dtype, sizes):
    H, Hk, D = sizes
    check_float8(make_all(H=H, Hk=Hk, D=D, dtype=dtype, device="cuda"), make_float8_cache(Hk=Hk, D=D, device="cuda"))


@pytest.mark.gpu
def test_gpu_float8_extremes():
    check_float8_extremes("cuda")


@pytest.mark.gpu
def test_gpu_float8_leaves_out_negative_slots():
    check_float8_rows(low_level_float8(device="cuda"))
