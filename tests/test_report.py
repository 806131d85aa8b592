"""The report: numbers from scores, charts, videos as files, and one page that holds everything."""

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from raven.demo import charts, media, numbers, report

PROMPTS = ["a red circle moves left", 'a <b> & "quoted" prompt']


def record(model, length, prompt, seed, value, slope=0.0):
    n = length // 3
    per_chunk = [value + slope * i for i in range(n)]
    return {
        "model": model,
        "length": length,
        "prompt": PROMPTS[prompt % 2],
        "prompt_index": prompt,
        "seed": seed,
        **dict.fromkeys(numbers.METRICS, sum(per_chunk) / n),
        "chunks": {metric: list(per_chunk) for metric in numbers.METRICS},
    }


def test_summary_has_mean_and_spread_of_the_seed_means():
    records = [record("raven", 6, p, s, 0.1 * s + 0.02 * p) for s in (1, 2, 3) for p in (0, 1)]
    (row,) = numbers.summarise(records)
    assert row["videos"] == 6 and row["seeds"] == [1, 2, 3]
    assert row["quality"]["mean"] == pytest.approx(0.21)
    assert row["quality"]["per_seed"] == pytest.approx([0.11, 0.21, 0.31])
    assert row["quality"]["spread"] == pytest.approx(0.1)
    assert len(row["chunks"]["quality"]["mean"]) == 2


def test_comparison_pairs_prompts_and_seeds_and_needs_two_standard_errors():
    rng = random.Random(0)
    before, better, same = [], [], []
    for p in range(8):
        for s in range(3):
            base = rng.uniform(0.2, 0.8)  # the spread between prompts is large, the paired difference is not
            before.append(record("start", 6, p, s, base))
            better.append(record("raven", 6, p, s, base + 0.05 + rng.gauss(0, 0.02)))
            same.append(record("grpo", 6, p, s, base + 0.05 * (-1) ** (p + s)))
    found = numbers.compare(before + better, "start", "raven", 6)
    assert found["videos"] == 24
    assert {m["verdict"] for m in found["metrics"].values()} == {"better"}
    assert numbers.verdict_in_short(found) == "helped"
    assert found["metrics"]["quality"]["difference"] == pytest.approx(0.05, abs=0.015)
    unclear = numbers.compare(before + same, "start", "grpo", 6)
    assert numbers.verdict_in_short(unclear) == "no clear change"
    assert "no clear difference in quality" in unclear["sentence"]
    worse = numbers.compare(
        [{**r, "model": "raven"} for r in before] + [{**r, "model": "start"} for r in better], "start", "raven", 6
    )
    assert numbers.verdict_in_short(worse) == "hurt" and "is worse in" in worse["sentence"]


def test_comparison_uses_only_common_videos():
    records = [record("teacher", 6, 0, 1, 0.9), record("grpo", 6, 0, 1, 0.8), record("grpo", 6, 1, 1, 0.1)]
    found = numbers.compare(records, "teacher", "grpo", 6)
    assert found["videos"] == 1
    assert found["metrics"]["quality"]["after"] == pytest.approx(0.8)
    assert found["metrics"]["quality"]["verdict"] == "unclear"  # one pair proves nothing
    assert numbers.compare(records, "start", "raven", 6) is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.5), (1e-6, 3e-6), (0.0, 12345.0)])
def test_ticks_are_round_and_inside(low, high):
    values = charts.ticks(low, high)
    assert 3 <= len(values) <= 12
    step = values[1] - values[0]
    assert all(low - 1e-9 * step <= v <= high + 1e-6 * step for v in values)
    mantissa = step / 10 ** np.floor(np.log10(step * 1.0000001))
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_smooth_is_a_trailing_mean():
    assert charts.smooth([1.0, 3.0, 5.0, 7.0], 2) == pytest.approx([1.0, 2.0, 4.0, 6.0])


def test_chart_leaves_out_points_that_are_not_finite():
    line = charts.Line("a & b", "raven", [1, 2, 3, 4, 5], [0.0, 1.0, float("nan"), 1.0, 0.0])
    svg = charts.chart([line], "t", "x", "y")
    assert svg.count("<polyline") == 2 and "nan" not in svg and "a &amp; b" in svg
    empty = charts.chart([charts.Line("a", "raven", [], [])], "t", "x", "y")
    assert "<svg" not in empty and "no values" in empty


@pytest.mark.parametrize("size", [(31, 33), (32, 32), (7, 300), (300, 7)])
def test_enlarged_frames_have_even_sides_and_the_same_pixels(size):
    frames = np.random.default_rng(0).integers(0, 255, (2, *size, 3), dtype=np.uint8)
    big = media.enlarge(frames, at_least=64)
    factor = big.shape[1] // size[0]
    assert big.shape[1] % 2 == 0 and big.shape[2] % 2 == 0 and min(big.shape[1:3]) >= 64
    assert (big[:, ::factor, ::factor] == frames).all()


def moving_square(frames=6, size=32):
    video = np.full((frames, size, size, 3), 20, dtype=np.uint8)
    for t in range(frames):
        video[t, 8:20, 2 + t : 14 + t] = (220, 40, 40)
    return video


def decoded(path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_mp4_grows_and_decodes_to_what_was_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    frames = media.enlarge(moving_square(), at_least=64)
    path = tmp_path / "sub" / "video.mp4"
    with media.VideoWriter(path, fps=8, key_every=3) as writer:
        writer.add(frames[:3])
        writer.add(frames[3:])
        with pytest.raises(ValueError, match="expected .* like the frames before"):
            writer.add(frames[:, :32, :32])
    back = decoded(path)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 6  # chroma is stored at half resolution


def test_mp4_refuses_odd_frames_and_an_impossible_place(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    with media.VideoWriter(tmp_path / "a.mp4") as writer, pytest.raises(ValueError, match="even width and height"):
        writer.add(np.zeros((1, 5, 6, 3), np.uint8))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        media.VideoWriter(tmp_path / "file" / "a.mp4")


def test_preview_is_an_endless_lossless_animation():
    image = pytest.importorskip("PIL.Image")
    import io

    frames = moving_square()
    opened = image.open(io.BytesIO(media.animated_webp(frames, fps=8)))
    assert opened.n_frames == 6 and opened.info["loop"] == 0
    opened.seek(3)
    assert (np.asarray(opened.convert("RGB")) == frames[3]).all()


def test_grid_places_every_tile():
    pytest.importorskip("PIL")
    a, b = moving_square(), moving_square()[::-1]
    sheet = media.grid([[a, b]], ["first", "second"], at_least=32, gap=8)
    assert sheet.shape[1] % 2 == 0 and sheet.shape[2] % 2 == 0
    assert (sheet[:, 22:54, 8:40] == a).all() and (sheet[:, 22:54, 48:80] == b).all()


def test_missing_package_names_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r"the test needs no_such_package: pip install raven-kernels\[demo\]"):
        media.need("no_such_package", "the test")


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        if tag != "line":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def example_metrics():
    values = {"teacher": 0.9, "start": 0.5, "raven": 0.7, "grpo": 0.7}
    records = [
        record(m, n, p, s, v, -0.01) for m, v in values.items() for n in (12, 36) for p in (0, 1) for s in (1, 2, 3)
    ]
    return {
        "run": {"title": "t <1>", "lead": "lead", "facts": [["Size", "tiny"]], "trained_chunks": 4},
        "lengths": {"trained": 12, "tripled": 36},
        "prompts": PROMPTS,
        "records": records,
        "rows": numbers.summarise(records),
        "comparisons": [numbers.compare(records, "start", "raven", n) for n in (12, 36)],
        "training": [{"title": "loss", "css": "raven", "x": [1, 2], "y": [2.0, 1.0], "x_label": "x", "y_label": "y"}],
        "stages": [{"title": "RAVEN", "what": "2 steps", "seconds": 1.25}],
    }


def test_report_is_one_well_formed_page_without_outside_references(tmp_path):
    pictures = report.Pictures(
        {(m, n, 0): b"webp" for m in numbers.LABELS for n in (12, 36) if (m, n) != ("teacher", 36)}
        | {("teacher", 36, 1): b"webp"},
        {12: b"mp4"},
        [("Repacked", "a caption", b"png")],
    )
    metrics = example_metrics()
    path = report.write(tmp_path, metrics, pictures)
    html = path.read_text()
    page = Page()
    page.feed(html)
    assert not page.open
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"https?://", html) and "$" not in html
    assert "t <1>" in page.text and PROMPTS[1] in page.text
    assert "RAVEN is better in quality (0.485 to 0.685, +0.200 ± 0.000)" in page.text
    assert "Causal start: quality goes from 0.500 in the first chunk to 0.390" in page.text
    assert page.text.count("not sampled") == 1 + 7  # prompt 1 was kept for one model only, prompt 0 for the others
    for row in metrics["rows"]:
        assert f"{row['quality']['mean']:.3f}" in page.text
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert not list(tmp_path.glob("*.part"))
