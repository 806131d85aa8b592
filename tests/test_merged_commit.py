"""The clean pass of a chunk and the first step of the next as one forward, against the two apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.rollout import rollout
from raven.stream import Stream

SHAPE = (4, 4, 4)
EXACT = {"atol": 1e-12, "rtol": 1e-12}
SETTINGS = {
    "all history": {"max_frames": 12},
    "window": {"window": 1},
    "no window at all": {"window": 0},
    "sink": {"sink": 1, "window": 1},
    "two sinks alone": {"sink": 2, "window": 0},
    "ragged": {"chunk_frames": [1, 3, 2], "sink": 1, "window": 1},
    "ragged history": {"chunk_frames": [3, 1, 2], "max_frames": 12},
}


def streams(dtype=torch.float64, **options):
    """The same stream twice, merging and not, with noise from equal seeds."""
    model = tiny_model(dtype)
    _, _, _, context = tiny_inputs(1, dtype)
    options = {"chunk_frames": 2, **options}
    return [
        Stream(model, context, SHAPE, merge=merge, generator=torch.Generator().manual_seed(7), **options)
        for merge in (True, False)
    ]


def count_forwards(stream, monkeypatch):
    """(frames of x, frames encoded on the way) of every forward of the stream's model from now on."""
    calls = []
    forward = type(stream.model).forward

    def counted(self, x, *args, x_0=None, **kwargs):
        calls.append((x.shape[2], 0 if x_0 is None else x_0.shape[2]))
        return forward(self, x, *args, x_0=x_0, **kwargs)

    monkeypatch.setattr(type(stream.model), "forward", counted)
    return calls


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_is_separate(name):
    merged, separate = streams(**SETTINGS[name])
    levels = [1.0, 0.6]
    for (a, states_a), (b, states_b) in zip(
        merged.generate(12, levels, return_trajectory=True),
        separate.generate(12, levels, return_trajectory=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)
        torch.testing.assert_close(states_a, states_b, **EXACT)
    assert merged.frame == separate.frame == 12
    assert merged.cache.num_committed == separate.cache.num_committed - 1, "the last pass waits"
    merged.settle()
    assert merged.cache.visible_chunks == separate.cache.visible_chunks
    x = merged.noise()
    if merged.max_frames is None:
        torch.testing.assert_close(merged.velocity(x, 0.3), separate.velocity(x, 0.3), **EXACT)


def test_merged_with_guidance():
    negative = [torch.zeros(1, CONFIG.text_dim, dtype=torch.float64)] * 2
    merged, separate = streams(window=1, sink=1, negative_context=negative, guidance=3.0)
    for a, b in zip(merged.generate(10), separate.generate(10), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_levels_of_their_own_for_every_sample():
    x, clean, t, _ = tiny_inputs(2, torch.float64)
    got = []
    for stream in streams(window=1):
        stream.commit(clean, defer=True)
        got.append(stream.velocity(x, t))
    torch.testing.assert_close(*got, **EXACT)


def test_a_chunk_costs_as_many_forwards_as_steps(monkeypatch):
    merged, separate = streams(torch.float32, window=1)
    calls = count_forwards(merged, monkeypatch)
    list(merged.generate(6, levels=[1.0, 0.5]))
    assert calls == [(2, 0), (2, 0), (2, 2), (2, 0), (2, 2), (2, 0)]
    calls.clear()
    merged.settle()
    merged.settle()
    assert calls == [(2, 0)], "settled once"
    calls.clear()
    list(separate.generate(6, levels=[1.0, 0.5]))
    assert calls == [(2, 0)] * 9


def test_rollout_merges(monkeypatch):
    merged, separate = streams()
    calls = count_forwards(merged, monkeypatch)
    got = rollout(merged.model, merged.text, SHAPE, (1, 2), [1.0, 0.5], generator=torch.Generator().manual_seed(3))
    assert calls == [(1, 0), (1, 0), (2, 1), (2, 0)]
    separate = Stream(merged.model, merged.text, SHAPE, (1, 2), merge=False)
    items = list(separate.generate(levels=[1.0, 0.5], generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(got.x_0, torch.cat(items, dim=2), **EXACT)


def test_commits_by_hand_and_deferred_ones_mix():
    """Two chunks given one after the other, a velocity that is asked for twice, a chunk that is dropped."""
    x, clean, t, _ = tiny_inputs(2, torch.float64)
    merged, separate = streams(window=2)
    for stream, defer in ((merged, True), (separate, False)):
        stream.commit(clean, defer=defer)
        stream.commit(x, defer=defer)
    first = merged.velocity(x, 0.7)
    torch.testing.assert_close(first, separate.velocity(x, 0.7), **EXACT)
    torch.testing.assert_close(merged.velocity(x, 0.7), first, **EXACT)
    merged.cache.cancel()
    torch.testing.assert_close(merged.velocity(x, 0.7), first, **EXACT)
    assert merged.cache.num_committed == separate.cache.num_committed == 2


@given(
    calls=st.lists(st.sampled_from(["velocity", "commit", "defer", "settle", "cancel", "prompt"]), max_size=9),
    sink=st.integers(0, 1),
    window=st.integers(0, 2),
    sizes=st.lists(st.integers(1, 2), min_size=1, max_size=3),
)
@settings(max_examples=12, deadline=None)
def test_any_order_of_calls(calls, sink, window, sizes):
    merged, separate = streams(sink=sink, window=window, chunk_frames=sizes)
    generator = torch.Generator().manual_seed(0)
    for call in [*calls, "velocity"]:
        x = merged.noise(generator)
        prompt = torch.randn(2, 3, CONFIG.text_dim, dtype=x.dtype, generator=generator)
        cancels = call == "cancel" and separate.cache.current is not None
        found = []
        for stream in (merged, separate):
            if call == "velocity":
                found.append(stream.velocity(x, 0.7))
            elif call in ("commit", "defer"):
                stream.commit(x, defer=call == "defer")
            elif call == "settle":
                stream.settle()
            elif call == "prompt":
                stream.set_text(prompt)
            elif cancels:
                stream.cache.cancel()
        if found:
            torch.testing.assert_close(*found, **EXACT)


def test_what_was_handed_out_may_be_changed():
    """A consumer that scales chunks in place, as decoders do, must not reach the history."""
    merged, separate = streams(window=1)
    for a, b in zip(merged.generate(8, [1.0]), separate.generate(8, [1.0]), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
        a.mul_(100)


def test_a_failed_merged_pass_can_be_repeated(monkeypatch):
    x, clean, _, _ = tiny_inputs(2, torch.float64)
    merged, separate = streams(window=1)
    merged.commit(clean, defer=True)
    separate.commit(clean)
    block = merged.model.blocks[1]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(block, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
        merged.velocity(x, 0.7)
    torch.testing.assert_close(merged.velocity(x, 0.7), separate.velocity(x, 0.7), **EXACT)


def test_new_prompts_begin_with_the_next_chunk():
    """The deferred pass of the chunk before belongs to the old prompt."""
    other = [torch.ones(3, CONFIG.text_dim, dtype=torch.float64)] * 2
    got = []
    for stream in streams(window=1):
        chunks = [*stream.generate(4, [1.0, 0.5])]
        stream.set_text(other)
        got.append([*chunks, *stream.generate(4, [1.0, 0.5])])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    same = streams(window=1)[0]
    assert (torch.cat(list(same.generate(8, [1.0, 0.5])), 2) - torch.cat(got[0], 2)).abs().max() > 1e-3


def test_reset_begins_a_new_video():
    stream = streams(window=1)[0]
    first = torch.cat(list(stream.generate(6, generator=torch.Generator().manual_seed(1))), 2)
    stream.reset()
    assert (stream.frame, stream.chunk, stream.cache.num_committed) == (0, 0, 0)
    again = torch.cat(list(stream.generate(6, generator=torch.Generator().manual_seed(1))), 2)
    assert torch.equal(first, again)
    stream.reset(context=[torch.ones(1, CONFIG.text_dim, dtype=torch.float64)] * 2)
    other = torch.cat(list(stream.generate(6, generator=torch.Generator().manual_seed(1))), 2)
    assert (first - other).abs().max() > 1e-3


def test_raw_keys_are_encoded_apart(monkeypatch):
    stream = Stream(tiny_model(), tiny_inputs(1)[3], SHAPE, 2, sink=1, window=1, keys="raw")
    calls = count_forwards(stream, monkeypatch)
    list(stream.generate(4, levels=[1.0]))
    assert calls == [(2, 0)] * 4 and stream.cache.spare == 0


def test_bad_arguments():
    stream = streams(window=1)[0]
    with pytest.raises(ValueError, match="context: got 1 prompts, expected 2"):
        stream.set_text([torch.zeros(1, CONFIG.text_dim, dtype=torch.float64)])
    with pytest.raises(ValueError, match="negative_context: got one for a stream without"):
        stream.set_text(stream.text, stream.text)
    with pytest.raises(ValueError, match="graphs: got True for a model on cpu"):
        Stream(stream.model, stream.text, SHAPE, 2, window=1, graphs=True)


@pytest.mark.parametrize("action", ["retry", "settle", "commit"])
def test_a_merged_pass_that_is_broken_off(action, monkeypatch):
    """Out of memory or Ctrl-C in the middle of it: the stream goes on as if it had not been begun."""
    merged, separate = streams(window=1)
    chunk, other, x = torch.randn(3, 2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for stream in (merged, separate):
        stream.commit(chunk, defer=True)

    def no_memory(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(merged.model.blocks[1], "forward", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            merged.velocity(x, 1.0)
    assert merged.cache.following is not None
    for stream in (merged, separate):
        if action == "settle":
            stream.settle()
        elif action == "commit":
            stream.commit(other)
    torch.testing.assert_close(merged.velocity(x, 0.7), separate.velocity(x, 0.7), **EXACT)
