"""The bench from a prompt to pixels: its rows are refused when decoding beside differs, and left out with a reason."""

import sys

import pytest
import torch
from bench_files import BENCH, module_of

from raven import cli


@pytest.fixture(scope="module")
def module():
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    for name in ("harness", "wan_step", "bench_stream"):
        sys.modules[name] = module_of(name)  # as beside it in bench/
    return module_of("bench_generate")


@pytest.fixture
def case(module):
    return module.Case(module.SMALL)


def test_the_check_passes_and_says_how_far_the_decoder_is(case):
    errors = case.check()
    assert errors["beside against after"] == 0 and 0 < errors["decoder"] < 0.1


def test_pixels_that_differ_are_refused(case, monkeypatch):
    after = case.after

    def other():
        pixels = after()
        pixels[0, 1, 2, 3, 0] ^= 1
        return pixels

    monkeypatch.setattr(case, "after", other)
    with pytest.raises(AssertionError, match="pixels decoded beside"):
        case.check()


def test_a_decoder_that_is_off_is_refused(case):
    decode = case.vae.decode
    case.vae.decode = lambda latents: decode(latents) + 0.05
    with pytest.raises(AssertionError, match="decoder: .* from float32, diffusers' own"):
        case.decoder_errors(case.latents())


def test_operations_are_those_of_a_whole_video(module):
    """Counted on the way of one decode of everything, for a video without and with two more chunks."""
    from torch.utils.flop_counter import FlopCounterMode

    own = module.WanVAE(module.random_vae(module.SMALL.vae, torch.bfloat16, "meta"))
    with FlopCounterMode(display=False) as counter:
        own.decode(torch.empty(1, *module.SMALL.size.shape, device="meta"))
    assert module.decoder_flops(module.SMALL) == counter.get_total_flops() > 0


def test_without_diffusers_the_reason_is_said(tmp_path, monkeypatch, capfd):
    (tmp_path / "diffusers.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    argv = ["bench", "generate", "--folder", str(BENCH), "--output", str(tmp_path / "rows.json"), "-k", "beside"]
    assert cli.main(argv) == 1
    assert (
        "left out: generate: measuring generate needs diffusers: pip install raven-kernels[wan]"
        in capfd.readouterr().err
    )
