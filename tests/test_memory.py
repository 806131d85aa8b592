"""What a stream takes on the GPU is what its formula says, part by part on a CPU and as a whole on a GPU."""

import gc

import pytest
import torch
from tiny_wan import CONFIG, tiny_model

from raven.memory import GIB, cache_slots, parameters, require, stream_memory, training_memory
from raven.models import CausalWan, WanConfig
from raven.models.fp8 import quantize_linears
from raven.repack import repacked_forward
from raven.stream import Stream


def test_parameters_are_counted():
    for config in (CONFIG, WanConfig.wan_1_3b(), WanConfig(num_layers=2, qk_norm=False, cross_attn_norm=False)):
        with torch.device("meta"):
            assert parameters(config) == sum(p.numel() for p in CausalWan(config).parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 1},
        {"sink": 1, "window": 2},
        {"cache_dtype": torch.float8_e4m3fn},
        {"keys": "raw", "sink": 1, "window": 1, "ema": 0.9},
        {"window": 1, "recache": 4},
    ],
    ids=str,
)
def test_the_cache_takes_what_the_estimate_says(changes):
    stream = Stream(tiny_model(), torch.randn(2, 5, CONFIG.text_dim), (4, 4, 4), 2, max_frames=6, **changes)
    for _ in stream.generate(6):
        pass
    options = {name: value for name, value in changes.items() if name != "cache_dtype"}
    parts = stream_memory(
        CONFIG, latent_size=(4, 4), batch=2, chunk_frames=2, frames=6, dtype=torch.float32,
        fp8_cache="cache_dtype" in changes, **options,
    ).parts  # fmt: skip
    assert parts["cache"] + parts["cache as it is read"] == stream.cache.nbytes
    assert stream.cache.num_slots == cache_slots(
        6, 2, changes.get("sink", 0), changes.get("window"), "keys" not in changes, changes.get("recache", 0)
    )
    assert parts["text"] == sum(x.nbytes for x in (*stream.text.k, *stream.text.v))


def test_too_little_memory_is_refused_with_what_would_help(capsys):
    def needed(**changes):
        return stream_memory(WanConfig.wan_1_3b(), latent_size=(60, 104), **{"frames": 21, "batch": 2, **changes})

    gib = 2**30
    require(needed, 80 * gib, batch=2)
    assert "of GPU memory; 80.00 GiB are free" in capsys.readouterr().err
    with pytest.raises(MemoryError, match=r"would fit with --window 2 \(.*one prompt at a time \(.*--ignore-memory"):
        require(needed, 11 * gib, batch=2)
    with pytest.raises(MemoryError, match="a smaller --size"):
        require(needed, gib, batch=2)
    require(needed, gib, ignore=True, batch=2)
    assert "going on all the same" in capsys.readouterr().err


def wide_model(config):
    """Random weights at the width of Wan 1.3B, without making them in float32 first."""
    with torch.device("meta"):
        model = CausalWan(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.02)
    return model


def test_the_memory_of_a_step_has_two_modes():
    full, selective = (
        training_memory(WanConfig.wan_1_3b(), latent_size=(60, 104), checkpointing=mode).total
        for mode in ("full", "selective")
    )
    # A token of a layer: its attention's output in bfloat16, and a float32 number a head.
    assert selective - full == 30 * 60_840 * (2 * 1536 + 4 * 12)
    with pytest.raises(ValueError, match="checkpointing: got 'none'"):
        training_memory(WanConfig.wan_1_3b(), latent_size=(60, 104), checkpointing="none")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_the_peak_of_a_repacked_step_is_the_estimate(checkpointing):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    config = WanConfig(num_layers=4)
    model = wide_model(config).requires_grad_(True)
    model.gradient_checkpointing = checkpointing
    x_t, x_0 = torch.randn(2, 1, 16, 12, 60, 104, device="cuda")
    text = torch.randn(1, 20, config.text_dim, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the second finds gradients to add to
        torch.cuda.reset_peak_memory_stats()
        repacked_forward(model, x_t, x_0, 0.5, text, (3,) * 4).float().square().mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    estimate = training_memory(config, latent_size=(60, 104), chunk_frames=(3,) * 4, checkpointing=checkpointing)
    assert abs(estimate.total - peak) < 0.1 * peak, f"{peak / GIB:.2f} GiB, estimated {estimate}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"frames": 21},
        {"sink": 1, "window": 2, "graphs": False},
        {"sink": 1, "window": 2, "batch": 2},
        {"frames": 21, "fp8_cache": True, "fp8_linears": True},
        {"sink": 1, "window": 2, "keys": "raw"},
        {"window": 2, "latent_size": (90, 160)},
    ],
    ids=str,
)
def test_the_peak_is_the_estimate(options):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    size, batch = options.get("latent_size", (60, 104)), options.get("batch", 1)
    estimate = stream_memory(WanConfig.wan_1_3b(), **{"latent_size": size, **options})
    model = wide_model(WanConfig.wan_1_3b())
    if options.get("fp8_linears"):
        model = quantize_linears(model)
    own = {name: options[name] for name in ("sink", "window", "keys", "graphs") if name in options}
    if options.get("fp8_cache"):
        own["cache_dtype"] = torch.float8_e4m3fn
    text = torch.randn(batch, 20, 4096, device="cuda", dtype=torch.bfloat16)
    stream = Stream(model, text, (16, *size), max_frames=options.get("frames"), **own)
    torch.cuda.reset_peak_memory_stats()
    stream.warm_up(options.get("frames"))
    for _ in stream.generate(options.get("frames", 12)):
        pass
    peak = torch.cuda.max_memory_allocated() - before
    held = torch.cuda.max_memory_reserved() / GIB
    measured = f"{peak / GIB:.2f} GiB ({held:.2f} with what is cached), estimated {estimate}"
    print(measured)
    assert abs(estimate.total - peak) < 0.1 * peak, measured
