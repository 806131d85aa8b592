"""The loop around trainers: no stop, crash or full disk changes what they learn; settings, prompts, commands."""

import json
import os
import resource
import signal
import sys

import pytest
import torch
from tiny_train import CHUNKS, SHAPE, assert_same, brightness, make, tiny

from raven.checkpoint import load_model, save_checkpoint
from raven.rollout import rollout
from raven.train import DistillConfig, Interrupted, PolicyConfig, checkpointing, distill, distributed, policy, run
from raven.train.files import read_settings
from raven.train.loop import read_metrics
from raven.train.optim import Ema, warmup_cosine
from raven.train.prompts import PromptFile


class Stopping:
    """Passes through to a trainer, and does something in the middle of one step."""

    def __init__(self, trainer, at, action):
        self.trainer, self.at, self.action = trainer, at, action

    def __getattr__(self, name):
        return getattr(self.trainer, name)

    def step(self):
        if self.trainer.steps_done == self.at:
            self.action()
        return self.trainer.step()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("power cut")


@pytest.mark.parametrize("kind", ["teacher", "start", "raven", "grpo"])
def test_interrupted_and_crashed_run_equals_an_uninterrupted_one(kind, tmp_path):
    """Ctrl-C during step 2 (RAVEN: between the two steps of one rollout), a crash in step 5 after a save at step 4."""
    whole = make(kind)
    records = run(whole, 6, tmp_path / "whole", progress=False)
    with pytest.raises(Interrupted, match="stopped at step 1 of 6"):
        run(Stopping(make(kind), 0, interrupt), 6, tmp_path / "parts", progress=False)
    with pytest.raises(RuntimeError, match="power cut"):
        run(Stopping(make(kind, seed=7), 5, crash), 6, tmp_path / "parts", save_every=4, progress=False)
    assert len(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == 5
    resumed = make(kind, seed=7)  # everything, also the initial weights, comes from the checkpoint
    assert run(resumed, 6, tmp_path / "parts", progress=False) == records != []
    assert_same(resumed, whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt) as stop:
        run(Stopping(make("teacher"), 1, twice), 3, tmp_path, progress=False)
    assert not isinstance(stop.value, Interrupted)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_goes_to_stderr_with_and_without_tqdm(tmp_path, monkeypatch, capsys):
    run(make("teacher"), 2, tmp_path / "bar", desc="teacher")
    assert "teacher: 100%" in (shown := capsys.readouterr().err) and "loss" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(make("teacher"), 2, tmp_path / "lines", desc="teacher")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" loss")[0] for line in lines] == ["teacher: 1/2", "teacher: 2/2"]


def test_finished_run_does_nothing_more(tmp_path):
    records = run(make("teacher"), 2, tmp_path, progress=False)
    again = Stopping(make("teacher"), 2, crash)
    assert run(again, 2, tmp_path, progress=False) == records


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpointing.save_atomic({"x": torch.arange(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="the earlier checkpoint is intact"):
            checkpointing.save_atomic({"x": torch.zeros(100_000)}, path)
        with pytest.raises(OSError, match="there is no earlier checkpoint"):
            checkpointing.save_atomic({"x": torch.zeros(100_000)}, tmp_path / "other.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpointing.load(path)["x"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "foreign"])
def test_damaged_or_foreign_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "checkpoint.pt"
    if content == "foreign":
        torch.save({"model": {}}, path)
    elif content == "cut":
        checkpointing.save_atomic({"x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable raven training checkpoint"):
        run(make("teacher"), 2, tmp_path, progress=False)


def test_other_settings_do_not_continue_a_run(tmp_path):
    run(make("teacher"), 1, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.003 -> 0.1\)"):
        run(make("teacher", lr=0.1), 2, tmp_path, progress=False)
    with pytest.raises(ValueError, match="got one of TeacherTrainer, expected one of StartTrainer"):
        run(make("start"), 2, tmp_path, progress=False)


def test_nan_stops_the_run(tmp_path):
    trainer = make("teacher")
    with torch.no_grad():
        trainer.modules["model"].head.head.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        run(trainer, 2, tmp_path, progress=False)


def test_log_of_a_crash_in_mid_line_is_read_and_rewound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert [r["step"] for r in read_metrics(path, until=1)] == [1]
    run(make("teacher"), 1, tmp_path, progress=False)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_every_step_and_rank_draws_anew(monkeypatch):
    trainer, seen = make("raven"), set()
    for rank in range(3):
        monkeypatch.setattr("raven.train.distributed.rank", lambda rank=rank: rank)
        for trainer.steps_done in range(20):
            trainer.begin_step()
            seen.add(tuple(torch.rand(2, generator=trainer.generator).tolist()))
    assert len(seen) == 60


def test_ema_follows_its_formula():
    module = torch.nn.Linear(2, 2)
    ema = Ema(module, 0.75)
    want = module.weight.detach().clone()
    for value in (1.0, -2.0):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
        want = 0.75 * want + 0.25 * value
    torch.testing.assert_close(ema.state_dict()["weight"], want)
    with pytest.raises(ValueError, match="decay: got 1"):
        Ema(module, 1)


def test_warmup_cosine_shape():
    rates = [warmup_cosine(step, 100, 10, 2.0, final=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_settings_from_file_and_pairs(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"batch": 3, "chunk_frames": [1, 2]}))
    config = read_settings(DistillConfig, str(path), ["ttur=4", "history=self_forcing"])
    assert (config.batch, config.chunk_frames, config.ttur, config.history) == (3, (1, 2), 4, "self_forcing")
    with pytest.raises(ValueError, match="config key: got 'batchh'"):
        read_settings(DistillConfig, None, ["batchh=1"])
    with pytest.raises(ValueError, match="rollout_every: got 2, expected a divisor of ttur = 3"):
        DistillConfig(ttur=3, rollout_every=2)
    with pytest.raises(ValueError, match="clip: got None"):
        PolicyConfig(updates_per_rollout=2)
    with pytest.raises(ValueError, match="history: got 'none'"):
        DistillConfig(history="none")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("batch=two", "batch: got 'two', expected an integer"),
        ("batch=1.5", "batch: got 1.5, expected an integer"),
        ("batch=true", "batch: got True, expected an integer"),
        ("chunk_frames=3", "chunk_frames: got 3, expected a list of integers"),
        ("chunk_frames=[1.5]", r"chunk_frames: got \[1.5\], expected a list of integers"),
        ("betas=[true, 0.9]", r"betas: got \[True, 0.9\], expected a list of numbers"),
        ("grad_clip=big", "grad_clip: got 'big', expected a number or None"),
        ("student_lr=fast", "student_lr: got 'fast', expected a number"),
        ("amp=1", "amp: got 1, expected true or false"),
        ("history=null", "history: got None, expected a text"),
        ("window=all", "window: got 'all', expected an integer or None"),
        ("window=1.5", "window: got 1.5, expected an integer or None"),
    ],
)
def test_settings_of_another_kind_are_named(pair, message):
    with pytest.raises(TypeError, match=message):
        read_settings(DistillConfig, None, [pair])


@pytest.mark.parametrize("device", ["warp", "meta"])
def test_unusable_device_is_named(device):
    with pytest.raises(ValueError, match=f"device: got '{device}', expected 'cpu' or 'cuda'"):
        with distributed.process_group(device):
            pass


def test_prompt_file_pads_and_draws(tmp_path):
    path = tmp_path / "prompts.safetensors"
    rows = [torch.randn(n, 4) for n in (1, 3, 2)]
    PromptFile.save(path, ["a", "b", "c"], rows, negative=torch.ones(1, 4))
    file = PromptFile(path, text_len=3)
    prompts, context = file(20, torch.Generator().manual_seed(0))
    assert set(prompts) == {"a", "b", "c"}
    for prompt, padded in zip(prompts, context, strict=True):
        want = rows["abc".index(prompt)]
        assert torch.equal(padded[: len(want)], want) and (padded[len(want) :] == 0).all()
    assert file.negative.sum() == 4
    with pytest.raises(ValueError, match="embedding of 'b'"):
        PromptFile(path, text_len=2)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        PromptFile(path, text_len=3)
    with pytest.raises(ValueError, match="not a file"):
        PromptFile(tmp_path / "absent.safetensors", text_len=3)


def test_commands_train_from_files(tmp_path, capsys):
    """``raven distill`` and ``raven grpo`` end to end: files in, a student out that streams."""
    save_checkpoint(tmp_path / "teacher.safetensors", tiny(1))
    save_checkpoint(tmp_path / "start.safetensors", tiny(0))
    PromptFile.save(tmp_path / "prompts.safetensors", ["x", "y"], [torch.randn(2, 4), torch.randn(3, 4)])
    sizes = ["--set", f"chunk_frames={list(CHUNKS)}", "--set", f"latent_shape={list(SHAPE)}", "--set", "steps=2"]
    common = ["--prompts", str(tmp_path / "prompts.safetensors"), "--device", "cpu", *sizes]
    teacher, start = (str(tmp_path / f"{name}.safetensors") for name in ("teacher", "start"))
    out = tmp_path / "raven"
    assert distill.main(["--teacher", teacher, "--start", start, "--out", str(out), *common]) == 0
    student = out / "student.safetensors"
    assert capsys.readouterr().out.strip() == str(student)
    reward = f"{__name__}:make_reward"
    assert policy.main(["--student", str(student), "--reward", reward, "--out", str(tmp_path / "g"), *common]) == 0
    trained, initial = load_model(tmp_path / "g" / "student.safetensors"), tiny(0)
    assert not torch.equal(trained.head.head.weight, initial.head.head.weight)
    rollout(trained, torch.zeros(1, 3, 4), SHAPE, CHUNKS)
    with pytest.raises(ValueError, match="reward: got 'nowhere:Reward'"):
        policy.main(["--student", str(student), "--reward", "nowhere:Reward", "--out", str(tmp_path / "h"), *common])


def make_reward():
    return brightness
