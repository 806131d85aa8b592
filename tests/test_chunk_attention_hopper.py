"""The Gluon forward kernel: its work lists, the merge of split tiles, its machine code, and its results on Hopper."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import raven
from raven import backends
from raven.layout import ChunkLayout
from raven.ops import _chunk_attention_gluon as gluon
from raven.ops import chunk_attention
from raven.planner import plan
from raven.reference.chunk_attention import dense_attention
from raven.spans import Spans
from raven.testing import assert_bitwise, poisoned_memory, relative_rms, tolerance
from raven.worklist.forward import forward_work

WIDE = Spans.build([((0, 700), [(0, 5000), (5100, 5900)]), ((700, 900), [(100, 4000)])])  # few tiles, many keys


@pytest.fixture
def fresh():
    gluon.compiler_reason.cache_clear()
    yield
    gluon.compiler_reason.cache_clear()


def test_says_why_the_portable_kernel_runs(monkeypatch, fresh):
    def reason(*shape, dtype=torch.bfloat16):
        return gluon.reason(torch.empty(shape, dtype=dtype))

    assert "float32" in reason(1, 3, 1, 64, dtype=torch.float32)
    assert "head_dim 96" in reason(1, 3, 1, 96)
    assert "on cpu" in reason(1, 3, 1, 64)
    told = {None: "not installed", "3.5.1": "got 3.5.1", "4.0.0+git": "got 4.0.0", "main": "got main"}
    for version in told:
        monkeypatch.setattr(backends, "triton_version", lambda version=version: version)
        gluon.compiler_reason.cache_clear()
        assert told[version] in gluon.compiler_reason()


def test_a_gluon_without_something_is_told(monkeypatch, fresh):
    def missing(name):
        raise ImportError(f"cannot import from {name}")

    monkeypatch.setattr(backends, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(gluon, "import_module", missing)
    assert "lacks something: cannot import" in gluon.compiler_reason()


def lists_of(spans, heads=2, workers=132):
    tiles = plan(spans.q_ranges.numpy(), spans.kv_indptr.numpy(), spans.kv_ranges.numpy(), gluon.ROWS, gluon.KEYS)
    made = forward_work(tiles, gluon.KEYS, heads, 1, 1 << 20, workers)
    return made, gluon.DeviceWork(made.work, made.steps, made.slots, torch.device("cpu"))


@pytest.mark.parametrize("spans", [WIDE, ChunkLayout.repacked((3, 2), 77).spans, Spans.full(300, 130)], ids=range(3))
def test_lists_of_the_kernel(spans):
    made, lists = lists_of(spans)
    slots = []
    for ours, row in zip(lists.work.tolist(), made.work.tolist(), strict=True):
        q_start, q_length, head, first, full, tails, slot, _ = ours
        assert [q_start, q_length, head, first, full + tails] == row[:5]
        lengths = lists.steps[first : first + full + tails, 1]
        assert (lengths[:full] == gluon.KEYS).all() and (lengths[full:] < gluon.KEYS).all()
        slots += [slot] if slot >= 0 else []
    assert sorted(slots) == list(range(lists.slots))
    merged = [first + i for *_, first, count in lists.merges.tolist() for i in range(count)]
    assert sorted(merged) == sorted(slots)
    assert len(lists.steps) == len(made.steps) + 1


def test_wide_spans_are_split():
    assert lists_of(WIDE)[1].slots > 0


@pytest.mark.interpret
def test_interpreted_merge():
    """Parts over shares of the keys, some of them empty or without weight, join to the attention over all keys."""
    from raven.kernels import chunk_attention as kernels

    D, H, lq, shares = 32, 2, 150, ((0, 40), (40, 41), (41, 160))
    q, k, v = (torch.randn(2, n, H, D) for n in (lq, 160, 160))
    parts, parts_lse = torch.full((2, 9, 128, D), 1e9), torch.full((2, 9, 128), 1e9)
    merges = []
    for slot, (begin, end, head) in zip((0, 3, 6), ((0, 128, 0), (128, 150, 0), (0, 128, 1)), strict=True):
        merges.append([begin, end - begin, head, slot, 3])
        for i, (a, b) in enumerate(shares):
            seen = torch.ones(end - begin, b - a, dtype=torch.bool)
            seen[5:8] = i == 2  # queries with one part only
            seen[8] = False  # and one that sees nothing
            head_of = [x[:, :, head : head + 1] for x in (q, k, v)]
            o, lse = dense_attention(head_of[0][:, begin:end], *(x[:, a:b] for x in head_of[1:]), seen, 0.2)
            parts[:, slot + i, : end - begin] = o[:, :, 0]
            parts_lse[:, slot + i, : end - begin] = lse[:, 0]
    out, lse = torch.full((2, lq, H, D), 7.0), torch.full((2, H, lq), 7.0)
    kernels.merge(parts, parts_lse, out, lse, torch.tensor(merges, dtype=torch.int32))
    assert (out[:, 128:, 1] == 7).all() and (lse[:, 1, 128:] == 7).all(), "what no list names is left alone"
    mask = torch.ones(lq, 160, dtype=torch.bool)
    for begin in (0, 128):
        mask[begin + 5 : begin + 8, :41] = False
        mask[begin + 8] = False
    want, want_lse = dense_attention(*(x.double() for x in (q, k, v)), mask, 0.2)
    for head, end in ((0, 150), (1, 128)):
        assert relative_rms(out[:, :end, head], want[:, :end, head]) < 1e-6
        finite = want_lse[:, head, :end].isfinite()
        assert torch.equal(finite, lse[:, head, :end].isfinite())
        assert relative_rms(lse[:, head, :end][finite], want_lse[:, head, :end][finite]) < 1e-6


def compiled(dtype, D):
    """The kernel as Triton compiles it for Hopper on any machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from raven.kernels import chunk_attention_hopper as hopper

    def tile(rows):
        return f"tensordesc<{dtype}[1,{rows},1,{D}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"

    kinds = {"Q": tile(64), "K": tile(hopper.BLOCK_K), "V": tile(hopper.BLOCK_K), "Out": f"*{dtype}", "scale": "fp32"}
    kinds |= dict.fromkeys(("Lse", "Parts", "PartsLse"), "*fp32") | dict.fromkeys(("work", "steps"), "*i32")
    kinds |= dict.fromkeys(("slots", "L", "H"), "i32")
    constants = {"GROUP": 2, "BLOCK_K": hopper.BLOCK_K, "D": D}
    names = hopper._forward.arg_names
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds.get(name, "")[:1] == "*"}
    source = GluonASTSource(hopper._forward, {n: kinds.get(n, "constexpr") for n in names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.aot
@pytest.mark.skipif(backends.interpreting(), reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_machine_code(dtype, D, tmp_path):
    pytest.importorskip("triton")
    if told := gluon.compiler_reason():
        pytest.skip(told)
    import triton

    kernel = compiled(dtype, D)
    ptx = kernel.asm["ptx"]
    assert re.search(r"\.target sm_90a", ptx)
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor.4d" in ptx and "setmaxnreg" in ptx
    assert kernel.metadata.shared <= 227 * 1024
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = tool if tool.exists() and os.access(tool, os.X_OK) else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert re.search(r"STACK:0\b.*LOCAL:0\b", usage.stdout + usage.stderr), "registers are spilled"
    sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert "HGMMA" in sass and "UTMALDG.4D" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)
    # Between two waits of the main loop lie the exponentials: that is what STAY is for.
    waits = [m.start() for m in re.finditer(r"WARPGROUP\.DEPBAR", sass)]
    assert max(sass.count("MUFU.EX2", a, b) for a, b in zip(waits, waits[1:], strict=False)) >= 64


@pytest.fixture
def hopper_kernel():
    """The Triton backend with its Hopper kernel, or a skip that says why not."""
    x = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    if told := gluon.reason(x):
        pytest.skip(told)
    raven.set_backend("triton")
    yield
    raven.set_backend(None)


def random_spans(rng, q_len, kv_len):
    """Query ranges of every kind of length, each with unsorted key ranges that ignore every tile border."""
    rows, at = [], 0
    while at < q_len:
        at += int(rng.choice([0, 0, 1, 7]))
        end = min(q_len, at + int(rng.choice([1, 2, 63, 64, 65, 127, 129, 300])))
        if at >= end:
            break
        cuts = np.sort(rng.choice(kv_len + 1, rng.choice([0, 2, 4, 8]), replace=False)).tolist()
        rows.append(((at, end), rng.permutation(np.array(cuts).reshape(-1, 2)).tolist()))
        at = end
    keys = [r for _, ranges in rows for r in ranges]
    indptr = np.cumsum([0] + [len(ranges) for _, ranges in rows])
    return Spans(torch.tensor([q for q, _ in rows]), torch.tensor(indptr), torch.tensor(keys).reshape(-1, 2))


def check(spans, lengths, D, H, Hkv, B, dtype):
    """Against float64; keys outside the ranges are NaN, and so are the queries that are in none."""
    q = torch.randn(B, lengths[0], H, D, device="cuda").to(dtype)
    k, v = (torch.randn(B, lengths[1], Hkv, D, device="cuda").to(dtype) for _ in range(2))
    mask = spans.dense_mask(*lengths).cuda()
    want, want_lse = dense_attention(*(x.double() for x in (q, k, v)), mask, D**-0.5)
    k[:, ~mask.any(0)] = v[:, ~mask.any(0)] = float("nan")
    with poisoned_memory():
        out, lse = chunk_attention(q, k, v, spans, return_lse=True)
    blind = ~mask.any(1)
    assert (out[:, blind] == 0).all() and (lse[:, :, blind] == float("-inf")).all()
    assert relative_rms(out, want) <= tolerance(dtype).rms
    assert relative_rms(lse[:, :, ~blind], want_lse[:, :, ~blind]) <= 1e-6
    for b in range(B):
        alone = chunk_attention(*(x[b : b + 1] for x in (q, k, v)), spans, return_lse=True)
        assert_bitwise(alone[0], out[b : b + 1])
        assert_bitwise(alone[1], lse[b : b + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_gpu_random_spans(seed, hopper_kernel):
    rng = np.random.default_rng(seed)
    dtype = (torch.bfloat16, torch.float16)[seed % 2]
    D, H, Hkv = ((128, 2, 2), (64, 4, 2), (128, 3, 1))[seed % 3]
    lengths = 100 + 71 * seed, 60 + 97 * seed
    check(random_spans(rng, *lengths), lengths, D, H, Hkv, 1 + seed % 2, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_gpu_split_keys(D, hopper_kernel):
    check(WIDE, (900, 5900), D, 2, 1, 2, torch.bfloat16)


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit(hopper_kernel):
    q, k, v = (torch.randn(1, n, 2, 128, device="cuda", dtype=torch.bfloat16) for n in (900, 5900, 5900))
    layout = ChunkLayout.repacked((3,) * 4, 200)
    packed = [torch.randn(2, layout.length, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    first = None
    for _ in range(100):
        results = (*chunk_attention(q, k, v, WIDE, return_lse=True), *chunk_attention(*packed, layout, return_lse=True))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
    assert all(x.any() for x in first)


@pytest.mark.gpu
def test_gpu_strides_and_copies(hopper_kernel):
    """Views of a fused projection are read in place; what the copy engine cannot read is copied: equal bits."""
    layout = ChunkLayout.repacked((2, 1), 150)
    fused = torch.randn(2, layout.length, 3, 2, 64, device="cuda").half()
    want = chunk_attention(*(x.contiguous() for x in fused.unbind(2)), layout)
    assert want.any()
    assert_bitwise(chunk_attention(*fused.unbind(2), layout), want)
    shifted = torch.empty(fused.numel() + 1, device="cuda", dtype=torch.half)[1:].view(fused.shape).copy_(fused)
    assert_bitwise(chunk_attention(*shifted.unbind(2), layout), want)
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in fused.unbind(2)]
    assert_bitwise(chunk_attention(*head_major, layout), want)
    q, k, v = fused.unbind(2)
    shared = [x[:1].expand(2, -1, -1, -1) for x in (k, v)]
    assert_bitwise(chunk_attention(q, *shared, layout)[:1], want[:1])


@pytest.mark.gpu
def test_gpu_graph_capture(hopper_kernel):
    q, k, v = (torch.randn(1, n, 2, 128, device="cuda", dtype=torch.bfloat16) for n in (900, 5900, 5900))
    chunk_attention(q, k, v, WIDE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunk_attention(q, k, v, WIDE)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert_bitwise(out, chunk_attention(q, k, v, WIDE))
    assert out.any()
