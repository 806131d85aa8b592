"""The command line: help, exit codes, one clear line per error, and ``raven generate``."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raven import cli, generate
from raven.checkpoint import save_checkpoint
from raven.models import CausalWan, WanConfig
from raven.train.prompts import PromptFile
from raven.worlds import Shapes

WORLD = {"size": 16, "max_shapes": 1}
PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def world():
    return Shapes(**WORLD)


def tiny_model(world):
    config = WanConfig(
        dim=32, ffn_dim=32, num_heads=1, num_layers=1, in_dim=3, out_dim=3, freq_dim=32,
        text_dim=world.text_dim, text_len=world.text_len, patch_size=(1, 8, 8),
    )  # fmt: skip
    torch.manual_seed(0)
    return CausalWan(config)


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    trained = {"world": WORLD, "latent_shape": [3, 16, 16], "chunk_frames": 2, "frames": 4, "sink": 0, "window": 1}
    save_checkpoint(path, tiny_model(world), metadata={"raven": json.dumps(trained)})
    return path


@pytest.fixture(scope="module")
def bare_checkpoint(world, tmp_path_factory):
    """Weights and config only, as for a model whose latents and text come from elsewhere."""
    path = tmp_path_factory.mktemp("weights") / "bare.safetensors"
    save_checkpoint(path, tiny_model(world))
    return path


def failure(capsys, *argv):
    """Run a command that must fail on its input; returns the one line it prints."""
    assert cli.main([str(a) for a in argv]) == cli.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def decoded(path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("demo", "distill", "grpo", "generate", "bench", "env"):
        assert f"\n    {name} " in text


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    assert "usage: raven" in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from raven import cli; cli.build_parser().format_help();"
        "print([m for m in ('torch', 'numpy', 'raven.models', 'raven.ops') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_version(capsys):
    import raven

    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"raven {raven.__version__}"


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--sizes", "tiny"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --sizes tiny" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["distill", "grpo", "env", "bench"])
def test_commands_of_other_modules_answer_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: raven {name}" in capsys.readouterr().out


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["--traceback", "generate", "--checkpoint", str(tmp_path / "none.pt"), "--prompt", PROMPT])
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "--traceback", "--checkpoint", str(tmp_path / "none.pt"), "--prompt", PROMPT])


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(request):
        import no_such_module_of_ours  # noqa: F401

    monkeypatch.setattr(generate, "generate", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["generate", "--checkpoint", "x", "--prompt", PROMPT])


def test_missing_optional_package_is_one_line(monkeypatch, capsys, checkpoint, tmp_path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    line = failure(capsys, "generate", "--checkpoint", checkpoint, "--prompt", PROMPT, "-o", tmp_path / "a.mp4")
    assert "pip install raven-kernels[demo]" in line


def test_checkpoints_without_safetensors_are_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for name in [name for name in sys.modules if name.startswith(("raven.checkpoint", "raven.generate"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("raven.generate")
    line = failure(capsys, "generate", "--checkpoint", "x.safetensors", "--prompt", PROMPT)
    assert "checkpoints need safetensors: pip install raven-kernels[train]" in line


def test_diverged_training_is_one_line(monkeypatch, capsys):
    def diverged(request):
        raise FloatingPointError("loss is nan at step 3; lower the learning rate")

    monkeypatch.setattr(generate, "generate", diverged)
    assert "loss is nan at step 3" in failure(capsys, "generate", "--checkpoint", "x", "--prompt", PROMPT)


def test_interruption_has_its_own_exit_code(monkeypatch, capsys):
    def stopped(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", stopped)
    assert cli.main(["generate", "--checkpoint", "x"]) == cli.INTERRUPTED
    assert "Interrupted" in capsys.readouterr().err


def test_generate_writes_an_mp4_of_the_requested_length(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "out.mp4"
    argv = ["generate", "--checkpoint", str(checkpoint), "--prompt", PROMPT, "--frames", "6", "-o", str(out)]
    assert cli.main(argv) == 0
    assert len(decoded(out)) == 6
    assert "chunk 3/3, frame 6/6" in capsys.readouterr().err


def test_generate_several_prompts_same_as_alone(checkpoint, tmp_path):
    both = generate.Request(str(checkpoint), [PROMPT, "a blue square moves up"], out=str(tmp_path / "both.safetensors"))
    generate.generate(both)
    alone = generate.Request(str(checkpoint), [PROMPT], out=str(tmp_path / "alone.safetensors"))
    generate.generate(alone)
    latents = load_file(both.out)["latents"]
    assert latents.shape == (2, 3, 4, 16, 16)
    torch.testing.assert_close(latents[:1], load_file(alone.out)["latents"], rtol=0, atol=1e-5)
    assert not torch.equal(latents[0], latents[1])


def test_generate_several_videos_get_numbers(checkpoint, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    request = generate.Request(str(checkpoint), [PROMPT, PROMPT], out=str(tmp_path / "v.mp4"))
    assert [p.name for p in generate.generate(request)] == ["v-1.mp4", "v-2.mp4"]
    assert all((tmp_path / f"v-{i}.mp4").stat().st_size > 500 for i in (1, 2))


def test_generate_from_embeddings_writes_latents(bare_checkpoint, world, tmp_path):
    save_file({"context": torch.randn(2, world.text_len, world.text_dim)}, tmp_path / "text.safetensors")
    argv = ["generate", "--checkpoint", bare_checkpoint, "--context", tmp_path / "text.safetensors"]
    argv += ["--latent-size", "16x24", "--frames", "3", "--chunk-frames", "1", "--window", "1", "--sink", "1"]
    assert cli.main([str(a) for a in [*argv, "-o", tmp_path / "latents.safetensors"]]) == 0
    assert load_file(tmp_path / "latents.safetensors")["latents"].shape == (2, 3, 3, 16, 24)


def test_generate_reads_the_prompts_of_a_training_file(tmp_path):
    """In their order, and without what guidance contrasts with."""
    rows = [torch.full((1 + i % 3, 8), float(i)) for i in range(11)]
    PromptFile.save(tmp_path / "p.safetensors", [f"prompt {i}" for i in range(11)], rows, negative=torch.ones(2, 8))
    read = generate.read_context(tmp_path / "p.safetensors")
    assert len(read) == 11 and all(torch.equal(a, b) for a, b in zip(read, rows, strict=True))


def test_generate_reads_contexts_without_names(tmp_path):
    torch.save({2: torch.ones(1, 8), 10: torch.zeros(1, 8)}, tmp_path / "c.pt")
    assert [int(row[0, 0]) for row in generate.read_context(tmp_path / "c.pt")] == [1, 0]


def test_generate_reads_contexts_of_several_shapes(tmp_path):
    save_file({"a": torch.zeros(5, 8), "b": torch.zeros(2, 3, 8)}, tmp_path / "c.safetensors")
    assert [tuple(t.shape) for t in generate.read_context(tmp_path / "c.safetensors")] == [(5, 8), (3, 8), (3, 8)]
    save_file({"a": torch.zeros(5)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=r"got \(5,\) for 'a'"):
        generate.read_context(tmp_path / "d.safetensors")


def test_bad_input_of_generate_is_one_line(checkpoint, bare_checkpoint, tmp_path, capsys):
    mp4 = tmp_path / "out.mp4"
    good = ["generate", "--checkpoint", checkpoint, "-o", mp4]
    assert "unknown word 'orange'" in failure(
        capsys, *good, "--prompt", "an orange circle moves left".replace("an ", "a ")
    )
    assert "prompt: got none" in failure(capsys, *good)
    assert "frames: got 5" in failure(capsys, *good, "--prompt", PROMPT, "--frames", 5)
    assert "frames: got 0" in failure(capsys, *good, "--prompt", PROMPT, "--frames", 0)
    assert "fps: got 0" in failure(capsys, *good, "--prompt", PROMPT, "--fps", 0)
    assert "device: got 'warp'" in failure(capsys, *good, "--prompt", PROMPT, "--device", "warp")
    assert "dtype: got 'int8'" in failure(capsys, *good, "--prompt", PROMPT, "--dtype", "int8")
    assert "out: got 'out.gif'" in failure(capsys, *good, "--prompt", PROMPT, "-o", tmp_path / "out.gif")
    assert "latent_size" in failure(capsys, *good, "--prompt", PROMPT, "--latent-size", "16")
    assert "multiples of the patches of 8x8" in failure(capsys, *good, "--prompt", PROMPT, "--latent-size", "16x17")
    bare = ["generate", "--checkpoint", bare_checkpoint]
    assert "no decoder" in failure(capsys, *bare, "--prompt", PROMPT, "-o", mp4)
    assert "--context" in failure(capsys, *bare, "--prompt", PROMPT, "-o", tmp_path / "l.safetensors")
    assert not list(tmp_path.iterdir())  # a refused call leaves no file behind


def test_unreadable_checkpoints_are_one_line(checkpoint, world, tmp_path, capsys):
    broken, cut, text = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.pt"
    broken.write_bytes(b"\xff" * 64)
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    text.write_text("not a checkpoint")
    save_file({"context": torch.zeros(1, world.text_len, world.text_dim)}, tmp_path / "text.safetensors")
    for path in (broken, cut, text):
        argv = ["--context", tmp_path / "text.safetensors", "-o", tmp_path / "out.safetensors"]
        assert path.name in failure(capsys, "generate", "--checkpoint", path, *argv)
    assert "expected a checkpoint file" in failure(
        capsys, "generate", "--checkpoint", tmp_path / "none.safetensors", "--prompt", PROMPT
    )


def test_output_that_cannot_be_written_is_found_before_sampling(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_model", lambda *a, **k: pytest.fail("loaded the model before the check"))
    (tmp_path / "file").write_text("")
    line = failure(
        capsys, "generate", "--checkpoint", checkpoint, "--prompt", PROMPT, "-o", tmp_path / "file" / "o.mp4"
    )
    assert "file" in line


def test_latents_that_do_not_fit_on_the_disk_are_one_line(bare_checkpoint, world, tmp_path, capsys):
    save_file({"context": torch.zeros(1, world.text_len, world.text_dim)}, tmp_path / "text.safetensors")
    out = tmp_path / "out" / "latents.safetensors"
    argv = ["--context", tmp_path / "text.safetensors", "-o", out, "--latent-size", "64x64", "--frames", 3]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = cli.main(["generate", "--checkpoint", str(bare_checkpoint), *map(str, argv)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == cli.BAD_INPUT
    assert f"could not write {out}" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
