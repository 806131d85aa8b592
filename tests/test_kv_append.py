"""kv_append: the norm and rotary of qk_norm_rope, and a cache written exactly where it should be."""

import pytest
import torch
from append_cases import CANARY, low_level, make_all
from rope_cases import assert_rounded, in_double

import raven
from raven.cache import KVCache
from raven.ops import kv_append, qk_norm_rope
from raven.ops.kv_append import _kv_append
from raven.reference import qk_norm_rope as reference

EVERY_GPU_BACKEND = True


def make_cache(B=2, Hk=2, D=16, tokens=5, dtype=torch.float32, device="cpu", **kwargs):
    """Two layers, every element a canary."""
    kwargs = {"sink": 0, "window": 1} | kwargs
    cache = KVCache(2, B, Hk, D, tokens, dtype=dtype, device=device, **kwargs)
    for buffer in (*cache.k, *cache.v):
        buffer.fill_(CANARY)
    return cache


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


def test_cuda_says_what_it_cannot_write():
    q, k, v, *rest = make_all(dtype=torch.bfloat16)
    cache = make_cache(dtype=torch.float32)
    reasons = raven.explain("kv_append", q, k, v, *rest[:2], cache.k[0], cache.v[0]).reasons
    assert "k_cache has dtype torch.float32, neither that of q" in reasons["cuda"]
    odd = torch.empty(2, 8, 2, 17)[..., :16]
    reasons = raven.explain("kv_append", q.float(), k, v, *rest[:2], cache.k[0], odd).reasons
    assert "v_cache has strides" in reasons["cuda"]


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


@pytest.mark.gpu
def test_gpu_negative_slots():
    check_rows(low_level(torch.float32, device="cuda"))


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
