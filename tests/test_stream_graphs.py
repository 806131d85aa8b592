"""Chunks replayed as CUDA graphs, against the same stream without; without a GPU, a tape stands for the graph."""

from contextlib import nullcontext

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raven import captured
from raven.captured import CapturedChunks, GraphSet
from raven.models import WanConfig
from raven.stream import Stream

SHAPE = (4, 4, 4)
SMALL = WanConfig(**{**CONFIG.__dict__, "num_layers": 2})
WIDE = WanConfig(**{**CONFIG.__dict__, "dim": 256, "num_layers": 2})  # heads of 128, which the Hopper kernels take
RINGS = {
    "window": {"window": 1},
    "sink": {"sink": 1, "window": 1},
    "ragged": {"chunk_frames": [1, 2], "sink": 1, "window": 2},
    "apart": {"window": 1, "merge": False},
    "raw keys": {"sink": 1, "window": 1, "keys": "raw"},
    "blended sink": {"sink": 1, "window": 1, "keys": "raw", "ema": 0.9},
    "float8": {"sink": 1, "window": 1, "cache_dtype": torch.float8_e4m3fn},
}


class Tape(TorchDispatchMode):
    """What a graph does, on any device: every operation again, on the same memory, whatever Python holds by then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeSet(GraphSet):
    def __init__(self, device):
        self.device, self.warming, self.failure, self._graphs = device, False, None, {}
        self.replays = 0

    def _capture(self, fn):
        with Tape() as tape:
            fn()
        return tape


@pytest.fixture
def tapes(monkeypatch):
    monkeypatch.setattr(captured, "GraphSet", TapeSet)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def pair(model, context, chunk_frames=2, **options):
    """A stream with graphs (or tapes) and the same without."""
    graphed, eager = (Stream(model, context, SHAPE, chunk_frames, graphs=False, **options) for _ in range(2))
    graphed._graphs = CapturedChunks(model.device)
    return graphed, eager


def video(stream, frames, seed=5, **options):
    """Chunks and states of the next ``frames``, each joined."""
    generator = torch.Generator(stream.model.device).manual_seed(seed)
    items = list(stream.generate(frames, [1.0, 0.6], generator, return_trajectory=True, **options))
    return torch.cat([x for x, _ in items], dim=2), torch.cat([states for _, states in items], dim=3)


def assert_same_video(a, b):
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def in_the_ring(stream):
    """Graphs of a stream whose window is full: for each slot the first step, the others, and a clean pass apart."""
    slots = stream.cache.num_slots - stream.sink
    return slots * (2 if stream.merge and stream.cache.can_merge else 3)


@pytest.mark.parametrize("name", ["ragged", "blended sink", "float8"])
def test_a_tape_of_a_ring_plays_on(name, tapes):
    """Whatever moves with the ring and is not in the key of the graph must lie in a buffer."""
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], **RINGS[name])
    frames = 1 + 2 * 11 if name == "ragged" else 20
    assert_same_video(video(graphed, frames), video(eager, frames))
    assert len(graphed._graphs) == in_the_ring(graphed)


def test_a_tape_of_all_history_plays_the_next_video(tapes):
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], max_frames=6)
    other = [torch.ones(1, CONFIG.text_dim)] * 2
    for context, graphs in ((None, 0), (other, 6), (None, 6)):
        for stream in (graphed, eager):
            stream.reset(context)
        assert_same_video(video(graphed, 6), video(eager, 6))
        assert len(graphed._graphs) == graphs


@pytest.mark.parametrize("name", ["sink", "ragged", "blended sink"])
def test_warm_up_captures_all_that_comes(name, tapes):
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], **RINGS[name])
    seen = []
    count = graphed.warm_up(levels=[1.0, 0.6], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and count == len(graphed._graphs) > 0
    assert graphed.frame == 0 and graphed.cache.num_committed == 0
    frames = 1 + 2 * 11 if name == "ragged" else 24
    assert_same_video(video(graphed, frames), video(eager, frames))
    assert len(graphed._graphs) == count, "nothing was left to capture"
    with pytest.raises(RuntimeError, match=f"warm_up: got a video at frame {frames}, expected its beginning"):
        graphed.warm_up()


def test_warm_up_of_a_video_with_an_end(tapes):
    graphed, _ = pair(tiny_model(config=SMALL), tiny_inputs(1)[3])
    with pytest.raises(ValueError, match="max_frames: got None"):
        graphed.warm_up()
    assert graphed.warm_up(6) == 6 and graphed.max_frames == 6
    with pytest.raises(ValueError, match="frames: got 8, expected at most max_frames = 6"):
        graphed.warm_up(8)


def test_prompts_change_without_a_new_capture(tapes):
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], sink=1, window=1)
    count = graphed.warm_up(levels=[1.0, 0.6])
    other = [torch.ones(1, CONFIG.text_dim)] * 2
    for stream in (graphed, eager):
        stream.first = video(stream, 4)
        stream.set_text(other)
        stream.second = video(stream, 8, seed=6)
    assert_same_video(graphed.first, eager.first)
    assert_same_video(graphed.second, eager.second)
    assert len(graphed._graphs) == count


def test_weights_that_move_are_captured_anew(tapes):
    """A graph holds addresses: those of the weights before ``model.to`` lead nowhere."""
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], window=1)
    assert_same_video(video(graphed, 12), video(eager, 12))
    for weight in graphed.model.parameters():
        weight.data = weight.data * 1.5
    assert_same_video(video(graphed, 2), video(eager, 2))
    assert len(graphed._graphs) == 0
    assert_same_video(video(graphed, 12), video(eager, 12))
    assert len(graphed._graphs) == in_the_ring(graphed)
    graphed.text = eager.text = graphed.model.encode_text([torch.ones(1, CONFIG.text_dim)] * 2)
    assert_same_video(video(graphed, 2), video(eager, 2))
    assert len(graphed._graphs) == 0


def test_nothing_is_captured_under_autocast(tapes):
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], window=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert graphed.warm_up() == 0
        assert_same_video(video(graphed, 16), video(eager, 16))
    assert graphed.cache.k[0].dtype == torch.bfloat16 and len(graphed._graphs) == 0


def test_other_samplers_and_single_steps_take_turns_with_graphs(tapes):
    graphed, eager = pair(tiny_model(config=SMALL), tiny_inputs(1)[3], window=1)
    for sampler in ("consistency", "ode") * 4:
        assert_same_video(video(graphed, 2, sampler=sampler), video(eager, 2, sampler=sampler))
    for stream in (graphed, eager):
        stream.one = next(stream.generate(2, [1.0], torch.Generator().manual_seed(1)))
    assert torch.equal(graphed.one, eager.one)


def test_no_graphs_on_a_cpu():
    stream = Stream(tiny_model(), tiny_inputs(1)[3], SHAPE, 2, window=1)
    assert stream.mode == "eager" and stream.warm_up() == 0


def on_gpu(config=CONFIG, dtype=torch.bfloat16, **options):
    model = tiny_model(dtype, config).cuda()
    context = [row.to("cuda", dtype) for row in tiny_inputs(1)[3]]
    return [Stream(model, context, SHAPE, graphs=graphs, **{"chunk_frames": 2, **options}) for graphs in (True, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["heads of 32", "heads of 128"])
@pytest.mark.parametrize("name", RINGS)
def test_graphs_are_bit_for_bit_eager(name, config):
    graphed, eager = on_gpu(config, **RINGS[name])
    frames = 1 + 2 * 11 if name == "ragged" else 24
    assert graphed.mode == "graphs" and eager.mode == "eager"
    assert_same_video(video(graphed, frames), video(eager, frames))
    count = len(graphed._graphs)
    assert count == in_the_ring(graphed)
    graphed.reset()
    graphed.warm_up(levels=[1.0, 0.6])
    eager.reset()
    assert_same_video(video(graphed, frames, seed=8), video(eager, frames, seed=8))
    assert graphed.mode == "graphs" and len(graphed._graphs) > count


@pytest.mark.gpu
def test_graphs_of_guided_videos_with_all_history():
    negative = [torch.zeros(1, CONFIG.text_dim, device="cuda", dtype=torch.bfloat16)] * 2
    graphed, eager = on_gpu(max_frames=8, negative_context=negative, guidance=3.0)
    assert graphed.warm_up(levels=[1.0, 0.6]) == 8
    other = [torch.ones(1, CONFIG.text_dim, device="cuda", dtype=torch.bfloat16)] * 2
    for context in (None, other):
        for stream in (graphed, eager):
            stream.reset(context)
        assert_same_video(video(graphed, 8), video(eager, 8))
    assert len(graphed._graphs) == 8


@pytest.mark.gpu
def test_prompts_change_without_a_new_capture_on_a_gpu():
    graphed, eager = on_gpu(sink=1, window=1)
    count = graphed.warm_up(levels=[1.0, 0.6])
    other = [torch.ones(1, CONFIG.text_dim, device="cuda", dtype=torch.bfloat16)] * 2
    for stream in (graphed, eager):
        stream.first = video(stream, 4)
        stream.set_text(other)
        stream.second = video(stream, 12, seed=6)
    assert_same_video(graphed.first, eager.first)
    assert_same_video(graphed.second, eager.second)
    assert len(graphed._graphs) == count and graphed.mode == "graphs"


@pytest.mark.gpu
@pytest.mark.parametrize("generator", ["cuda", "cpu"])
def test_replays_do_not_wait_for_the_gpu(generator):
    graphed, _ = on_gpu(window=1)
    graphed.warm_up(levels=[1.0, 0.6])
    source = torch.Generator(generator).manual_seed(0)
    list(graphed.generate(8, [1.0, 0.6], source))
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunks = list(graphed.generate(8, [1.0, 0.6], source))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(chunk.isfinite().all() for chunk in chunks)


def waiting():
    torch.cuda.current_stream().synchronize()  # breaks a capture


def short_of_memory():
    if torch.cuda.is_current_stream_capturing():
        raise torch.OutOfMemoryError("out of memory, so to say")


@pytest.mark.gpu
@pytest.mark.parametrize("obstacle, reason", [(waiting, "captur"), (short_of_memory, "out of memory, so to say")])
def test_a_chunk_that_cannot_be_captured_runs_without_graphs(obstacle, reason, monkeypatch):
    graphed, eager = on_gpu(window=1)
    want = video(eager, 24)
    block = type(graphed.model.blocks[1])
    forward = block.forward

    def obstructed(self, x, *args, **kwargs):
        obstacle()
        return forward(self, x, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="could not be captured") as caught:
        patch.setattr(block, "forward", obstructed)
        assert_same_video(video(graphed, 24), want)
    assert len(caught) == 1 and graphed.mode.startswith("eager (") and reason in graphed.mode
    assert len(graphed._graphs) == 0
    # Memory that another stream has used is still given back.
    side, before = torch.cuda.Stream(), torch.cuda.memory_allocated()
    x = torch.empty(1 << 20, device="cuda")
    x.record_stream(side)
    del x
    torch.cuda.synchronize()
    torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() == before
    graphed.reset()
    assert_same_video(video(graphed, 24), want)
    again, _ = on_gpu(window=1)
    assert_same_video(video(again, 24), want)
    assert again.mode == "graphs" and len(again._graphs) > 0


@pytest.mark.gpu
def test_weights_that_move_are_captured_anew_on_a_gpu():
    graphed, eager = on_gpu(window=1)
    assert_same_video(video(graphed, 24), video(eager, 24))
    for weight in graphed.model.parameters():
        weight.data = weight.data * 1.5
    assert_same_video(video(graphed, 24), video(eager, 24))
    assert graphed.mode == "graphs" and len(graphed._graphs) == in_the_ring(graphed)


@pytest.mark.gpu
def test_merged_passes_round_as_little_as_separate_ones():
    """Relative to float64, in bfloat16: one velocity after two deferred commits."""
    clean, x = torch.randn(2, 2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cuda()
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        for merge in (True, False):
            stream = on_gpu(WIDE, dtype, window=1, merge=merge)[0]
            stream.commit(clean, defer=True)
            stream.commit(clean.flip(2), defer=True)
            found[dtype, merge] = stream.velocity(x, 0.7)
    exact = found[torch.float64, False]
    torch.testing.assert_close(found[torch.float64, True], exact, atol=1e-12, rtol=1e-12)
    merged, apart = (((found[torch.bfloat16, m] - exact).norm() / exact.norm()).item() for m in (True, False))
    assert merged <= max(2 * apart, 1e-3) and apart < 0.05
