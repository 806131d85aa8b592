"""KVCache against a list of all chunks ever committed."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raven.cache import KVCache
from raven.layout import ChunkLayout

CHUNK_TOKENS = 3


def visible(chunk, sink, window):
    """Past chunks that ``chunk`` sees, from the rule."""
    return [j for j in range(chunk) if j < sink or window is None or chunk - j <= window]


def write(cache, value):
    """What a forward does: keys and values of the chunk in flight, here all ``value`` (and its negative)."""
    for k, v in zip(cache.k, cache.v, strict=True):
        k[:, cache.slots.long()] = value
        v[:, cache.slots.long()] = -value


class CacheMachine(RuleBasedStateMachine):
    """``committed`` is the plain model: for each chunk its marker, tokens and frames."""

    @initialize(
        sink=st.integers(0, 2),
        window=st.none() | st.integers(0, 3),
        limit=st.none() | st.integers(1, 7),
        spare=st.integers(0, 2),
    )
    def make(self, sink, window, limit, spare):
        self.limit = 6 if window is None and limit is None else limit
        self.sink, self.window, self.spare = sink, window, spare
        self.cache = KVCache(2, 1, 1, 2, CHUNK_TOKENS, sink, window, self.limit, dtype=torch.float32, spare=spare)
        for tensor in self.cache.k + self.cache.v:
            tensor.fill_(torch.nan)  # rows that were never written must never be visible
        self.committed = []
        self.open = self.next = None  # (tokens, frame, frames)
        self.marker = self.next_marker = 0
        self.rows = {}

    @precondition(lambda self: self.open is None)
    @rule(tokens=st.integers(1, CHUNK_TOKENS), frames=st.integers(1, 2))
    def begin(self, tokens, frames):
        frame = sum(c[2] for c in self.committed)
        if self.limit is not None and len(self.committed) == self.limit:
            with pytest.raises(RuntimeError, match="the cache is full"):
                self.cache.begin(tokens, frame, frames)
            return
        self.cache.begin(tokens, frame, frames)
        self.open = (tokens, frame, frames)
        self.write()

    @precondition(lambda self: self.open is not None)
    @rule()
    def write(self):
        """Another denoising step: the same rows again, with new values."""
        self.cache.begin(*self.open)
        self.marker = self.next_marker = max(self.marker, self.next_marker) + 1
        if self.next is not None:
            self.cache.begin_next(*self.next)
            self.next_marker += 1
        markers = [self.marker] * self.open[0] + [self.next_marker] * (self.next[0] if self.next else 0)
        write(self.cache, torch.tensor(markers, dtype=torch.float32)[:, None, None])

    @precondition(lambda self: self.open is not None and self.next is None)
    @rule(tokens=st.integers(1, CHUNK_TOKENS), frames=st.integers(1, 2))
    def begin_next(self, tokens, frames):
        chunk, frame = len(self.committed) + 1, self.open[1] + self.open[2]
        if self.limit is not None and chunk >= self.limit:
            with pytest.raises(RuntimeError, match="the cache is full"):
                self.cache.begin_next(tokens, frame, frames)
        elif self.spare == 0 and self.window is not None and chunk >= self.sink + self.window + 1:
            with pytest.raises(RuntimeError, match="expected a cache with spare=1"):
                self.cache.begin_next(tokens, frame, frames)
        else:
            self.cache.begin_next(tokens, frame, frames)
            self.next = (tokens, frame, frames)
            self.write()

    @precondition(lambda self: self.open is not None)
    @rule()
    def commit(self):
        self.cache.commit()
        self.committed.append((self.marker, self.open[0], self.open[2]))
        self.open, self.next = self.next, None
        self.marker = self.next_marker

    @precondition(lambda self: self.open is not None)
    @rule()
    def cancel(self):
        self.cache.cancel()
        if self.next is None:
            self.open = None
        self.next = None

    @precondition(lambda self: self.open is not None)
    @rule()
    def begin_with_another_size(self):
        tokens, frame, frames = self.open
        with pytest.raises(RuntimeError, match=r"commit\(\) or cancel\(\)"):
            self.cache.begin(tokens, frame + 1, frames)

    @precondition(lambda self: len(self.committed) > 3)
    @rule()
    def reset(self):
        self.cache.reset()
        self.committed, self.open, self.next = [], None, None

    @invariant()
    def sees_exactly_the_visible_chunks(self):
        past = visible(len(self.committed), self.sink, self.window)
        assert self.cache.num_committed == len(self.committed)
        assert list(self.cache.visible_chunks) == past
        starts = [sum(c[2] for c in self.committed[:j]) for j in past]
        assert [(c.frame, c.frames) for c in self.cache.history] == [
            (start, self.committed[j][2]) for j, start in zip(past, starts, strict=True)
        ]
        if self.open is None:
            assert self.cache.current is None
            return
        assert (self.cache.following is not None) == (self.next is not None)
        chunks = [*self.committed, (self.marker, *self.open[::2])]
        queries = [(0, self.open[0])]
        if self.next is not None:
            chunks.append((self.next_marker, *self.next[::2]))
            queries.append((self.open[0], self.open[0] + self.next[0]))
        rows = self.cache.spans.rows()
        assert [query for query, _ in rows] == queries
        for i, (_, keys) in enumerate(rows, len(self.committed)):
            seen = [*visible(i, self.sink, self.window), i]
            want = sorted([m for j in seen for m in [chunks[j][0]] * chunks[j][1]])
            index = torch.cat([torch.arange(*r) for r in keys])
            for k, v in zip(self.cache.k, self.cache.v, strict=True):
                assert sorted(k[0, index, 0, 0].tolist()) == want
                assert torch.equal(v[:, index], -k[:, index])

    @invariant()
    def slots_keep_their_address(self):
        if self.open is not None:
            slots = self.cache.slots
            first = self.rows.setdefault(tuple(slots.tolist()), slots)
            assert slots is first


TestCacheAgainstList = CacheMachine.TestCase
TestCacheAgainstList.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("sink", "window"), [(0, None), (0, 0), (0, 2), (1, 1), (2, 0)])
def test_cached_decode_sees_what_the_packed_layout_sees(sink, window):
    sizes = (1, 2, 2, 2, 2, 2)
    layout = ChunkLayout.repacked(sizes, 3, sink, window)
    mask = layout.dense_mask()
    cache = KVCache(1, 1, 1, 2, 6, sink, window, max_chunks=6, dtype=torch.float32)
    for z in layout.by_role("noisy"):
        cache.begin(z.length, z.frame, z.frames)
        packed = [x.chunk for x in layout.by_role("clean") if mask[z.start, x.start]]
        assert list(cache.visible_chunks) == packed
        assert [(c.frame, c.frames) for c in cache.history] == [(sum(sizes[:j]), sizes[j]) for j in packed]
        assert cache.spans.pairs == int(mask[z.start : z.end].sum())
        cache.commit()


def test_whole_chunks_merge_into_one_range():
    cache = KVCache(1, 1, 1, 2, 4, sink=1, window=2, dtype=torch.float32)
    for chunk in range(9):
        cache.begin(4, chunk, 1)
        assert len(cache.spans.kv_ranges) == 1
        if chunk >= 3:
            assert cache.spans.rows() == (((0, 4), ((0, 16),)),)
        cache.commit()


def test_short_chunks_leave_the_rest_of_their_slot_unread():
    cache = KVCache(1, 1, 1, 2, 4, window=1, dtype=torch.float32)
    cache.begin(1, 0, 1)
    cache.commit()
    cache.begin(4, 1, 3)
    assert cache.spans.rows() == (((0, 4), ((0, 1), (4, 8))),)
    assert cache.slots.tolist() == [4, 5, 6, 7] and cache.slots.dtype == torch.int32


@pytest.mark.parametrize(
    ("settings_of", "slots"),
    [
        ({"window": None, "max_chunks": 7}, 7),  # CausVid, Self Forcing without a local window
        ({"sink": 1, "window": 2}, 4),  # LongLive: 12 frames in chunks of 3, 3 of them sink
        ({"sink": 0, "window": 6}, 7),  # Self Forcing, local window of 21 frames, its own chunk included
        ({"sink": 2, "window": 2, "max_chunks": 3}, 3),  # a video shorter than the ring
    ],
)
def test_slots(settings_of, slots):
    cache = KVCache(1, 1, 1, 2, 4, **settings_of)
    assert cache.num_slots == slots and cache.k[0].shape[1] == 4 * slots


def test_buffers_and_bytes():
    cache = KVCache(30, 1, 12, 128, 4680, max_chunks=7, dtype=torch.bfloat16, device="meta")
    assert len(cache.k) == len(cache.v) == 30 and cache.k[3].shape == (1, 32_760, 12, 128)
    assert cache.nbytes == 30 * 2 * 32_760 * 12 * 128 * 2  # 6.04 GB, Wan 1.3B with 21 frames
    assert "30 layers, batch 1, 7 slots of 4680 tokens, 12 heads of 128" in repr(cache)


def test_float8_has_scales():
    cache = KVCache(30, 1, 12, 128, 4680, max_chunks=7, dtype=torch.float8_e4m3fn, device="meta")
    assert [x[3].shape for x in (cache.k_scale, cache.v_scale)] == [(1, 32_760, 12)] * 2
    assert cache.k_scale[3].dtype == torch.float32 and len(cache.v_scale) == 30
    assert cache.nbytes == 30 * 2 * 32_760 * 12 * (128 + 4)  # 3.11 GB


def test_read_gives_what_attention_takes():
    plain = KVCache(2, 1, 1, 2, 2, window=0, dtype=torch.bfloat16)
    assert plain.k_scale == plain.v_scale == (None, None)
    k, v = plain.read(1, torch.bfloat16)
    assert k is plain.k[1] and v is plain.v[1]
    for buffer in (plain.k[0], plain.v[0]):
        buffer.fill_(1.5)
    k, v = plain.read(0, torch.float32)
    assert k.dtype == v.dtype == torch.float32 and k.eq(1.5).all() and v.eq(1.5).all()

    stored = KVCache(1, 1, 2, 2, 1, window=0, dtype=torch.float8_e4m3fn)
    stored.k[0].copy_(torch.tensor([[[[448.0, -224.0], [1.0, 0.0]]]]))
    stored.v[0].copy_(torch.full((1, 1, 2, 2), -448.0))
    stored.k_scale[0].copy_(torch.tensor([[[0.5, 3.0]]]))
    stored.v_scale[0].fill_(2.0**-3)
    k, v = stored.read(0, torch.float16)
    assert k.dtype == torch.float16 and k.tolist() == [[[[224.0, -112.0], [3.0, 0.0]]]] and v.eq(-56.0).all()


def test_reset_keeps_the_buffers():
    cache = KVCache(1, 1, 1, 2, 2, window=1, dtype=torch.float32)
    cache.begin(2, 0, 1)
    address, slots = cache.k[0].data_ptr(), cache.slots
    cache.commit()
    cache.begin(2, 1, 1)
    cache.reset()
    assert cache.num_committed == 0 and cache.current is None and cache.history == ()
    cache.begin(2, 0, 1)
    assert cache.k[0].data_ptr() == address and cache.slots is slots


def test_a_cache_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        cache = KVCache(1, 1, 1, 2, 2, window=0, dtype=torch.float32)
        cache.begin(2, 0, 1)
        write(cache, 1.0)
    write(cache, 2.0)
    assert cache.k[0].eq(2).all() and cache.v[0].eq(-2).all()


@pytest.mark.parametrize("name", ["commit", "cancel", "slots", "spans"])
def test_nothing_goes_without_an_open_chunk(name):
    cache = KVCache(1, 1, 1, 2, 2, window=0)
    cache.begin(2, 0, 1)
    cache.commit()
    with pytest.raises(RuntimeError, match=rf"{name}: no chunk is open; call begin"):
        getattr(cache, name)()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_layers": 0}, ValueError, "num_layers: got 0"),
        ({"batch": 0}, ValueError, "batch: got 0"),
        ({"heads": -1}, ValueError, "heads: got -1"),
        ({"head_dim": 0}, ValueError, "head_dim: got 0"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: got 0"),
        ({"chunk_tokens": 2.5}, TypeError, "chunk_tokens: got 2.5"),
        ({"sink": -1}, ValueError, "sink: got -1"),
        ({"window": -1}, ValueError, "window: got -1"),
        ({"window": None}, ValueError, "max_chunks: got None with window=None"),
        ({"max_chunks": 0}, ValueError, "max_chunks: got 0"),
    ],
)
def test_bad_settings_are_named(change, error, match):
    good = {"num_layers": 1, "batch": 1, "heads": 1, "head_dim": 2, "chunk_tokens": 2, "window": 1}
    with pytest.raises(error, match=match):
        KVCache(**(good | change))


@pytest.mark.parametrize(
    ("args", "match"),
    [((0, 0, 1), "tokens: got 0"), ((5, 0, 1), "chunk_tokens=4"), ((4, -1, 1), "frame: got"), ((4, 0, 0), "frames: ")],
)
def test_bad_chunks_are_named(args, match):
    cache = KVCache(1, 1, 1, 2, 4, window=1)
    with pytest.raises(ValueError, match=match):
        cache.begin(*args)
    assert cache.current is None


def test_a_full_cache_says_what_to_do():
    cache = KVCache(1, 1, 1, 2, 4, max_chunks=1)
    cache.begin(4, 0, 1)
    cache.commit()
    with pytest.raises(RuntimeError, match=r"all max_chunks=1 .* larger max_chunks, or a window"):
        cache.begin(4, 1, 1)
