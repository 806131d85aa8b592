"""The bench of long videos: growth is found and refused, rows of long videos are drawn."""

import sys

import pytest
from bench_files import module_of

from raven._bench_plots import plot_results


@pytest.fixture(scope="module")
def module():
    for name in ("harness", "wan_step"):
        sys.modules[name] = module_of(name)  # as beside it in bench/
    return module_of("bench_long")


def course(module, **changes):
    """A video whose blocks hold made-up figures, flat but for ``changes``."""
    video = module.LongVideo(module.TINY, "reward_forcing", frames=60, blocks=8)
    flat = {"ms": 2.0, "allocated": 100, "reserved": 200, "resident": 1000, "objects": 5000}
    for i in range(8):
        video.blocks.append({"frames": 60 * (i + 1), **{k: v * changes.get(k, 1.0) ** i for k, v in flat.items()}})
    video.blocks[0]["ms"] = 50.0  # a first block may be slow
    return video


def test_flat_courses_pass(module):
    video = course(module)
    video.assert_flat()
    assert video.growth() == dict.fromkeys(module.GROWTH, 1.0)


@pytest.mark.parametrize("name", ["ms", "allocated", "reserved", "resident", "objects"])
def test_growth_is_refused(module, name):
    video = course(module, **{name: 1.03})
    with pytest.raises(AssertionError, match=f"{name} grew by a factor of 1.1"):
        video.assert_flat()


def test_blocks_say_where_they_were_measured(module):
    video = module.LongVideo(module.TINY, "longlive_inf", frames=24, blocks=2)
    assert video.check() < 1e-3
    ms = video.run()
    assert video.every == 4 and len(video.blocks) == 2
    frames = [block["frames"] for block in video.blocks]
    assert frames == [3 * (2 * video.stream.cache.num_slots + 4), 3 * (2 * video.stream.cache.num_slots + 8)]
    assert ms > 0 and all(block["resident"] > 2**20 and block["objects"] > 1000 for block in video.blocks)
    assert video.flops == 5 * (2 * 12 * (6 * 32**2 + 2 * 32 * 64) + 4 * 12 * 32 * (12 * 4 + 3))


def test_rows_are_drawn(module, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"op": "long", "case": "longlive-10000", "direction": "forward", "backend": "cuda", "ms": 2.0, "rate": 1.0}
    row |= {"unit": "TFLOP/s", "roof": 2.0, "peers": {}, "frames": 10_002, "blocks": course(module).blocks}
    path = tmp_path / "long.json"
    assert tmp_path / "long-growth.png" in plot_results({"rows": [row], "date": "2026-11-22"}, path)
    assert tmp_path / "long-growth.png" not in plot_results({"rows": [row | {"frames": 120}]}, path)
