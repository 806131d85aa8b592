"""CUDA graphs: replays read what the buffers hold then, while a cache moves through its ring."""

import pytest
import torch
from attention_cases import deterministic
from jobs import JOBS, Pressure, make

import raven
from raven.cache import KVCache
from raven.ops import chunk_attention, kv_append
from raven.reference.chunk_attention import dense_attention
from raven.testing import assert_bitwise, relative_rms, tolerance

TOKENS, HEADS, DIM = 195, 4, 128


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "append"])
def test_replays_follow_their_inputs(backend, name):
    assert name in JOBS
    made = make(name, backend)
    if isinstance(made, str):
        pytest.skip(made)
    inputs, run = made
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    pressure = Pressure()
    for _ in range(20):
        for x in inputs:
            x.normal_()
        pressure.shift()
        graph.replay()
        for a, b in zip(got, run(), strict=True):
            assert_bitwise(a, b, name)


@pytest.mark.gpu
def test_forward_and_backward_in_one_graph(backend):
    inputs, run = make("attention", backend)
    with deterministic():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # autograd must have seen the stream that it is captured on
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = run()
        for _ in range(5):
            for x in inputs:
                x.normal_()
            torch.cuda.synchronize()
            graph.replay()
            for a, b in zip(got, run(), strict=True):
                assert_bitwise(a, b)


@pytest.mark.gpu
def test_moving_cache(backend):
    """A sink and a ring of three slots over ten chunks; one graph for each state of the ring, captured when first met.

    From the fifth chunk on the ring repeats and only replays run. Every step is held against float64 on the history
    that it should see.
    """
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for op, arguments in (("kv_append", (q, k, v)), ("chunk_attention", (q, k, v))):
        if (reason := raven.explain(op, *arguments).reasons[backend]) is not None:
            pytest.skip(f"{op} on {backend}: {reason}")
    weights = [torch.rand(HEADS * DIM, device="cuda") + 0.5 for _ in range(2)]
    positions = torch.zeros(TOKENS, 3, dtype=torch.int32, device="cuda")
    cache = KVCache(1, 1, HEADS, DIM, TOKENS, sink=1, window=2, dtype=torch.bfloat16, device="cuda")
    graphs, history = {}, []

    @torch.no_grad()
    def forward():
        query = kv_append(q, k, v, *weights, positions, cache, 0)
        return query, chunk_attention(query, cache.k[0], cache.v[0], cache.spans)

    for chunk in range(10):
        positions[:, 0] = chunk
        cache.begin(TOKENS, chunk, 1)
        state = (cache.spans, cache.slots.data_ptr())
        if state not in graphs:
            forward()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = forward()
            graphs[state] = graph, results
        graph, (query, out) = graphs[state]
        for _ in range(3):  # steps of the sampler: all but the last are overwritten
            for x in (q, k, v):
                x.normal_()
            graph.replay()
        rows = slice(cache.current.start, cache.current.end)
        seen = [pair for number, pair in history if number == 0 or chunk - number <= 2]
        pairs = [*seen, (cache.k[0][:, rows].clone(), cache.v[0][:, rows].clone())]
        keys, values = (torch.cat(parts, dim=1).double() for parts in zip(*pairs, strict=True))
        everything = torch.ones(TOKENS, keys.shape[1], dtype=torch.bool, device="cuda")
        want, _ = dense_attention(query.double(), keys, values, everything, DIM**-0.5)
        assert relative_rms(out, want) <= tolerance(torch.bfloat16).rms, f"chunk {chunk}"
        replayed = out.clone()
        assert_bitwise(forward()[1], replayed, f"chunk {chunk}: the same without a graph")
        history.append((chunk, pairs[-1]))
        cache.commit()
    assert len(graphs) < 10, "the ring must come around for this to test anything"
