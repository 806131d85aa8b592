"""Prompts that change within a video: recache against a stream that starts over, and long streams without growth."""

import gc
import sys
from dataclasses import replace

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.ops.chunk_attention import _device_plan
from raven.presets import preset
from raven.stream import Stream

SHAPE = (4, 4, 2)
LEVELS = [1.0, 0.6]


def prompts(dtype, batch=1):
    """Two of them."""
    return [tiny_inputs(1, dtype, batch, seed=seed)[3] for seed in (1, 2)]


def latents(count, frames=1, dtype=torch.float64, batch=1):
    return list(
        torch.randn(count, batch, 4, frames, *SHAPE[1:], generator=torch.Generator().manual_seed(3), dtype=dtype)
    )


def commit_all(stream, chunks):
    for x in chunks:
        stream.commit(x)
    return stream


def assert_same_next(a, b, frames=1):
    """Both streams see the same: next velocities, and those after another commit."""
    x, clean = latents(2, frames, batch=a.batch)[::-1]
    for _ in range(2):
        torch.testing.assert_close(a.velocity(x, 0.7), b.velocity(x, 0.7), atol=1e-11, rtol=1e-11)
        a.commit(clean)
        b.commit(clean)


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("merge", [False, True])
def test_recache_without_sink_is_a_new_video_of_the_same_chunks(keys, merge):
    """The plain statement: begin again under the new prompt, with the newest chunks only, at their own frames."""
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(7)
    stream = commit_all(Stream(model, old, SHAPE, 1, window=2, keys=keys, recache=2, merge=merge), chunks)
    stream.switch(new)
    plain = Stream(model, new, SHAPE, 1, window=2, keys=keys)
    plain.frame = 5
    assert_same_next(stream, commit_all(plain, chunks[5:]))


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_switch_while_a_chunk_is_in_flight(keys):
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(5)
    started, plain = (
        commit_all(Stream(model, old, SHAPE, 1, window=2, keys=keys, recache=3), chunks[:4]) for _ in range(2)
    )
    started.velocity(chunks[4], 1.0)
    for stream in (started, plain):
        stream.switch(new)
    assert_same_next(started, plain)


@pytest.mark.parametrize("keys", ["rotated", "raw"])
@pytest.mark.parametrize("sinks", [False, True])
def test_recache_with_a_sink(keys, sinks):
    """The sink keeps the keys of the old prompt, or is encoded first under the new one; the chunks between are gone."""
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(8)
    options = {"chunk_frames": 1, "sink": 1, "window": 2, "keys": keys}
    stream = commit_all(Stream(model, old, SHAPE, **options, recache=2, recache_sink=sinks), chunks)
    stream.switch(new)
    plain = commit_all(Stream(model, new if sinks else old, SHAPE, **options), chunks[:1])
    plain.set_text(new)
    plain.frame = 6
    assert_same_next(stream, commit_all(plain, chunks[6:]))


def test_recache_reaches_beyond_the_window():
    """LongLive encodes 12 frames anew of which 6 stay in view; the others are context of those that stay."""
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(7, frames=3)
    stream = Stream(model, old, SHAPE, **preset("longlive"))
    assert stream.cache.num_slots == 5
    commit_all(stream, chunks).switch(new)
    # A window that shows all four of them while they are encoded.
    wide = commit_all(Stream(model, old, SHAPE, 3, sink=1, window=4), chunks[:1])
    wide.set_text(new)
    wide.frame = 9
    commit_all(wide, chunks[3:])
    x = latents(1, 3)[0]
    wide_cache, cache = wide.cache, stream.cache
    for layer in range(CONFIG.num_layers):
        for ours, theirs in ((cache.k, wide_cache.k), (cache.v, wide_cache.v)):
            for a, b in zip(cache.history[1:], wide_cache.history[-2:], strict=True):
                assert (a.frame, a.frames) == (b.frame, b.frames)
                rows = ours[layer][:, a.start : a.end], theirs[layer][:, b.start : b.end]
                torch.testing.assert_close(*rows, atol=1e-11, rtol=1e-11)
    shallow = commit_all(Stream(model, old, SHAPE, **preset("longlive", recache=2)), chunks)
    shallow.switch(new)
    assert (shallow.velocity(x, 0.7) - stream.velocity(x, 0.7)).abs().max() > 1e-8


def test_recache_early_in_a_video():
    """Fewer chunks than asked for; none at all; and without a window, all of them."""
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(3)
    for options in ({"window": 3, "recache": 4}, {"max_frames": 9, "recache": 9}):
        stream = Stream(model, old, SHAPE, 1, **options)
        stream.switch(new)
        stream.switch(old)
        commit_all(stream, chunks).switch(new)
        plain = Stream(model, new, SHAPE, 1, window=options.get("window"), max_frames=options.get("max_frames"))
        assert_same_next(stream, commit_all(plain, chunks))


def test_recache_under_guidance_and_in_a_batch():
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64, batch=2)
    negative = [torch.zeros(1, CONFIG.text_dim, dtype=torch.float64)] * 2
    other = [torch.ones(1, CONFIG.text_dim, dtype=torch.float64)] * 2
    chunks = latents(4, batch=2)
    options = {"chunk_frames": 1, "window": 2, "guidance": 3.0}
    for given, want in ((None, negative), (other, other)):
        stream = commit_all(Stream(model, old, SHAPE, **options, negative_context=negative, recache=2), chunks)
        stream.switch(new, given)
        plain = Stream(model, new, SHAPE, **options, negative_context=want)
        plain.frame = 2
        assert_same_next(stream, commit_all(plain, chunks[2:]))


def test_a_switch_can_leave_the_history_alone():
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    chunks = latents(3)
    kept = commit_all(Stream(model, old, SHAPE, 1, window=2, recache=2), chunks)
    kept.switch(new, recache=False)
    plain = commit_all(Stream(model, old, SHAPE, 1, window=2), chunks)
    plain.set_text(new)
    assert_same_next(kept, plain)
    anew = commit_all(Stream(model, old, SHAPE, 1, window=2, recache=2), chunks)
    anew.switch(new)
    x = latents(1)[0]
    plain = commit_all(Stream(model, old, SHAPE, 1, window=2), chunks)
    plain.switch(new)  # without recache: only the text
    assert (anew.velocity(x, 0.7) - plain.velocity(x, 0.7)).abs().max() > 1e-6


@pytest.mark.parametrize("merge", [False, True])
def test_prompts_by_frame(merge):
    """A switch takes effect at the first chunk that begins at its frame or later; those before end under the old."""
    model = tiny_model(torch.float64)
    old, new = prompts(torch.float64)
    options = {"chunk_frames": 2, "sink": 1, "window": 2, "recache": 3, "merge": merge}

    def generator():
        return torch.Generator().manual_seed(4)

    planned = Stream(model, old, SHAPE, **options, generator=generator())
    switches = [(0, old), (5, new), (6, new), (9, old)]
    got = torch.cat(list(planned.generate(14, LEVELS, switches=switches)), dim=2)
    by_hand, chunks = Stream(model, old, SHAPE, **options, generator=generator()), []
    for frames, context in ((6, new), (4, old), (4, None)):
        chunks += by_hand.generate(frames, LEVELS)
        if context is not None:
            by_hand.switch(context)
            by_hand.switch(context)  # twice is as good as once
    torch.testing.assert_close(got, torch.cat(chunks, dim=2), atol=1e-10, rtol=0)


def test_latents_are_dropped():
    model = tiny_model()
    old, _ = prompts(torch.float32)
    stream = Stream(model, old, SHAPE, 1, sink=2, window=1, recache=2, recache_sink=True)
    commit_all(stream, latents(9, dtype=torch.float32))
    assert stream._recent.chunks == (0, 1, 7, 8)
    stream.reset()
    assert stream._recent.chunks == ()
    stream = commit_all(Stream(model, old, SHAPE, 1, sink=2, window=1, recache=2), latents(9, dtype=torch.float32))
    assert stream._recent.chunks == (7, 8)


def test_bad_arguments():
    model = tiny_model()
    old, new = prompts(torch.float32)
    for options, match in (
        ({"recache": -1}, "recache: got -1"),
        ({"recache_sink": True}, "recache_sink: got True with recache=0"),
        ({"recache": 1, "recache_sink": True, "sink": 1, "keys": "raw", "ema": 0.9}, "ema=0.9"),
    ):
        with pytest.raises(ValueError, match=match):
            Stream(model, old, SHAPE, 1, window=1, **options)
    stream = Stream(model, old, SHAPE, 1, window=1)
    with pytest.raises(ValueError, match="recache: got True for a stream made with recache=0"):
        stream.switch(new, recache=True)
    with pytest.raises(ValueError, match="context: got 2 prompts, expected 1"):
        stream.switch(new * 2)
    with pytest.raises(ValueError, match=r"switches: got frames \[3, 1\], expected ascending"):
        stream.generate(4, switches=[(3, new), (1, old)])


@pytest.mark.parametrize("name", ["longlive", "longlive_inf", "reward_forcing"])
def test_nothing_grows(name):
    """Objects that Python tracks (every tensor is one) and memory blocks it has, once the ring has gone round.

    Python's free lists fill up ever more slowly; an object a chunk would be fifty.
    """
    model = tiny_model(config=replace(CONFIG, num_layers=1))
    stream = Stream(model, prompts(torch.float32)[0], SHAPE, **preset(name, chunk_frames=1))
    chunks = stream.generate(levels=[1.0])

    def after(count):
        for _ in range(count):
            next(chunks)
        gc.collect()
        plans = _device_plan.cache_info().currsize
        return len(gc.get_objects()), sys.getallocatedblocks(), plans, stream.cache.nbytes

    before = after(50)  # caches of a fixed size have filled up: positions, plans, tables
    late = after(50)
    assert late[0] - before[0] <= 8 and late[1] - before[1] < 400 and late[2:] == before[2:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["longlive", "longlive_inf"])
def test_gpu_switches_with_graphs_are_bit_for_bit_eager(name):
    model = tiny_model(torch.bfloat16).cuda()
    old, new = prompts(torch.bfloat16)
    videos = []
    for graphs in (True, False):
        options = preset(name, chunk_frames=1, graphs=graphs, generator=torch.Generator("cuda").manual_seed(4))
        stream = Stream(model, old, SHAPE, **options)
        stream.warm_up(levels=LEVELS)
        videos.append(torch.cat(list(stream.generate(24, LEVELS, switches=[(7, new), (8, old), (16, new)])), dim=2))
        assert stream.mode == ("graphs" if graphs else "eager")
    assert torch.equal(*videos) and videos[0].isfinite().all()
