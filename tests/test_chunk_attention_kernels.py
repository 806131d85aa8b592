"""chunk_attention: the kernels against a dense mask in float64, in Triton's interpreter and on a GPU."""

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    SHORT,
    check,
    check_nan_outside,
    check_spans,
    check_strided,
    deterministic,
    make,
    want_of,
)

import raven
from raven.layout import ChunkLayout
from raven.ops import chunk_attention
from raven.reference.chunk_attention import dense_attention
from raven.spans import Spans
from raven.testing import assert_as_accurate, assert_bitwise, peak_extra_bytes, relative_rms, tolerance

EVERY_GPU_BACKEND = True
GROUPS = [(64, 2, 2), (32, 4, 2), (128, 3, 1)]  # D, H, Hkv


@pytest.mark.interpret
@pytest.mark.parametrize("name", LAYOUTS)
def test_interpreted_kernels_equal_dense(name, triton_backend):
    check(LAYOUTS[name], torch.float32, head_dim=32, heads=2, key_heads=1, batch=1)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_dtypes_and_heads(dtype, shape, triton_backend):
    D, H, Hkv = shape
    check(SHORT, dtype, head_dim=D, heads=H, key_heads=Hkv, batch=1, scale=0.21)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_layouts(name, dtype):
    check(LAYOUTS[name], dtype, "cuda", head_dim=64, heads=4, key_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*GROUPS, (256, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_heads(dtype, shape):
    D, H, Hkv = shape
    for tokens in (23, 107, 128):
        layout = ChunkLayout.repacked((3, 2, 3), tokens)
        check(layout, dtype, "cuda", head_dim=D, heads=H, key_heads=Hkv, scale=0.21)


@pytest.mark.interpret
@pytest.mark.parametrize("seed", range(4))
def test_interpreted_random_spans(seed, triton_backend):
    check_spans(seed, torch.float32, "cpu", 150 + 31 * seed, 90 + 41 * seed)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(60))
def test_gpu_random_spans(seed):
    dtype, head_dim = ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64))[seed % 3]
    check_spans(seed, dtype, "cuda", 150 + 131 * seed, 90 + 141 * seed, head_dim)


@pytest.mark.interpret
def test_interpreted_nan_outside(triton_backend):
    check_nan_outside("cpu", torch.float32)


@pytest.mark.gpu
def test_gpu_nan_outside():
    check_nan_outside("cuda", torch.bfloat16)


def check_batch_bits(device, dtype, layout):
    inputs, grad = make(layout, dtype, 64, 4, 2, batch=3, device=device)
    alone = [x.detach()[1:2].contiguous().requires_grad_() for x in inputs]
    out, lse = chunk_attention(*inputs, layout, return_lse=True)
    out1, lse1 = chunk_attention(*alone, layout, return_lse=True)
    with deterministic():
        grads = torch.autograd.grad(out, inputs, grad)
        grads1 = torch.autograd.grad(out1, alone, grad[1:2])
    assert all(x.any() for x in (out, *grads))
    for a, b in zip((out1, lse1, *grads1), (out, lse, *grads), strict=True):
        assert_bitwise(a, b[1:2])


@pytest.mark.interpret
def test_interpreted_same_bits_in_a_batch(triton_backend):
    check_batch_bits("cpu", torch.float32, SHORT)


@pytest.mark.gpu
def test_gpu_same_bits_in_a_batch():
    check_batch_bits("cuda", torch.bfloat16, LAYOUTS["sink_window"])


@pytest.mark.interpret
def test_interpreted_strided(triton_backend):
    check_strided("cpu", torch.float32, assert_bitwise, SHORT)


@pytest.mark.gpu
def test_gpu_strided():
    check_strided("cuda", torch.bfloat16, assert_bitwise, LAYOUTS["interleaved"])


@pytest.mark.gpu
def test_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, grad = make(LAYOUTS["one_token"], torch.bfloat16, 64, device="cuda:1")
    with deterministic():
        out = chunk_attention(*inputs, LAYOUTS["one_token"])
        got = (out, *torch.autograd.grad(out, inputs, grad))
    with torch.cuda.device(1), deterministic():
        out = chunk_attention(*inputs, LAYOUTS["one_token"])
        want = (out, *torch.autograd.grad(out, inputs, grad))
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_as_accurate_as_torch(dtype):
    """The rule: error against float64 at most twice that of PyTorch's own attention in the same dtype."""
    q, k, v, grad = (torch.randn(1, 1000, 4, 128, device="cuda").to(dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out64, _, grads64 = want_of(inputs, grad, torch.ones(1000, 1000, dtype=torch.bool), 128**-0.5)
    out = chunk_attention(*inputs, Spans.full(1000, 1000))
    theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)
    assert_as_accurate(out, out64, theirs, tolerance(dtype), "out")
    pairs = (torch.autograd.grad(x, inputs, grad) for x in (out, theirs))
    for name, got, base, want in zip("qkv", *pairs, grads64, strict=True):
        assert_as_accurate(got, want, base, tolerance(dtype, "backward"), f"d{name}")


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit():
    layout = ChunkLayout.repacked((3,) * 4, 200)
    inputs, grad = make(layout, torch.bfloat16, 128, 4, 4, device="cuda")
    first = None
    for _ in range(100):
        out, lse = chunk_attention(*inputs, layout, return_lse=True)
        with deterministic():
            results = (out, lse, *torch.autograd.grad(out, inputs, grad))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    assert all(x.any() for x in first)
    dq, dk, dv = torch.autograd.grad(chunk_attention(*inputs, layout), inputs, grad)
    assert torch.equal(dk, first[3]) and torch.equal(dv, first[4]), "in any order but dq's"
    assert relative_rms(dq, first[2].double()) <= tolerance(torch.bfloat16, "backward").rms


@pytest.mark.gpu
def test_gpu_graph_capture():
    layout = ChunkLayout.repacked((3,) * 3, 100)
    inputs, _ = make(layout, torch.bfloat16, 128, 2, 2, device="cuda")
    q, k, v = (x.detach() for x in inputs)
    chunk_attention(q, k, v, layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunk_attention(q, k, v, layout)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert_bitwise(out, chunk_attention(q, k, v, layout))
    assert out.any()


@pytest.mark.gpu
def test_gpu_more_than_two_billion_elements():
    L, H, D = 1_450_000, 12, 128
    assert L * H * D > 2**31
    q, k, v = (torch.randn(1, L, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    spans = Spans.build([((0, 100), [(L - 300, L)]), ((L - 200, L), [(0, 130), (L - 77, L)])])
    out = chunk_attention(q, k, v, spans)
    rows = torch.cat([torch.arange(100), torch.arange(L - 200, L)]).cuda()
    keys = torch.cat([torch.arange(130), torch.arange(L - 300, L)]).cuda()
    mask = torch.zeros(300, 430, dtype=torch.bool)
    mask[:100, 130:] = True
    mask[100:, :130] = True
    mask[100:, -77:] = True
    want, _ = dense_attention(q[:, rows].double(), k[:, keys].double(), v[:, keys].double(), mask.cuda(), D**-0.5)
    assert relative_rms(out[:, rows], want) <= tolerance(torch.bfloat16).rms


@pytest.mark.interpret
def test_rows_far_apart_are_copied():
    from raven.kernels.chunk_attention import readable

    far, near = (torch.empty_strided((1, 128, 1, 64), (1, n, 64, 1), device="meta") for n in (2**24, 2**24 - 1))
    assert readable(far).is_contiguous() and readable(near) is near


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_rows_far_apart(dtype):
    """The rows of a tile lie further apart than 32 bits count."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows = torch.empty(1, 130, 2**24, device="cuda", dtype=dtype)[..., :256].unflatten(2, (4, 1, 64)).normal_()
    results = []
    for *inputs, grad in (rows.unbind(2), rows.contiguous().unbind(2)):
        inputs = [x.requires_grad_() for x in inputs]
        out = chunk_attention(*inputs, Spans.full(130, 130))
        with deterministic():
            results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for got, want in zip(*results, strict=True):
        assert_bitwise(got, want)
        assert got.any() and got.isfinite().all()


@pytest.mark.gpu
def test_gpu_memory_is_outputs_and_statistics():
    layout = ChunkLayout.repacked((3,) * 4, 500)
    inputs, grad = make(layout, torch.bfloat16, 128, 12, 12, batch=1, device="cuda")
    rows = layout.length
    if raven.explain("chunk_attention", *inputs).chosen == "cuda":  # whole tiles of each of the segments
        rows = sum(-(-int(end - begin) // 80) * 80 for begin, end in layout.spans.q_ranges)
        accumulator = rows * 12 * 128 * 4
    else:
        accumulator = 0
    one = inputs[0].numel() * 2
    chunk_attention(*inputs, layout)
    extra = peak_extra_bytes(lambda: torch.autograd.grad(chunk_attention(*inputs, layout), inputs, grad))
    allowed = 4 * one + accumulator + 4 * 12 * (layout.length + 2 * rows) + 2**20
    assert extra <= allowed, "out, dq, dk, dv, three rows of float32 statistics, on Hopper dq in float32"


def check_infinite_scores(device, dtype):
    """Scores of -inf weigh nothing, also when a query's first tile, or all of its keys, has no other."""
    q, k, v = (torch.randn(1, 300, 2, 64, device=device).to(dtype) for _ in range(3))
    q[..., 0] = 1.0
    k[:, :200, :, 0] = float("-inf")
    spans = Spans.build([((0, 150), [(0, 300)]), ((150, 300), [(0, 200)])])
    out, lse = chunk_attention(q, k, v, spans, return_lse=True)
    want, want_lse = chunk_attention(q[:, :150], k[:, 200:], v[:, 200:], Spans.full(150, 100), return_lse=True)
    assert relative_rms(out[:, :150], want.double()) <= tolerance(dtype).rms
    assert relative_rms(lse[:, :, :150], want_lse.double()) <= 1e-6
    assert (out[:, 150:] == 0).all() and (lse[:, :, 150:] == float("-inf")).all()


@pytest.mark.interpret
def test_interpreted_infinite_scores(triton_backend):
    check_infinite_scores("cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gpu_infinite_scores(dtype):
    check_infinite_scores("cuda", dtype)
