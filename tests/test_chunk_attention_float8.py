"""chunk_attention_float8: attention on float8 keys as they are stored, against its own numbers in float64."""

import re

import pytest
import torch
from test_chunk_attention_hopper import compiled, gluon

import raven
from raven import backends
from raven.cache import KVCache
from raven.ops import chunk_attention, chunk_attention_float8, kv_append, quantize_rows
from raven.ops.chunk_attention_float8 import _chunk_attention_float8
from raven.reference.chunk_attention import dense_attention
from raven.reference.kv_append import dequantize, quantize
from raven.spans import Spans
from raven.testing import relative_rms

FLOAT8 = torch.float8_e4m3fn
# Runs of queries over key ranges that end anywhere; one run sees nothing.
ROWS = [((0, 7), [(0, 5), (9, 30)]), ((7, 9), []), ((9, 20), [(3, 21)])]


def make(B=2, Lq=20, Lk=33, H=4, Hkv=2, D=16, dtype=torch.float32, device="cpu"):
    q, k, v = (torch.randn(B, L, h, D, device=device) for L, h in ((Lq, H), (Lk, Hkv), (Lk, Hkv)))
    stored, scale = quantize(k * torch.logspace(-1, 1, Lk, device=device)[:, None, None])
    return q.to(dtype), stored, v.to(dtype), scale


def expected(q, k, v, rows, k_scale, scale=None):
    """Dense attention of the rounded numbers in float64."""
    mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    for (q0, q1), ranges in rows:
        for k0, k1 in ranges:
            mask[q0:q1, k0:k1] = True
    q, k = dequantize(*quantize_rows(q), torch.float64), dequantize(k, k_scale, torch.float64)
    return dense_attention(q, k, v.double(), mask, scale or q.shape[-1] ** -0.5)[0]


def check(rows, limit, scale=None, **sizes):
    q, k, v, k_scale = make(**sizes)
    out = chunk_attention_float8(q, k, v, Spans.build(rows), k_scale, scale)
    assert out.shape == q.shape and out.dtype == q.dtype
    want = expected(q, k, v, rows, k_scale, scale)
    assert relative_rms(out, want) <= limit
    assert (out[(want == 0).all(-1)] == 0).all()


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 3e-3)])
def test_rule(dtype, limit, scale):
    check(ROWS, limit, scale, dtype=dtype)


def test_is_near_attention_of_the_numbers_themselves():
    q, k, v, k_scale = make()
    spans = Spans.build(ROWS)
    want = chunk_attention(q, dequantize(k, k_scale, q.dtype), v, spans)
    assert 1e-4 < relative_rms(chunk_attention_float8(q, k, v, spans, k_scale), want) < 0.06


def test_takes_what_a_cache_holds():
    cache = KVCache(1, 1, 2, 16, 5, max_chunks=1, dtype=FLOAT8)
    cache.begin(5, frame=0, frames=1)
    q, k, v = torch.randn(3, 1, 5, 2, 16)
    q = kv_append(q, k, v, None, None, torch.zeros(5, 3, dtype=torch.int32), cache, 0)
    keys, values = cache.read(0, torch.float32)
    out = chunk_attention_float8(q, cache.k[0], values, cache.spans, cache.k_scale[0])
    assert relative_rms(out, chunk_attention(q, keys, values, cache.spans)) < 0.06


def test_empty():
    q, k, v, k_scale = make()
    nothing = Spans.build([((0, 20), [])])
    assert not chunk_attention_float8(q, k[:, :0], v[:, :0], nothing, k_scale[:, :0]).any()
    assert chunk_attention_float8(q[:, :0], k, v, Spans.build([]), k_scale).shape == (2, 0, 4, 16)


def test_opcheck():
    q, k, v, k_scale = make()
    spans = Spans.build(ROWS)
    lists = (spans.q_ranges, spans.kv_indptr, spans.kv_ranges)
    # Not its check of the schema, which multiplies every argument by 0: PyTorch has no product of float8.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_chunk_attention_float8, (*quantize_rows(q), k, k_scale, v, *lists, 0.25), test_utils=checks)


ERRORS = [
    (ValueError, "k: got shape", lambda a: {"k": a["k"][:1]}),
    (ValueError, "v: got shape", lambda a: {"v": a["v"][:, 1:]}),
    (ValueError, "k_scale: got shape", lambda a: {"k_scale": a["k_scale"][:, 1:]}),
    (TypeError, "k: got dtype float32, expected float8_e4m3fn", lambda a: {"k": a["k"].float()}),
    (TypeError, "v: got dtype float16", lambda a: {"v": a["v"].half()}),
    (ValueError, "k: got 2 heads, expected a divisor of the 3", lambda a: {"q": a["q"][:, :, :3]}),
    (ValueError, "q: got requires_grad=True", lambda a: {"q": a["q"].requires_grad_()}),
    (ValueError, "v: got device meta", lambda a: {"v": a["v"].to("meta")}),
    (ValueError, "layout: got ranges that reach query 20 and key 30", lambda a: {"q": a["q"][:, :5]}),
    (ValueError, "scale: got 0", lambda a: {"scale": 0}),
    (TypeError, "layout: got int", lambda a: {"layout": 3}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    q, k, v, k_scale = make()
    arguments = {"q": q, "k": k, "v": v, "layout": Spans.build(ROWS), "k_scale": k_scale}
    with pytest.raises(error, match=re.escape(message)):
        chunk_attention_float8(**arguments | change(arguments))


@pytest.mark.aot
@pytest.mark.skipif(backends.interpreting(), reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("D", [64, 128])
def test_machine_code(D):
    pytest.importorskip("triton")
    if told := gluon.compiler_reason():
        pytest.skip(told)
    kernel = compiled("bf16", D, float8=True)
    ptx = kernel.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3", ptx) and re.search(r"wgmma\.mma_async\S*bf16\.bf16", ptx)
    assert kernel.metadata.shared <= 227 * 1024


@pytest.fixture
def hopper_kernel():
    """The Triton backend with its Hopper kernel, or a skip that says why not."""
    if told := gluon.reason(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")):
        pytest.skip(told)
    raven.set_backend("triton")
    yield
    raven.set_backend(None)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 2), (12, 12)], ids=str)
def test_gpu(hopper_kernel, heads, dtype, D):
    rows = [((0, 300), [(0, 129), (140, 700)]), ((300, 333), []), ((333, 460), [(37, 39)]), ((460, 900), [(0, 1100)])]
    check(rows, 3e-3, B=2, Lq=900, Lk=1100, H=heads[0], Hkv=heads[1], D=D, dtype=dtype, device="cuda")


@pytest.mark.gpu
def test_gpu_reads_nothing_of_what_is_not_seen(hopper_kernel):
    """Rows outside of the ranges may hold anything, NaN among them, and so may their scales."""
    q, k, v, k_scale = make(Lq=200, Lk=400, H=4, Hkv=4, D=128, dtype=torch.bfloat16, device="cuda")
    rows = [((0, 200), [(5, 150), (260, 391)])]
    want = chunk_attention_float8(q, k, v, Spans.build(rows), k_scale)
    for hidden in (slice(0, 5), slice(150, 260), slice(391, 400)):
        k.view(torch.uint8)[:, hidden] = 0x7F
        v[:, hidden] = torch.nan
        k_scale[:, hidden] = torch.nan
    assert torch.equal(chunk_attention_float8(q, k, v, Spans.build(rows), k_scale), want)


@pytest.mark.gpu
def test_gpu_graph(hopper_kernel):
    q, k, v, k_scale = make(Lq=300, Lk=400, H=4, Hkv=4, D=128, dtype=torch.bfloat16, device="cuda")
    spans = Spans.build([((0, 300), [(0, 400)])])
    chunk_attention_float8(q, k, v, spans, k_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunk_attention_float8(q, k, v, spans, k_scale)
    q.normal_()
    graph.replay()
    assert torch.equal(out, chunk_attention_float8(q, k, v, spans, k_scale))
