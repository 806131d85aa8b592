"""The demo at a toy size: every stage, interruption and resumption, bad input, and the sizes themselves."""

import json
import os
import shutil
import signal
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raven import cli
from raven.checkpoint import load_model
from raven.demo import numbers, results, sizes, stages
from raven.demo.evaluate import noise_generators
from raven.models import CausalWan
from raven.stream import Stream
from raven.train.distill import RavenTrainer

for package in ("PIL", "imageio_ffmpeg", "matplotlib", "tqdm"):
    pytest.importorskip(package)


def open_demo(folder, **options):
    return stages.Demo.open("test", folder, device="cpu", progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that ran from the first stage to the last without a break."""
    demo = open_demo(tmp_path_factory.mktemp("demo") / "whole")
    demo.run()
    return demo


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished folder, to break."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    return tmp_path / "copy"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_every_stage_leaves_its_result(finished):
    folder = finished.folder
    for name in stages.MODELS:
        assert load_model(folder / f"{name}.safetensors").config.dim == 32
    assert not list(folder.rglob("checkpoint.pt"))  # what is only needed to resume is gone
    metrics = metrics_of(folder)
    found = {(row["model"], row["length"]): row for row in metrics["rows"]}
    assert set(found) == {(m, n) for m in numbers.LABELS for n in (6, 18)}
    assert found["raven", 18]["videos"] == 2 * 3 and found["teacher", 18]["videos"] == 1 * 3
    assert len(found["grpo", 18]["seeds"]) == 3 and len(found["grpo", 18]["chunks"]["quality"]["mean"]) == 6
    assert len(metrics["comparisons"]) == 6
    titles = [curve["title"] for curve in metrics["training"]]
    assert "RAVEN: distribution-matching loss" in titles and "CM-GRPO: reward of the rollouts" in titles
    assert [s["title"] for s in metrics["stages"]] == [stages.TITLES[n] for n in stages.TITLES if n != "report"]
    html = (folder / "report.html").read_text()
    for comparison in metrics["comparisons"]:
        assert comparison["sentence"].split(";")[0].replace("'", "&#x27;") in html
    assert html.count("data:image/webp") == 8 and html.count("data:video/mp4") == 2 and html.count("image/png") == 3
    assert {p.name for p in (folder / "videos").iterdir()} >= {"raven-6-1.mp4", "grpo-18-1.mp4", "all-6.mp4"}


def test_models_differ_from_stage_to_stage(finished):
    states = [load_file(finished.model_path(name)) for name in ("start", "raven", "grpo")]
    key = "blocks.0.self_attn.q.weight"
    assert not torch.equal(states[0][key], states[1][key]) and not torch.equal(states[1][key], states[2][key])


def test_short_videos_are_the_beginnings_of_the_long_ones(finished):
    videos = np.load(finished.folder / "eval" / "raven-18.npz")
    assert videos["6/0"].shape == (6, 16, 16, 3)
    assert (videos["18/0"][:6] == videos["6/0"]).all()
    # and equal to what is streamed at the trained length alone
    model, world = finished.load("raven"), finished.world
    prompts = world.prompts(2, seed=results.PROMPT_SEED + finished.seed)
    stream = Stream(model, world.encode(prompts), (3, 16, 16), 3, window=1)
    chunks = list(stream.generate(6, generator=noise_generators([0, 1], seed=1)))
    alone = world.to_uint8(torch.cat(chunks, dim=2))[0].numpy()
    assert np.abs(alone.astype(int) - videos["6/0"]).max() <= 1


def test_a_finished_demo_is_not_run_again(finished, capsys):
    again = stages.Demo.open("test", finished.folder, device="cpu")
    before = {p: p.stat().st_mtime_ns for p in finished.folder.glob("*.safetensors")}
    again.run()
    text = capsys.readouterr().err
    assert text.count("done before, skipped") == 5 and "[6/6] Report" in text and "report.html" in text
    assert {p: p.stat().st_mtime_ns for p in finished.folder.glob("*.safetensors")} == before


def test_interrupted_and_resumed_is_the_same_as_whole(finished, tmp_path, monkeypatch):
    folder = tmp_path / "broken"
    real_step, real_score = RavenTrainer.step, results.evaluate

    def ctrl_c_in_training(trainer):
        if trainer.steps_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(trainer)

    def ctrl_c_in_evaluation(name, *rest):
        if name == "raven":
            raise KeyboardInterrupt
        return real_score(name, *rest)

    monkeypatch.setattr(RavenTrainer, "step", ctrl_c_in_training)
    with pytest.raises(KeyboardInterrupt, match=r"stage 3 of 6 \(RAVEN distillation\).*run the same command again"):
        open_demo(folder).run()
    assert (folder / "raven" / "checkpoint.pt").exists() and not (folder / "raven.safetensors").exists()
    monkeypatch.setattr(RavenTrainer, "step", real_step)
    monkeypatch.setattr(results, "evaluate", ctrl_c_in_evaluation)
    with pytest.raises(KeyboardInterrupt, match="stage 5 of 6"):
        open_demo(folder).run()
    monkeypatch.setattr(results, "evaluate", real_score)
    open_demo(folder).run()

    for name in stages.MODELS:
        whole, resumed = load_file(finished.model_path(name)), load_file(folder / f"{name}.safetensors")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name
    ours, theirs = metrics_of(folder), metrics_of(finished.folder)
    for key in ("records", "rows", "comparisons", "training"):
        assert ours[key] == theirs[key], key


def test_interruption_on_the_command_line(tmp_path, monkeypatch, capsys):
    def stopped(demo, stages=None):
        raise KeyboardInterrupt("Interrupted in stage 3 of 6; run the same command again to go on from here.")

    monkeypatch.setattr(stages.Demo, "run", stopped)
    assert cli.main(["demo", "--size", "test", "--out", str(tmp_path / "d")]) == cli.INTERRUPTED
    assert "run the same command again" in capsys.readouterr().err


def failure(capsys, *argv):
    assert cli.main(["demo", *(str(a) for a in argv)]) == cli.BAD_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_bad_options_are_one_line(tmp_path, capsys):
    out = ("--out", tmp_path / "d")
    assert "size: got 'huge', expected one of tiny, small" in failure(capsys, "--size", "huge", *out)
    test = ("--size", "test", *out)
    assert "device: got 'tpu'" in failure(capsys, *test, "--device", "tpu")
    assert "stages: got 'ravne'" in failure(capsys, *test, "--stages", "ravne")
    assert "'grpo' needs raven, not done" in failure(capsys, *test, "--stages", "grpo")
    assert "set: got 'raven.speed'" in failure(capsys, *test, "--set", "raven.speed")
    assert "expected a setting of raven" in failure(capsys, *test, "--set", "raven.speed=2")
    assert "expected a int such as 4" in failure(capsys, *test, "--set", "raven.steps=many")
    assert "expected chunks of 3 frames" in failure(capsys, *test, "--set", "raven.chunk_frames=[3,4]")
    with pytest.raises(ValueError, match="'teacher' is not done in .*nothing to export"):
        open_demo(tmp_path / "d").export_assets(tmp_path / "assets")


def test_settings_can_be_changed(tmp_path):
    demo = open_demo(tmp_path / "d", changes=["raven.steps=7", "grpo.lr=1", "evaluation.prompts=1"])
    assert demo.size.raven.steps == 7 and demo.size.grpo.lr == 1 and demo.size.evaluation.prompts == 1
    with pytest.raises(ValueError, match="holds a run with another .*raven.*--restart"):
        open_demo(tmp_path / "d")
    assert open_demo(tmp_path / "d", restart=True).size.raven.steps == 4


def test_folder_of_another_seed_is_refused(copy):
    with pytest.raises(ValueError, match="holds a run with another seed.*use another --out"):
        open_demo(copy, seed=1)
    (copy / "mine.txt").write_text("keep")
    demo = open_demo(copy, seed=1, restart=True)
    assert demo.state["stages"] == {} and not (copy / "raven.safetensors").exists()
    assert (copy / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}'])
def test_damaged_state_is_named(copy, text):
    (copy / "state.json").write_text(text)
    with pytest.raises(ValueError, match="state.json.*--restart"):
        open_demo(copy)


def test_no_room_and_no_permission_are_found_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in failure(capsys, "--size", "test", "--out", tmp_path / "file")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    assert "has 1 MiB free, expected at least 300 MiB" in failure(capsys, "--size", "test", "--out", tmp_path / "d")


def test_full_disk_in_the_middle_is_one_line_and_resumable(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    argv = ["--size", "test", "--out", tmp_path / "d", "--device", "cpu", "--stages", "teacher"]
    monkeypatch.setattr(stages, "save_checkpoint", full)
    assert cli.main(["demo", *map(str, argv)]) == cli.BAD_INPUT
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["demo", *map(str, argv)]) == 0
    assert (tmp_path / "d" / "teacher.safetensors").exists()


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install raven-kernels[demo]" in failure(capsys, "--size", "test", "--out", tmp_path / "d")


def test_exported_assets_are_taken_instead_of_training(finished, tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    finished.export_assets(assets)
    about = json.loads((assets / "assets.json").read_text())
    assert (
        about["command"].startswith("raven demo --size test --seed 0 --from-scratch --stages")
        and about["seed"] == 0
        and about["settings"]["teacher"]["steps"] == 2
    )
    assert load_file(assets / "start.safetensors")["head.head.weight"].dtype == torch.float16
    assert about["models"]["start"]["bytes"] == (assets / "start.safetensors").stat().st_size

    monkeypatch.setattr(stages, "ASSETS", assets)
    monkeypatch.setitem(sizes.SIZES, "test", replace(sizes.SIZES["test"], shipped=True))
    demo = open_demo(tmp_path / "d")
    demo.run(["teacher", "start"])
    assert demo.state["stages"]["start"]["what"] == "shipped with the package"
    taken, made = demo.load("start").state_dict(), finished.load("start").state_dict()
    assert all(torch.equal(taken[key], made[key].half().float()) for key in made)

    other = replace(sizes.SIZES["test"], model={**sizes.SIZES["test"].model, "num_layers": 2})
    monkeypatch.setitem(sizes.SIZES, "test", other)
    with pytest.raises(ValueError, match="teacher.safetensors: got a model of .*--from-scratch"):
        open_demo(tmp_path / "e").run(["teacher"])
    monkeypatch.setattr(stages, "ASSETS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="use --from-scratch"):
        open_demo(tmp_path / "f")
    assert open_demo(tmp_path / "g", from_scratch=True).from_scratch


def test_generate_understands_the_models_of_the_demo(finished, tmp_path):
    argv = ["generate", "--checkpoint", finished.model_path("grpo"), "--prompt", "a red circle moves up"]
    assert cli.main([*map(str, argv), "--frames", "9", "-o", str(tmp_path / "o.safetensors")]) == 0
    assert load_file(tmp_path / "o.safetensors")["latents"].shape == (1, 3, 9, 16, 16)


def test_sizes_are_consistent():
    for name, size in sizes.SIZES.items():
        assert size.long_frames == 3 * size.frames
        for stage in (size.teacher, size.start, size.raven, size.grpo):
            assert stage.latent_shape == (3, size.world["size"], size.world["size"]) and stage.frames == size.frames
        # A longer history than in training would be new to the model.
        assert size.window == size.chunks - 1
        assert sizes.find(name, 1).raven.seed != sizes.find(name, 2).raven.seed
        assert json.dumps(size.settings())


def test_tiny_models_fit_the_package():
    size = sizes.find("tiny")
    with torch.device("meta"):
        model = CausalWan(size.wan_config(text_dim=48, text_len=24))
    assert 2 * 2 * sum(p.numel() for p in model.parameters()) < 3_950_000  # two models in fp16, and their headers


def test_shipped_models_are_there_and_small():
    paths = [stages.ASSETS / f"{name}.safetensors" for name in ("teacher", "start")]
    assert sum(path.stat().st_size for path in paths) <= 4_000_000
    assert {value.dtype for path in paths for value in load_file(path).values()} == {torch.float16}
    about = json.loads((stages.ASSETS / "assets.json").read_text())
    settings = json.loads(json.dumps(sizes.find("tiny", about["seed"]).settings()))
    assert about["size"] == "tiny" and about["command"].startswith("raven demo")
    assert about["settings"]["model"] == settings["model"] and about["settings"]["world"] == settings["world"]
