"""kv_append: the norm and rotary of qk_norm_rope, and a cache written exactly where it should be."""

import pytest
import torch
from rope_cases import assert_rounded, in_double, make

import raven
from raven.cache import KVCache
from raven.ops import kv_append, qk_norm_rope
from raven.ops.kv_append import _kv_append, _kv_append_float8
from raven.reference import qk_norm_rope as reference

EVERY_GPU_BACKEND = True
CANARY = -77.0


def make_cache(B=2, Hk=2, D=16, tokens=5, dtype=torch.float32, device="cpu", **kwargs):
    """Two layers, every element a canary."""
    kwargs = {"sink": 0, "window": 1} | kwargs
    cache = KVCache(2, B, Hk, D, tokens, dtype=dtype, device=device, **kwargs)
    for buffer in (*cache.k, *cache.v):
        buffer.fill_(CANARY)
    return cache


def make_all(**kwargs):
    q, k, q_weight, k_weight, positions = make(**kwargs)
    return q, k, torch.randn_like(k), q_weight, k_weight, positions


def check_append(arguments, cache, per_head=False):
    """Append to layer 1; compare with qk_norm_rope bit for bit, and every other row and layer with the canary."""
    q, k, v, *rest = arguments
    untouched = [x.clone() for x in (*cache.k, *cache.v)]
    q_out = kv_append(*arguments, cache, 1, per_head=per_head)
    q_want, k_want = qk_norm_rope(q, k, *rest, per_head=per_head)
    assert torch.equal(q_out, q_want)
    rows = cache.slots.long()
    assert torch.equal(cache.k[1][:, rows], k_want) and torch.equal(cache.v[1][:, rows], v)
    others = torch.ones(cache.k[1].shape[1], dtype=torch.bool)
    others[rows.cpu()] = False
    now = (*cache.k, *cache.v)
    for layer, buffer in enumerate(now):
        kept = others.to(buffer.device) if layer % 2 else slice(None)
        assert torch.equal(buffer[:, kept], untouched[layer][:, kept])


def check_ring(device="cpu", dtype=torch.float32, steps=4, **sizes):
    """Chunks of different lengths go round a ring of two slots; each is written twice, as in denoising."""
    L = 5
    cache = make_cache(tokens=L, device=device, dtype=dtype, **{name: sizes[name] for name in ("Hk", "D")})
    for step in range(steps):
        length = L - step % 2
        arguments = make_all(L=length, device=device, dtype=dtype, frames=2000, **sizes)
        cache.begin(length, frame=3 * step, frames=3)
        for _ in range(2):
            check_append(arguments, cache)
        cache.commit()


def test_writes_its_slot_and_nothing_else():
    check_ring(H=4, Hk=2, D=16)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_per_head(dtype, per_head):
    cache = make_cache(dtype=dtype)
    cache.begin(5, frame=0, frames=1)
    check_append(make_all(dtype=dtype, per_head=per_head), cache, per_head)


def low_level(cache_dtype=torch.float32, slots=(6, -1, 0, 2, -3), **kwargs):
    """Arguments of the op itself: rows in any order, negative ones are left out."""
    arguments = make_all(**kwargs)
    k = arguments[1]
    shape = (k.shape[0], 8, *k.shape[2:])
    k_cache, v_cache = (torch.full(shape, CANARY, dtype=cache_dtype, device=k.device) for _ in range(2))
    return (*arguments, torch.tensor(slots, dtype=torch.int32, device=k.device), k_cache, v_cache, 1e-6, 1e4, False)


def check_rows(arguments):
    """Keys are rounded straight to the cache's dtype, values cast to it, rows of negative slots and others are kept."""
    q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, *_ = arguments
    q_out = _kv_append(*arguments)
    q_want, k_want = reference.qk_norm_rope(*in_double((q, k, q_weight, k_weight, positions)))
    assert_rounded(q_out, q_want)
    written = slots >= 0
    rows = slots[written].long()
    assert_rounded(k_cache[:, rows], k_want[:, written])
    assert torch.equal(v_cache[:, rows], v[:, written].to(v_cache.dtype))
    others = [row for row in range(k_cache.shape[1]) if row not in rows.tolist()]
    for cache in (k_cache, v_cache):
        assert (cache[:, others] == CANARY).all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_rows_any_cache_dtype(cache_dtype):
    check_rows(low_level(cache_dtype))


def test_cast_goes_straight_to_the_cache():
    """float16 inputs into a float32 cache keep the digits that float16 would have dropped."""
    check_rows(low_level(torch.float32, dtype=torch.float16))


def check_raw(**kwargs):
    """Raw keys are what position 0 gives, which is no rotation at all; queries and values are as ever."""
    arguments = make_all(frames=2000, **kwargs)
    q, k, v, q_weight, k_weight, positions = arguments
    cache = make_cache(
        k.shape[0], k.shape[2], k.shape[3], k.shape[1], k.dtype, k.device, keys="raw", grid=(1, k.shape[1])
    )
    cache.begin(k.shape[1], frame=1999, frames=1)
    q_out = kv_append(*arguments, cache, 1)
    assert torch.equal(q_out, qk_norm_rope(q, k, q_weight, k_weight, positions)[0])
    rows = cache.slots.long()
    unmoved = torch.zeros_like(positions)
    assert torch.equal(cache.k[1][:, rows], qk_norm_rope(q, k, q_weight, k_weight, unmoved)[1])
    assert torch.equal(cache.v[1][:, rows], v)
    assert (cache.k[0] == CANARY).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [True, False])
def test_raw_keys(dtype, weights):
    check_raw(dtype=dtype, weights=weights)


@pytest.mark.interpret
@pytest.mark.parametrize("weights", [True, False])
def test_interpreted_raw_keys(triton_backend, weights):
    check_raw(weights=weights, H=3, Hk=3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [True, False])
def test_gpu_raw_keys(weights):
    check_raw(weights=weights, L=300, H=12, Hk=12, D=128, dtype=torch.bfloat16, device="cuda")


def test_empty():
    arguments = low_level(slots=(), L=0)
    assert _kv_append(*arguments).shape == (2, 0, 4, 16)
    assert (arguments[7] == CANARY).all()


@pytest.mark.parametrize("weights", [True, False])
def test_opcheck(weights):
    torch.library.opcheck(_kv_append, low_level(weights=weights))


def test_compiles_to_one_graph():
    arguments = make_all()
    eager, compiled = make_cache(), make_cache()
    for cache in (eager, compiled):
        cache.begin(5, frame=0, frames=1)
    f = torch.compile(kv_append, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(*arguments, compiled, 1), kv_append(*arguments, eager, 1))
    for got, want in zip((*compiled.k, *compiled.v), (*eager.k, *eager.v), strict=True):
        assert torch.equal(got, want)


def test_refuses_gradients():
    arguments = make_all()
    cache = make_cache()
    cache.begin(5, frame=0, frames=1)
    arguments[3].requires_grad_()
    with pytest.raises(ValueError, match=r"q_weight: got requires_grad=True.*no_grad"):
        kv_append(*arguments, cache, 0)
    with torch.no_grad():
        kv_append(*arguments, cache, 0)
    assert (cache.k[0][:, :5] != CANARY).any()


NAMES = ("q", "k", "v", "q_weight", "k_weight", "positions")
ERRORS = [
    (ValueError, "v: got shape", lambda a: {"v": a["v"][:, :, :1]}),
    (TypeError, "v: got dtype float16", lambda a: {"v": a["v"].half()}),
    (ValueError, "v: got device meta", lambda a: {"v": a["v"].to("meta")}),
    (ValueError, "layer: got 2, expected 0 to 1", lambda a: {"layer": 2}),
    (ValueError, "layer: got -1", lambda a: {"layer": -1}),
    (ValueError, "k: got 4 tokens, expected 5", lambda a: {x: a[x][:, :4] for x in ("q", "k", "v", "positions")}),
    (ValueError, "cache.k: got shape", lambda a: {x: a[x][:1] for x in ("q", "k", "v", "positions")}),
    (ValueError, "positions: got shape", lambda a: {"positions": a["positions"][:, :4]}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    cache = make_cache()
    cache.begin(5, frame=0, frames=1)
    arguments = dict(zip(NAMES, make_all(), strict=True)) | {"cache": cache, "layer": 0}
    with pytest.raises(error, match=message):
        kv_append(**arguments | change(arguments))
    assert all((x == CANARY).all() for x in (*cache.k, *cache.v))


def test_forward_mode_derivative_is_not_dropped():
    cache = make_cache()
    cache.begin(5, frame=0, frames=1)
    q, k, v, *rest = make_all()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="kv_append: forward-mode derivatives"):
        torch.func.jvp(lambda v: kv_append(q, k, v, *rest, cache, 0), (v,), (v,))


def test_needs_a_chunk_in_flight():
    with pytest.raises(RuntimeError, match="begin"):
        kv_append(*make_all(), make_cache(), 0)


def test_unpacked_cache_is_for_the_reference():
    *head, k_cache, v_cache, eps, theta, per_head = low_level()
    turned = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    reasons = raven.explain("kv_append", *head[:5], turned, v_cache).reasons
    assert "k_cache has strides" in reasons["triton"] and reasons["reference"] is None
    check_rows((*head, turned, v_cache, eps, theta, per_head))


@pytest.mark.interpret
def test_interpreted(triton_backend):
    check_ring(H=3, Hk=3, D=16, steps=2)


@pytest.mark.interpret
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_interpreted_rows(triton_backend, cache_dtype):
    arguments = low_level(cache_dtype, dtype=torch.float16, B=1)
    want = [x.clone() for x in arguments[7:9]]
    q_out = _kv_append(*arguments)
    raven.set_backend("reference")
    q_want = _kv_append(*arguments[:7], *want, *arguments[9:])
    torch.testing.assert_close(q_out, q_want, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(arguments[7], want[0], rtol=1e-3, atol=1e-6)
    assert torch.equal(arguments[8], want[1])


# Float8 storage

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


def test_cuda_says_what_it_cannot_write():
    q, k, v, *rest = make_all(dtype=torch.bfloat16)
    cache = make_cache(dtype=torch.float32)
    reasons = raven.explain("kv_append", q, k, v, *rest[:2], cache.k[0], cache.v[0]).reasons
    assert "k_cache has dtype torch.float32, neither that of q" in reasons["cuda"]
    odd = torch.empty(2, 8, 2, 17)[..., :16]
    reasons = raven.explain("kv_append", q.float(), k, v, *rest[:2], cache.k[0], odd).reasons
    assert "v_cache has strides" in reasons["cuda"]


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
def test_gpu_negative_slots():
    check_rows(low_level(torch.float32, device="cuda"))
    check_float8_rows(low_level_float8(device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(12, 12, 128), (40, 40, 128), (8, 2, 64)], ids=str)
def test_gpu(dtype, sizes):
    check_ring("cuda", dtype, H=sizes[0], Hk=sizes[1], D=sizes[2])


@pytest.mark.gpu
def test_gpu_slices_of_a_fused_projection():
    cache = make_cache(Hk=12, D=128, tokens=900, dtype=torch.bfloat16, device="cuda")
    cache.begin(900, frame=2000, frames=3)
    q, k, v, *rest = make_all(L=900, H=12, Hk=12, D=128, dtype=torch.bfloat16, device="cuda")
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], dim=2)
    check_append([x.view_as(q) for x in fused.split(1536, dim=2)] + rest, cache)


@pytest.mark.gpu
def test_gpu_row_beyond_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    *head, _, _, eps, theta, per_head = low_level(B=1, L=5, H=8, Hk=8, D=128, dtype=torch.bfloat16, device="cuda")
    rows = 2**31 // (8 * 128) + 8
    caches = [torch.zeros(1, rows, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    head[6] = torch.arange(rows - 5, rows, dtype=torch.int32, device="cuda")
    _kv_append(*head, *caches, eps, theta, per_head)
    k_want = qk_norm_rope(head[0], head[1], *head[3:6])[1]
    assert torch.equal(caches[0][:, -5:], k_want) and torch.equal(caches[1][:, -5:], head[2])
    assert not caches[0][:, :-5].any() and not caches[1][:, :-5].any()


@pytest.mark.gpu
def test_gpu_reads_nothing_back():
    cache = make_cache(Hk=4, D=64, dtype=torch.bfloat16, device="cuda")
    cache.begin(5, frame=0, frames=1)
    arguments = make_all(H=4, Hk=4, D=64, dtype=torch.bfloat16, device="cuda")
    kv_append(*arguments, cache, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kv_append(*arguments, cache, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
