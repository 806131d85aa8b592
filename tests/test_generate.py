"""``raven generate``: prompts, switches and checkpoints in every form; whatever stops it, what is finished is kept."""

import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import WRAPPINGS

import raven.generate.video as video_module
from raven import cli, generate
from raven.checkpoint import save_checkpoint, write_safetensors
from raven.generate.request import Request, parse_fp8, parse_switches, read_prompts, stream_options
from raven.generate.video import count_frames
from raven.models import CausalWan, WanConfig
from raven.stream import Stream
from raven.worlds import Shapes

RED, BLUE = "a red circle moves left", "a blue square moves up"
WORLD = {"size": 16, "max_shapes": 1}


@pytest.fixture(scope="module")
def world():
    return Shapes(**WORLD)


@pytest.fixture(scope="module")
def model(world):
    torch.manual_seed(0)
    model = CausalWan(WanConfig(
        dim=32, ffn_dim=32, num_heads=1, num_layers=1, in_dim=3, out_dim=3, freq_dim=32,
        text_dim=world.text_dim, text_len=world.text_len, patch_size=(1, 8, 8),
    ))  # fmt: skip
    with torch.no_grad():
        model.head.head.weight.normal_(std=0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    trained = {"world": WORLD, "latent_shape": [3, 16, 16], "chunk_frames": 2, "frames": 6, "sink": 1, "window": 1}
    save_checkpoint(path, model, metadata={"raven": json.dumps(trained)})
    return path


def latents(path):
    return load_file(path)["latents"]


def run(checkpoint, out, prompts=(RED,), **options):
    generate.generate(Request(str(checkpoint), list(prompts), out=str(out), device="cpu", **options))
    return latents(out) if str(out).endswith(".safetensors") else out


def stopped_after(chunks, error):
    """A stream that raises after so many chunks, as an interruption or a fault would."""
    whole = Stream.generate

    def generate_some(self, *args, **kwargs):
        for i, x in enumerate(whole(self, *args, **kwargs)):
            if i == chunks:
                raise error
            yield x

    return generate_some


# What is asked for


def test_prompts_from_a_file(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{RED}\n\n  {BLUE} \n", encoding="utf-8")
    request = Request(str(checkpoint), prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "a.safetensors"))
    assert read_prompts(request) == [RED, BLUE]
    generate.generate(request)
    assert torch.equal(latents(tmp_path / "a.safetensors"), run(checkpoint, tmp_path / "b.safetensors", [RED, BLUE]))


@pytest.mark.parametrize("content, message", [(b"\n \n", "holds none"), (b"\xff\xfe", "not a text file in UTF-8")])
def test_unusable_prompt_files(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(Request("x", prompts=str(tmp_path / "p.txt")))
    with pytest.raises(ValueError, match="together with prompt"):
        read_prompts(Request("x", [RED], prompts=str(tmp_path / "p.txt")))


def test_a_switch_changes_the_chunks_from_its_frame_on(checkpoint, model, world, tmp_path):
    red, switched = (
        run(checkpoint, tmp_path / f"{i}.safetensors", switch=s) for i, s in enumerate((None, [f"4: {BLUE}"]))
    )
    assert torch.equal(red[:, :, :4], switched[:, :, :4])
    assert not torch.equal(red[:, :, 4:], switched[:, :, 4:])
    stream = Stream(model, world.encode([RED]), (3, 16, 16), 2, sink=1, window=1)
    own = stream.generate(6, generator=[torch.Generator().manual_seed(0)], switches=[(4, world.encode([BLUE]))])
    torch.testing.assert_close(switched, torch.cat(list(own), dim=2), rtol=0, atol=1e-6)


def test_switches_are_read_in_order_for_every_video(checkpoint, tmp_path):
    assert parse_switches(["12:b  c ", " 3 : a: x"], 3, 15) == [(3, "a: x"), (12, "b  c")]
    both = run(checkpoint, tmp_path / "a.safetensors", [RED, RED], switch=[f"2:{BLUE}"])
    alone = run(checkpoint, tmp_path / "b.safetensors", [RED], switch=[f"2:{BLUE}"])
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "switches, message",
    [
        (["a dog"], "got 'a dog', expected FRAME: PROMPT, such as '3: a dog runs'"),
        (["6:  "], "expected FRAME: PROMPT"),
        (["-3: a dog"], "expected FRAME: PROMPT"),
        (["0: a dog"], "got frame 0, expected the first latent frame of a later chunk, such as 3"),
        (["7: a dog"], "got frame 7, .* such as 6 or 9"),
        (["12: a dog"], "got frame 12, .* such as 9"),
        (["6: a dog", "6: a cat"], "two prompts for frame 6"),
    ],
)
def test_bad_switches(switches, message):
    with pytest.raises(ValueError, match=f"switch: .*{message}"):
        parse_switches(switches, 3, 12)


def test_options_go_over_the_preset_and_the_preset_over_the_training():
    trained = {"chunk_frames": 2, "sink": 5, "window": 7, "frames": 6}
    assert stream_options(Request("x"), {}) == {"chunk_frames": 3, "sink": 0, "window": None}
    assert stream_options(Request("x", window=1), trained) == {"chunk_frames": 2, "sink": 5, "window": 1}
    named = stream_options(Request("x", preset="longlive", sink=2), trained)
    assert (named["chunk_frames"], named["sink"], named["window"]) == (3, 2, 2)


@pytest.mark.parametrize("preset", ["self_forcing_frames", "longlive", "longlive_inf", "reward_forcing", "causvid"])
def test_presets_run(checkpoint, tmp_path, preset):
    assert run(checkpoint, tmp_path / "a.safetensors", preset=preset, frames=9).shape == (1, 3, 9, 16, 16)


@pytest.mark.parametrize(
    "parts, expected", [(None, set()), ("cache", {"cache"}), ("linears, cache", {"cache", "linears"})]
)
def test_float8_parts(parts, expected):
    assert parse_fp8(parts) == expected


def test_float8_runs_and_is_close(checkpoint, tmp_path):
    exact = run(checkpoint, tmp_path / "a.safetensors")
    cached, both = (run(checkpoint, tmp_path / f"{p}.safetensors", fp8=p) for p in ("cache", "cache,linears"))
    for other in (cached, both):
        assert not torch.equal(exact, other)
        assert (exact - other).square().mean() < 0.02 * exact.square().mean()


def test_eager_and_seed(checkpoint, tmp_path):
    first = run(checkpoint, tmp_path / "a.safetensors", seed=3)
    assert torch.equal(first, run(checkpoint, tmp_path / "b.safetensors", seed=3, eager=True))
    assert not torch.equal(first, run(checkpoint, tmp_path / "c.safetensors", seed=4))


def test_bad_input_is_one_line(checkpoint, tmp_path, capsys):
    def failure(*argv):
        argv = [str(a) for a in ("generate", "--checkpoint", checkpoint, "-o", tmp_path / "o.mp4", *argv)]
        assert cli.main(argv) == cli.BAD_INPUT
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    one = ("--prompt", RED)
    assert "preset: got 'longlife', expected one of raven, " in failure(*one, "--preset", "longlife")
    assert "fp8: got 'weights', expected cache, linears" in failure(*one, "--fp8", "weights")
    assert "frames: got 7, expected a multiple of chunk_frames = 2, such as 6 or 8" in failure(*one, "--frames", 7)
    assert "switch: got frame 3" in failure(*one, "--switch", f"3: {BLUE}")
    assert "unknown word 'cat'" in failure(*one, "--switch", "2: a cat moves left")
    assert "size: got 16x20, expected multiples of 8 and 8" in failure(*one, "--size", "16x20")
    assert "together with latent_size" in failure(*one, "--size", "16x16", "--latent-size", "16x16")
    assert "No such file" in failure("--prompts", tmp_path / "none.txt")
    assert "diffusers' layout" in failure(*one, "--wan", tmp_path)
    assert not list(tmp_path.iterdir())


def test_embeddings_that_are_too_long_are_named(checkpoint, world, tmp_path):
    save_file({"context": torch.zeros(world.text_len + 1, world.text_dim)}, tmp_path / "text.safetensors")
    request = Request(str(checkpoint), context=str(tmp_path / "text.safetensors"), out=str(tmp_path / "a.safetensors"))
    with pytest.raises(
        ValueError, match=f"got {world.text_len + 1} rows, expected at most text_len = {world.text_len}"
    ):
        generate.generate(request)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_prompts_that_are_not_finite_are_named(value, checkpoint, world, tmp_path, monkeypatch):
    rows = torch.stack(list(world.encode([RED, BLUE])))
    rows[1, 0, 3] = value
    path, out = tmp_path / "text.safetensors", tmp_path / "a.safetensors"
    save_file({"context": rows}, path)
    found = f"got 1 of {rows[0].numel()} values NaN or infinite, expected finite numbers"
    request = Request(str(checkpoint), context=str(path), out=str(out), device="cpu")
    with pytest.raises(ValueError, match=f"context: prompt 1 of 'context': {found}"):
        generate.generate(request)
    save_file({"x": rows[0], "y": rows[1]}, path)
    with pytest.raises(ValueError, match=f"context: prompt 'y': {found}"):
        generate.generate(request)
    save_file({"x": torch.ones(2, 3, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match="context: got int64 for 'x', expected floating-point"):
        generate.generate(request)

    monkeypatch.setattr(Shapes, "encode", lambda self, prompts, device="cpu": rows[: len(prompts)])
    with pytest.raises(ValueError, match=f"prompt: the encoding of '{BLUE}': {found}"):
        run(checkpoint, out, [RED], switch=[f"2: {BLUE}"])
    assert not out.exists()


def test_embeddings_cannot_switch(checkpoint, world, tmp_path):
    save_file({"context": world.encode([RED])}, tmp_path / "text.safetensors")
    request = Request(str(checkpoint), context=str(tmp_path / "text.safetensors"), switch=[f"2: {BLUE}"])
    request.out = str(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="context: got it together with switch"):
        generate.generate(request)


@pytest.mark.gpu
def test_graphs_give_the_same_bits_as_eager_on_a_gpu(checkpoint, tmp_path, capsys):
    def on_gpu(name, **options):
        path = tmp_path / f"{name}.safetensors"
        options = {"frames": 12, "device": "cuda", "dtype": "bfloat16", **options}
        generate.generate(Request(str(checkpoint), [RED, BLUE], out=str(path), **options))
        return latents(path)

    graphs, said = on_gpu("graphs"), capsys.readouterr().err
    assert "of GPU memory" in said and "warming up, chunk" in said and " GiB" in said.splitlines()[-1]
    assert torch.equal(graphs, on_gpu("eager", eager=True))
    switch = [f"4: {BLUE}"]
    assert torch.equal(on_gpu("a", switch=switch), on_gpu("b", switch=switch, eager=True))
    assert not torch.equal(graphs, on_gpu("c", switch=switch))
    assert torch.isfinite(on_gpu("fp8", fp8="cache,linears")).all()


@pytest.mark.gpu
def test_a_gpu_that_is_too_small_is_refused_before_it_is_used(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "free_memory", lambda device: 10_000)
    argv = ["generate", "--checkpoint", checkpoint, "--prompt", RED, "-o", tmp_path / "a.safetensors"]
    argv = [str(a) for a in (*argv, "--device", "cuda", "--eager")]
    before = torch.cuda.memory_allocated()
    assert cli.main(argv) == cli.BAD_INPUT
    assert "0.00 GiB are free" in capsys.readouterr().err and torch.cuda.memory_allocated() == before
    assert cli.main([*argv, "--ignore-memory"]) == 0
    assert latents(tmp_path / "a.safetensors").shape[2] == 6


# Checkpoints


def test_a_checkpoint_of_another_size_is_named(checkpoint, model, tmp_path, capsys):
    WanConfig(**{**model.config.to_dict(), "dim": 64, "patch_size": (1, 8, 8)}).to_json(tmp_path / "other.json")
    argv = ["--checkpoint", str(checkpoint), "--config", str(tmp_path / "other.json"), "--prompt", RED]
    assert cli.main(["generate", *argv, "-o", str(tmp_path / "a.mp4")]) == cli.BAD_INPUT
    assert "patch_embedding.weight: got shape (32, 3, 1, 8, 8), expected (64, 3, 1, 8, 8)" in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    return run(checkpoint, tmp_path_factory.mktemp("expected") / "a.safetensors")


def from_embeddings(path, model, world, folder):
    """What a checkpoint without a world generates from the same text and sizes."""
    model.config.to_json(folder / "other.json")
    save_file({"context": world.encode([RED])}, folder / "text.safetensors")
    options = {
        "config": str(folder / "other.json"),
        "context": str(folder / "text.safetensors"),
        "latent_size": "16x16",
    }
    return run(path, folder / "a.safetensors", (), chunk_frames=2, frames=6, sink=1, window=1, **options)


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_wrapped_checkpoints_give_the_same_video(expected, model, world, tmp_path, wrap):
    torch.save(wrap(model.state_dict()), tmp_path / "model.pt")
    assert torch.equal(from_embeddings(tmp_path / "model.pt", model, world, tmp_path), expected)


def test_a_folder_with_one_checkpoint(expected, checkpoint, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "student.safetensors").write_bytes(checkpoint.read_bytes())
    assert torch.equal(run(tmp_path / "model", tmp_path / "a.safetensors"), expected)


# What is left when it ends


def test_interrupted_videos_play_up_to_there(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(Stream, "generate", stopped_after(2, KeyboardInterrupt()))
    out = tmp_path / "v.mp4"
    argv = ["generate", "--checkpoint", checkpoint, "--prompt", RED, "--prompt", BLUE, "-o", out]
    assert cli.main([str(a) for a in argv]) == cli.INTERRUPTED
    said = capsys.readouterr().err
    for i in (1, 2):
        assert count_frames(tmp_path / f"v-{i}.mp4") == len(pictures(tmp_path / f"v-{i}.mp4")) == 4
        assert f"v-{i}.mp4 holds 4 of 6 frames" in said


def pictures(path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_ctrl_c_in_a_terminal(checkpoint, tmp_path):
    """The real signal, to the whole process group as a terminal sends it, while chunks are coming."""
    pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "v.mp4"
    argv = ["--checkpoint", checkpoint, "--prompt", RED, "--frames", "40000", "-o", out]
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
         "from raven import cli; raise SystemExit(cli.main())", "generate", *map(str, argv)],
        stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = b""
    while b"chunk 3/" not in said and child.poll() is None:
        said += os.read(child.stderr.fileno(), 4096)
    os.killpg(child.pid, signal.SIGINT)
    said += child.communicate(timeout=60)[1]
    assert child.returncode == cli.INTERRUPTED, said.decode()
    kept = count_frames(out)
    assert kept >= 6 and f"v.mp4 holds {kept} of 40000 frames" in said.decode()
    assert len(pictures(out)) == kept


def test_interrupted_latents_are_cut_to_what_is_finished(checkpoint, tmp_path, monkeypatch):
    whole = run(checkpoint, tmp_path / "whole.safetensors", [RED, BLUE])
    monkeypatch.setattr(Stream, "generate", stopped_after(2, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="a.safetensors holds 4 of 6 frames"):
        run(checkpoint, tmp_path / "a.safetensors", [RED, BLUE])
    assert torch.equal(latents(tmp_path / "a.safetensors"), whole[:, :, :4])


def test_interrupted_before_the_first_chunk_leaves_no_file(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(Stream, "generate", stopped_after(0, KeyboardInterrupt()))
    for name in ("a.safetensors", "a.mp4"):
        with pytest.raises(KeyboardInterrupt, match="no chunk was finished"):
            run(checkpoint, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_fills_up_keeps_what_is_finished(checkpoint, tmp_path, monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(Stream, "generate", stopped_after(1, error))
    argv = ["generate", "--checkpoint", checkpoint, "--prompt", RED, "-o", tmp_path / "a.safetensors"]
    assert cli.main([str(a) for a in argv]) == cli.BAD_INPUT
    assert "memory ran out (CUDA out of memory); " in (said := capsys.readouterr().err)
    assert "a.safetensors holds 2 of 6 frames" in said
    assert latents(tmp_path / "a.safetensors").shape[2] == 2


def test_generate_says_what_a_full_disk_left(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("imageio_ffmpeg")
    argv = ["generate", "--checkpoint", checkpoint, "--prompt", RED, "--frames", 400, "-o", tmp_path / "a.mp4"]
    with monkeypatch.context() as limited:
        limited.setattr(video_module.subprocess, "Popen", limited_to(60_000))
        assert cli.main([str(a) for a in argv]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    kept = count_frames(tmp_path / "a.mp4")
    assert 2 <= kept < 400 and f"a.mp4 holds {kept} of 400 frames" in said and "File too large" in said
    assert len(pictures(tmp_path / "a.mp4")) == kept


def limited_to(size):
    def start(*args, **kwargs):
        return popen(*args, **kwargs, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    popen = subprocess.Popen
    return start


@pytest.mark.parametrize("folder", [False, True])
def test_the_checkpoint_is_not_overwritten(checkpoint, tmp_path, folder):
    """Its weights are mapped from the file: cutting that would end the process as well."""
    own = tmp_path / "student.safetensors"
    own.write_bytes(checkpoint.read_bytes())
    with pytest.raises(ValueError, match="out: got .* read as well"):
        run(tmp_path if folder else own, own)
    assert own.read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"seed": 2**64}, ValueError, "seed: got"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"steps": 1000}, ValueError, "levels: got 1000 of them"),
        ({"preset": "reward_forcing", "fp8": "cache", "frames": 6}, TypeError, "ema: got a cache"),
        ({"latent_size": "²x8"}, ValueError, "latent_size: got '²x8'"),
        ({"latent_size": "2000000x2000000"}, OSError, "no space left on the disk"),
    ],
    ids=str,
)
def test_an_earlier_result_outlives_a_bad_request(checkpoint, tmp_path, monkeypatch, options, error, message):
    out = tmp_path / "a.safetensors"
    run(checkpoint, out, frames=2)
    before = out.read_bytes()
    monkeypatch.setattr(Stream, "cache", property(lambda self: None) if error is OSError else Stream.cache)
    with pytest.raises(error, match=message):
        run(checkpoint, out, **{"frames": 2, **options})
    assert out.read_bytes() == before


def test_more_sink_and_window_than_the_video_has(checkpoint, tmp_path):
    far = run(checkpoint, tmp_path / "a.safetensors", frames=6, sink=10**12, window=10**12)
    near = run(checkpoint, tmp_path / "b.safetensors", frames=6, sink=0, window=3)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-5)


@pytest.mark.parametrize("metadata", ["[1]", '{"frames": "x"}'])
def test_strange_metadata_is_named(model, tmp_path, metadata):
    path = tmp_path / "strange.safetensors"
    write_safetensors(path, model.state_dict(), metadata={"raven": metadata})
    with pytest.raises(ValueError, match="checkpoint: .* expected what the demo writes"):
        generate.generate(Request(str(path), out=str(tmp_path / "a.mp4")))
