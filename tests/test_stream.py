"""Streaming: chunks in flight, history, samplers, roll-outs."""

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.repack import bidirectional_forward, repacked_forward
from raven.rollout import rollout
from raven.sampling import sample_bidirectional
from raven.schedule import sampling_levels
from raven.stream import Stream

SHAPE = (4, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_velocity_is_repeatable_until_commit():
    model = tiny_model()
    x, clean, t, context = tiny_inputs(2)
    stream = Stream(model, context, SHAPE, 2, window=1)
    first = stream.velocity(x, t)
    stream.velocity(clean, 0.3)
    assert torch.equal(stream.velocity(x, t), first)
    stream.commit(clean)
    assert stream.frame == 2 and stream.cache.num_committed == 1
    assert (stream.velocity(x, t) != first).any(), "the next chunk has a history and other positions"


def test_write_only_pass_leaves_the_same_history():
    """The commit pass skips the last layer's output; what it writes must be what a full pass writes."""
    model = tiny_model()
    x, clean, t, context = tiny_inputs(2)
    short, full = (Stream(model, context, SHAPE, 2, max_frames=4) for _ in range(2))
    short.commit(clean)
    full.velocity(clean, 0.0)
    for a, b in zip(short.cache.k + short.cache.v, full.cache.k + full.cache.v, strict=True):
        assert torch.equal(a[:, :8], b[:, :8])


@pytest.mark.parametrize("window, max_frames", [(1, None), (None, 12)])
def test_generate_is_the_rollout(window, max_frames):
    model = tiny_model()
    _, _, _, context = tiny_inputs(1)
    stream = Stream(model, context, SHAPE, 2, window=window, max_frames=max_frames, generator=generator(1))
    items = list(stream.generate(6, return_trajectory=True))
    result = rollout(model, context, SHAPE, (2, 2, 2), window=window, generator=generator(1))
    assert torch.equal(torch.cat([chunk for chunk, _ in items], dim=2), result.x_0)
    assert torch.equal(torch.cat([states for _, states in items], dim=3), result.x_t)
    assert stream.frame == 6 and len(list(stream.generate(4))) == 2 and stream.frame == 10


def test_rollout_states_follow_the_consistency_step():
    """Every stored state is what the repacked forward replays: same velocity, so the same x_0 and step mean."""
    model = tiny_model(torch.float64)
    _, _, _, context = tiny_inputs(1, torch.float64)
    sizes = (1, 2, 2)
    result = rollout(model, context, SHAPE, sizes, generator=generator(2))
    assert torch.equal(result.levels, sampling_levels(4))
    assert result.x_t.shape == (4, 2, 4, 5, 4, 4) and result.x_next.shape == result.x_t.shape
    for k, t in enumerate(result.levels.tolist()):
        v = repacked_forward(model, result.x_t[k], result.x_0, t, context, sizes)
        x_0 = result.x_t[k] - t * v
        s = result.levels.tolist()[k + 1] if k < 3 else 0.0
        noise = (result.x_next[k] - (1 - s) * x_0) / s if s else result.x_next[k] - x_0
        if s:
            assert abs(noise.std() - 1) < 0.1, "fresh unit noise at every step"
        else:
            assert noise.abs().max() < 1e-12, "after the last level comes the clean end point"
    assert not result.x_0.requires_grad


def test_same_seed_same_video_and_per_sample_generators():
    model = tiny_model()
    _, _, _, context = tiny_inputs(1, batch=3)
    same = [
        torch.cat(list(Stream(model, context, SHAPE, 1, window=0).generate(3, generator=generator(5))), 2)
        for _ in range(2)
    ]
    assert torch.equal(*same)
    seeds = [generator(i) for i in range(3)]
    together = torch.cat(list(Stream(model, context, SHAPE, 1, window=0).generate(3, generator=seeds)), 2)
    alone = torch.cat(list(Stream(model, context[1:2], SHAPE, 1, window=0).generate(3, generator=[generator(1)])), 2)
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.1


def test_window_streams_without_end_in_constant_memory():
    model = tiny_model()
    _, _, _, context = tiny_inputs(1, batch=1)
    stream = Stream(model, context, SHAPE, 1, sink=1, window=1, generator=generator(0))
    bytes_before = stream.cache.nbytes
    chunks = stream.generate(levels=[1.0])
    seen = [next(chunks) for _ in range(9)]
    assert stream.cache.nbytes == bytes_before and stream.cache.visible_chunks == (0, 7)
    stream.settle()
    assert stream.cache.visible_chunks == (0, 8), "the newest chunk's pass was put off until here"
    assert all(chunk.shape == (1, 4, 1, 4, 4) and chunk.isfinite().all() for chunk in seen)


def test_positions_beyond_a_thousand_frames():
    model = tiny_model()
    x, clean, t, context = tiny_inputs(1)
    stream = Stream(model, context, SHAPE, 1, window=1)
    stream.frame = 5000
    stream.commit(clean)
    far = stream.velocity(x, t)
    near = Stream(model, context, SHAPE, 1, window=1)
    near.commit(clean)
    # Rotary attention depends on distances only, so a video looks the same wherever it starts.
    torch.testing.assert_close(far, near.velocity(x, t), atol=1e-3, rtol=1e-3)


def test_last_size_of_a_list_repeats():
    model = tiny_model()
    _, _, _, context = tiny_inputs(1)
    stream = Stream(model, context, SHAPE, [1, 2], window=1, generator=generator())
    assert [chunk.shape[2] for chunk in stream.generate(7, levels=[1.0])] == [1, 2, 2, 2]
    assert [chunk.shape[2] for chunk in Stream(model, context, SHAPE, [1, 2]).generate(levels=[1.0])] == [1, 2]


def test_ode_sampler_is_euler():
    model = tiny_model(torch.float64)
    _, _, _, context = tiny_inputs(1, torch.float64)
    stream = Stream(model, context, SHAPE, 3, max_frames=3)
    levels = [1.0, 0.7, 0.2]
    (got,) = stream.generate(levels=levels, generator=generator(4), sampler="ode")
    x = torch.randn(2, 4, 3, 4, 4, generator=generator(4), dtype=torch.float64)
    for t, s in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        x = x + (s - t) * bidirectional_forward(model, x, t, context)
    torch.testing.assert_close(got, x, atol=1e-10, rtol=1e-10)


def test_guidance():
    model = tiny_model(torch.float64)
    x, clean, t, context = tiny_inputs(2, torch.float64)
    negative = [torch.zeros(1, CONFIG.text_dim, dtype=torch.float64)] * 2
    streams = {
        "both": Stream(model, context, SHAPE, 2, window=1, negative_context=negative, guidance=3.0),
        "positive": Stream(model, context, SHAPE, 2, window=1),
        "negative": Stream(model, negative, SHAPE, 2, window=1),
    }
    for stream in streams.values():
        stream.commit(clean)
    v = {name: stream.velocity(x, t) for name, stream in streams.items()}
    assert v["both"].shape == x.shape
    torch.testing.assert_close(v["both"], v["negative"] + 3.0 * (v["positive"] - v["negative"]), atol=1e-10, rtol=0)
    assert (v["both"] - v["positive"]).abs().max() > 1e-3


def test_sample_bidirectional():
    model = tiny_model(torch.float64)
    _, _, _, context = tiny_inputs(1, torch.float64)
    negative = [torch.zeros(1, CONFIG.text_dim, dtype=torch.float64)] * 2
    got = sample_bidirectional(model, context, negative, (4, 2, 4, 4), 3, 2.0, 5.0, generator(6))
    x = torch.randn(2, 4, 2, 4, 4, generator=generator(6), dtype=torch.float64)
    levels = [*sampling_levels(3, 5.0).tolist(), 0.0]
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        positive, negated = (bidirectional_forward(model, x, t, c).detach() for c in (context, negative))
        x = x + (s - t) * (negated + 2.0 * (positive - negated))
    torch.testing.assert_close(got, x, atol=1e-10, rtol=0)
    plain = sample_bidirectional(model, context, None, (4, 2, 4, 4), 3, generator=generator(6))
    assert (plain - got).abs().max() > 1e-3


def test_bad_stream_arguments():
    model = tiny_model()
    x, _, t, context = tiny_inputs(2)
    for change, message in (
        ({"latent_shape": (3, 4, 4)}, "latent_shape: got"),
        ({"latent_shape": (4, 5, 4)}, "latent_shape: got"),
        ({"latent_shape": (4, 4)}, r"latent_shape: got \(4, 4\), expected \(C, H, W\)"),
        ({"chunk_frames": 0}, "chunk_frames: got 0"),
        ({"chunk_frames": []}, "chunk_frames: got"),
        ({"context": [torch.zeros(9, 12)]}, "expected at most text_len"),
        ({"negative_context": [torch.zeros(1, 12)]}, "negative_context: got 1 prompts, expected 2"),
        ({"window": -1}, "window: got -1"),
        ({"sink": -1}, "sink: got -1"),
        ({"max_frames": 0}, "max_frames: got 0"),
        ({"guidance": 3.0}, "guidance: got 3.0 without a negative_context"),
    ):
        with pytest.raises(ValueError, match=message):
            Stream(model, **{"context": context, "latent_shape": SHAPE, "window": 1, **change})
    with pytest.raises(ValueError, match="max_frames: got None"):
        Stream(model, context, SHAPE, 2).velocity(x, t)
    stream = Stream(model, context, SHAPE, 2, max_frames=2)
    with pytest.raises(ValueError, match="x: got shape"):
        stream.velocity(x[:, :, :1], t)
    with pytest.raises(ValueError, match="t: got noise level 2"):
        stream.velocity(x, 2.0)
    with pytest.raises(ValueError, match="sampler: got 'heun'"):
        next(stream.generate(sampler="heun"))
    for levels in ([], [0.5, 0.9], [1.2], [1.0, 0.0]):
        with pytest.raises(ValueError, match="levels: got"):
            stream.generate(levels=levels)
    for frames in (0, -2):
        with pytest.raises(ValueError, match=f"frames: got {frames}, expected at least 1"):
            stream.generate(frames)
    with pytest.raises(ValueError, match="frames: got 3 frames in all"):
        stream.generate(3)
    with pytest.raises(ValueError, match="generator: got 1 generators, expected one or 2"):
        stream.noise([generator()])
    stream.commit(x)
    with pytest.raises(ValueError, match="max_frames: got a chunk of 2 at frame 2"):
        stream.commit(x)
    with pytest.raises(ValueError, match="negative_context: got 1 prompts, expected 2"):
        sample_bidirectional(model, context, context[:1], (4, 1, 4, 4))


@pytest.mark.gpu
def test_velocity_does_not_wait_for_the_gpu():
    model = tiny_model(torch.bfloat16).cuda()
    x, clean, _, context = (i.cuda() if isinstance(i, torch.Tensor) else i for i in tiny_inputs(2))
    stream = Stream(model, context, SHAPE, 2, sink=1, window=1)
    stream.commit(clean)
    first = stream.velocity(x, 0.5)  # uploads the plan of this chunk
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = stream.velocity(x, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
