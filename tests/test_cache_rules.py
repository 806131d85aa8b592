"""What long videos ask of the cache: raw keys, a blended sink, chunks encoded anew; against the plain statement."""

from dataclasses import replace

import pytest
import torch
from naive_cache import NaiveCache
from tiny_wan import CONFIG, tiny_inputs, tiny_model

import raven
from raven.cache import KVCache
from raven.cache_rules import EmaSink
from raven.presets import PRESETS, preset
from raven.stream import Stream
from raven.testing import relative_rms

GRID = (2, 1)  # a frame of 4 x 2 latents
SIZE = (4, 2)
CACHE_OPTIONS = ("sink", "window", "keys", "ema")


def make_cache(frames, dtype=torch.float64, batch=1, config=CONFIG, max_chunks=None, **options):
    grid = GRID if options.get("keys") == "raw" else None
    sizes = (config.num_layers, batch, config.num_heads, config.head_dim, frames * GRID[0] * GRID[1])
    return KVCache(*sizes, dtype=dtype, max_chunks=max_chunks, grid=grid, **options)


@torch.no_grad()
def run(model, cache, chunks, text, last=99, first=0):
    """Commit all ``chunks``; the ``last`` of them after two passes at different levels. Velocities of the second."""
    out, frame = [], first
    for i, x in enumerate(chunks):
        if i >= len(chunks) - last:
            model(-x, 0.9, text, cache=cache, frame=frame)
            out.append(model(x, 0.5, text, cache=cache, frame=frame))
        model(0.3 * x, 0.0, text, cache=cache, frame=frame, write_only=True)
        cache.commit()
        frame += x.shape[2]
    return torch.cat(out, dim=2) if out else None


def latents(frames, count, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 1, 4, frames, *SIZE, generator=generator, dtype=dtype))


def prompt(model, seed=1):
    with torch.no_grad():
        return model.encode_text(tiny_inputs(1, model.dtype, batch=1, seed=seed)[3])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_plain_rule(name):
    options = preset(name)
    frames, rule = options["chunk_frames"], {k: v for k, v in options.items() if k in CACHE_OPTIONS}
    limited = rule.get("window") is not None
    count = rule.get("sink", 0) + rule["window"] + 6 if limited else 5
    model = tiny_model(torch.float64)
    text, chunks = prompt(model), latents(frames, count)
    cache = make_cache(frames, max_chunks=None if limited else count, **rule)
    plain = NaiveCache(CONFIG, 1, GRID, **rule)
    got, want = (run(model, c, chunks, text, last=6) for c in (cache, plain))
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("rule", [{"keys": "raw"}, {"keys": "raw", "ema": 0.9}, {"keys": "rotated"}], ids=str)
def test_other_chunk_sizes_and_sinks(rule):
    """A short first chunk (its slot stays partly empty), sinks of two chunks where a blend does not need one."""
    model = tiny_model(torch.float64)
    text, chunks = prompt(model), latents(2, 9)
    rule = rule | {"sink": 1 if "ema" in rule else 2, "window": 2}
    if "ema" not in rule:
        chunks[0] = chunks[0][:, :, :1]
    got = run(model, make_cache(2, **rule), chunks, text)
    torch.testing.assert_close(got, run(model, NaiveCache(CONFIG, 1, GRID, **rule), chunks, text), atol=1e-11, rtol=0)


def test_the_rules_differ():
    """So that no test above passes because a rule did nothing."""
    model = tiny_model(torch.float64)
    text, chunks = prompt(model), latents(1, 7)
    rules = ({}, {"keys": "raw"}, {"keys": "raw", "ema": 0.9}, {"keys": "raw", "ema": 0.8})
    results = [run(model, make_cache(1, sink=1, window=2, **rule), chunks, text) for rule in rules]
    for i, a in enumerate(results):
        # Nothing has left the window before the fifth chunk, and until then nothing differs.
        torch.testing.assert_close(a[:, :, :4], results[0][:, :, :4], atol=1e-11, rtol=0)
        for b in results[:i]:
            assert (a[:, :, 4:] - b[:, :, 4:]).abs().max() > 1e-6


@pytest.mark.parametrize("keys", ["rotated", "raw"])
def test_beyond_1024_frames(keys):
    """1,200 frames, every chunk built on those before it; the last ones against the plain rule."""
    config = replace(CONFIG, num_layers=2)
    model = tiny_model(torch.float64, config)
    text, chunks = prompt(model), latents(24, 50)
    results = []
    for make in (make_cache, NaiveCache):
        rule = {"sink": 1, "window": 1, "keys": keys}
        cache = make(24, config=config, **rule) if make is make_cache else make(config, 1, GRID, **rule)
        results.append(run(model, cache, chunks, text, last=3))
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)


def test_raw_keys_do_not_know_where_a_video_is():
    model = tiny_model()
    text, chunks = prompt(model), latents(1, 6, torch.float32)
    results = [
        run(model, make_cache(1, torch.float32, sink=1, window=2, keys="raw"), chunks, text, first=first)
        for first in (0, 2**30)
    ]
    assert torch.equal(*results)


def test_layers_share_one_scratch():
    model = tiny_model()
    text, chunks = prompt(model), latents(1, 5, torch.float32)
    cache = make_cache(1, torch.float32, sink=1, window=1, keys="raw")
    before = cache.nbytes
    cache.begin(2, 0, 1)
    first = cache.read(0, torch.float32)[0]
    cache.cancel()
    run(model, cache, chunks, text)
    cache.begin(2, 5, 1)
    for layer in range(CONFIG.num_layers):
        k, v = cache.read(layer, torch.float32)
        assert k.data_ptr() == first.data_ptr() and v is cache.v[layer]
    assert cache.nbytes == before + first.nbytes


def test_views_come_round():
    """A ring has as many states as slots: their tables are made once, and graphs may keep them."""
    cache = make_cache(1, torch.float32, sink=1, window=2, keys="raw")
    seen = {}
    for chunk in range(40):
        cache.begin(2, chunk, 1)
        rows, positions = cache._table.rows, cache._table.positions
        if chunk >= 4:
            state = seen.setdefault(cache.state, (rows.data_ptr(), positions.data_ptr()))
            assert state == (rows.data_ptr(), positions.data_ptr())
            assert cache.query_frame == 3 and positions[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        cache.commit()
    assert len(seen) == 3


def test_raw_keys_in_float8():
    """Scaled back and rotated in one pass, into the same buffers; as near to the exact keys as rotated float8 is."""
    model = tiny_model()
    text, chunks = prompt(model), latents(1, 6, torch.float32)
    errors = {}
    for keys in ("rotated", "raw"):
        rule = {"sink": 1, "window": 2, "keys": keys}
        want = run(model, make_cache(1, torch.float32, **rule), chunks, text)
        cache = make_cache(1, torch.float8_e4m3fn, **rule)
        errors[keys] = relative_rms(run(model, cache, chunks, text), want)
        assert {name for name, _ in cache._scratch} == {"k", "v"}
    assert 0 < errors["raw"] < 1.5 * errors["rotated"] < 0.05


@pytest.mark.parametrize("name", PRESETS)
def test_streams_take_presets(name):
    options = preset(name)
    model = tiny_model()
    stream = Stream(model, tiny_inputs(1, batch=1)[3], (4, *SIZE), **preset(name, max_frames=21))
    cache = stream.cache
    assert cache.chunk_tokens == options["chunk_frames"] * 2 and cache.grid == (GRID if cache.keys == "raw" else None)
    for key, usual in (("sink", 0), ("window", None), ("keys", "rotated"), ("ema", None)):
        assert getattr(cache, key) == options.get(key, usual)
    assert (stream._recent is not None) == ("recache" in options)


# The blended sink


def filled(cache, value):
    for x in (*cache.k, *cache.v):
        x[:, cache.slots.long()] = value


def test_a_chunk_is_blended_once():
    """However often it is begun, written or cancelled; and only when the next chunk no longer sees it."""
    cache = make_cache(1, sink=1, window=1, keys="raw", ema=0.75)
    sink = []
    for chunk in range(5):
        for _ in range(2):
            cache.begin(2, chunk, 1)
            filled(cache, -100.0)
            cache.cancel()
        cache.begin(2, chunk, 1)
        for value in (-50.0, float(chunk)):
            cache.begin(2, chunk, 1)
            filled(cache, value)
        cache.commit()
        sink.append([x[0, 0, 0, 0].item() for x in (*cache.k, *cache.v)])
    # After chunk 2 chunk 1 leaves, after chunk 3 chunk 2, after chunk 4 chunk 3.
    want = [0.0, 0.0, 0.25 * 1, 0.75 * 0.25 + 0.25 * 2, 0.75 * (0.75 * 0.25 + 0.25 * 2) + 0.25 * 3]
    assert sink == [[w] * 6 for w in want]
    cache.reset()
    cache.begin(2, 0, 1)
    filled(cache, 8.0)
    cache.commit()
    assert cache.k[0][0, 0, 0, 0] == 8.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_are_not_lost_to_rounding(dtype):
    """0.999 in bfloat16: every step is below half a unit in the last place, all together are 63 % of the way."""
    chunks = torch.full((1, 20, 1, 16), 1.0, dtype=dtype)
    chunks[:, :10] = torch.linspace(3.0, 4.0, 10).view(1, 10, 1, 1)
    blend = EmaSink(0.999, [chunks], [chunks.clone()], 10)
    cache = KVCache(1, 1, 1, 16, 10, sink=1, window=0, keys="raw", ema=0.999, grid=(10, 1), dtype=dtype)
    for chunk in range(2):
        cache.begin(10, chunk, 1)
        cache.commit()
    sink, evicted = cache._held[0], cache._held[1]
    want = chunks[:, :10].double()
    for _ in range(1000):
        blend(sink, evicted)
        want = 0.999 * want + 0.001 * chunks[:, 10:].double()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(chunks[:, :10].double(), want, atol=0, rtol=unit)
    assert (chunks[:, :10] < 2.2).all()


def test_a_blend_needs_equal_chunks():
    cache = make_cache(2, sink=1, window=0, keys="raw", ema=0.5)
    cache.begin(2, 0, 1)
    cache.commit()
    with pytest.raises(ValueError, match="tokens: got 4, expected 2 as the sink"):
        cache.begin(4, 1, 2)


# Chunks opened again


def test_reopened_chunk_sees_what_it_is_told():
    cache = make_cache(1, torch.float32, sink=1, window=2)
    for chunk in range(6):
        cache.begin(2, chunk, 1)
        filled(cache, float(chunk))
        cache.commit()
    assert cache.held_chunks == (0, 3, 4, 5) and cache.visible_chunks == (0, 4, 5)
    cache.reopen(4, history=[3])
    assert cache.visible_chunks == (3,) and cache.current.chunk == 4
    with pytest.raises(RuntimeError, match="reopen: a chunk is open"):
        cache.reopen(5)
    with pytest.raises(RuntimeError, match="begin_next: got"):
        cache.begin_next(2, 6, 1)
    cache.begin(2, 4, 1)  # as the model does
    filled(cache, 40.0)
    cache.commit()
    assert cache.num_committed == 6 and cache.visible_chunks == (0, 4, 5)
    held = {c.chunk: cache.k[0][0, c.start, 0, 0].item() for c in cache.history}
    assert held == {0: 0.0, 4: 40.0, 5: 5.0}
    cache.reopen(5)
    cache.cancel()
    assert cache.num_committed == 6 and cache.current is None
    for chunk, history, name in ((2, (), "chunk: got 2"), (6, (), "chunk: got 6"), (5, (1,), "history: got 1")):
        with pytest.raises(ValueError, match=name):
            cache.reopen(chunk, history)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"keys": "turned"}, ValueError, "keys: got 'turned'"),
        ({"grid": None}, ValueError, "grid: got None"),
        ({"grid": (2,)}, ValueError, r"grid: got \(2,\)"),
        ({"grid": (2, 0)}, ValueError, r"grid\[1\]: got 0"),
        ({"ema": 1.0}, ValueError, "ema: got 1.0"),
        ({"ema": 0.9, "keys": "rotated"}, ValueError, "ema: got keys='rotated'"),
        ({"ema": 0.9, "sink": 2}, ValueError, "ema: got sink=2"),
        ({"ema": 0.9, "window": None, "max_chunks": 3}, ValueError, "window=None"),
        ({"ema": 0.9, "dtype": torch.float8_e4m3fn}, TypeError, "ema: got a cache of float8_e4m3fn"),
    ],
)
def test_bad_settings_are_named(change, error, match):
    good = {"sink": 1, "window": 1, "keys": "raw", "grid": (2, 1)}
    with pytest.raises(error, match=match):
        KVCache(1, 1, 1, 4, 2, **(good | change))


def test_tokens_must_fit_the_grid():
    cache = make_cache(2, window=1, keys="raw")
    with pytest.raises(ValueError, match="tokens: got 3 for 2 frames, expected 2x1 a frame"):
        cache.begin(3, 0, 2)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: got 'ltx', expected one of raven, causvid"):
        preset("ltx")
    assert preset("longlive", window=5)["window"] == 5 and PRESETS["longlive"]["window"] == 2


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [{"keys": "rotated"}, {"keys": "raw"}, {"keys": "raw", "ema": 0.9}], ids=str)
def test_gpu_is_as_exact_as_the_reference(rule):
    """bfloat16 and heads of 128, eight chunks in a ring of three: errors relative to the plain rule in float64."""
    config = replace(CONFIG, dim=256, num_layers=2)
    exact = tiny_model(torch.float64, config)
    chunks = latents(2, 8)
    rule = {"sink": 1, "window": 1, **rule}
    want = run(exact, NaiveCache(config, 1, GRID, **rule), chunks, prompt(exact))
    model = tiny_model(torch.bfloat16, config).cuda()
    errors = {}
    for backend in ("reference", None):
        raven.set_backend(backend)
        cache = make_cache(2, torch.bfloat16, config=config, device="cuda", **rule)
        got = run(model, cache, [x.cuda().float() for x in chunks], prompt(model))
        errors[backend] = relative_rms(got.cpu(), want)
    assert errors[None] <= 2 * errors["reference"] and errors["reference"] < 0.05


@pytest.mark.gpu
def test_gpu_waits_for_nothing():
    """Once a ring has gone round, chunks, reads and blends neither upload nor read back."""
    model = tiny_model(torch.bfloat16).cuda()
    text, chunks = prompt(model), [x.cuda().float() for x in latents(1, 8)]
    cache = make_cache(1, torch.bfloat16, device="cuda", sink=1, window=1, keys="raw", ema=0.999)
    run(model, cache, chunks, text)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(model, cache, chunks, text, first=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again.isfinite().all()
