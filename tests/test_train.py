"""Trainers on models of a few thousand weights: what they learn, and that no stop, crash or full disk changes it."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from raven.checkpoint import load_model, save_checkpoint
from raven.losses import flow_matching_loss
from raven.models import CausalWan, WanConfig
from raven.repack import repacked_forward
from raven.schedule import x0_from_velocity
from raven.stream import rollout
from raven.train import DistillConfig, Interrupted, PolicyConfig, PretrainConfig, checkpointing, distill, policy, run
from raven.train.distill import RavenTrainer
from raven.train.files import read_settings
from raven.train.graph import GraphedStep
from raven.train.loop import read_metrics
from raven.train.optim import Ema, warmup_cosine
from raven.train.policy import CMGRPOTrainer
from raven.train.pretrain import StartTrainer, TeacherTrainer
from raven.train.prompts import PromptFile, WorldPrompts

CHUNKS = (1, 2, 2)
SHAPE = (2, 8, 8)
SIZES = {"chunk_frames": CHUNKS, "latent_shape": SHAPE}
MODEL = WanConfig(
    dim=32,
    ffn_dim=32,
    num_heads=1,
    num_layers=1,
    in_dim=2,
    out_dim=2,
    freq_dim=16,
    text_dim=4,
    text_len=3,
    patch_size=(1, 4, 4),
)


def tiny(seed=0, head=0.05):
    torch.manual_seed(seed)
    model = CausalWan(MODEL)
    torch.nn.init.normal_(model.head.head.weight, std=head)
    return model


class World:
    """Videos of one constant, which the prompt names: "high" or "low"."""

    def prompts(self, count, seed):
        picks = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
        return [("low", "high")[i] for i in picks]

    def encode(self, prompts, device="cpu"):
        return torch.stack([torch.eye(3, 4) * (1 if prompt == "high" else -1) for prompt in prompts]).to(device)

    def sample(self, count, frames, seed, device="cpu"):
        prompts = self.prompts(count, seed)
        value = torch.tensor([0.8 if prompt == "high" else -0.8 for prompt in prompts])
        video = value.to(device).reshape(-1, 1, 1, 1, 1).expand(count, 2, frames, 8, 8)
        return SimpleNamespace(video=video, prompts=prompts)


PROMPTS = WorldPrompts(World())


def brightness(video, prompts):
    return {"brightness": video.mean(dim=(1, 2, 3, 4))}


def make(kind, seed=0, **changes):
    """A small trainer of each kind."""
    if kind in ("teacher", "start"):
        settings = {"batch": 2, "warmup": 2, "steps": 6, "lr": 3e-3, **SIZES, **changes}
        trainer = TeacherTrainer if kind == "teacher" else StartTrainer
        return trainer(tiny(seed), World(), PretrainConfig(**settings))
    if kind == "raven":
        rates = {"student_lr": 1e-3, "critic_lr": 1e-3}
        settings = {"batch": 2, "accumulation": 2, "rollout_every": 2, **rates, **SIZES, **changes}
        return RavenTrainer(tiny(seed), tiny(100), PROMPTS, DistillConfig(**settings))
    settings = {"group": 3, "prompts": 2, "lr": 1e-3, "clip": 1e-4, "updates_per_rollout": 2, "micro_batch": 4}
    return CMGRPOTrainer(tiny(seed), brightness, PROMPTS, PolicyConfig(**{**settings, **SIZES, **changes}))


def weights(trainer):
    state = trainer.state_dict()
    kept = {f"{name}/{key}": value for name, module in state["modules"].items() for key, value in module.items()}
    return kept | {f"average {key}": v for average in state["averages"].values() for key, v in average.items()}


def assert_same(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


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


@pytest.mark.parametrize("kind", ["teacher", "start"])
def test_pretraining_learns_the_world(kind):
    trainer = make(kind, steps=60, batch=8, lr=5e-3, shift=1.0, prompt_dropout=0.0, ema=0.9)
    losses = [float(trainer.step()["loss"]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    model = trainer.averaged("model")
    world = World()
    x_0 = world.sample(8, sum(CHUNKS), seed=5)
    right, wrong = (
        flow_matching_loss(
            trainer_velocity(trainer, model, x_0.video, context), x_0.video, torch.zeros(1).expand_as(x_0.video)
        )
        for context in (world.encode(x_0.prompts), -world.encode(x_0.prompts))
    )
    assert right < 0.7 * wrong


def trainer_velocity(trainer, model, video, context):
    """Velocity at level 1 for noise 0: then the target is ``-x_0`` and only the prompt tells which."""
    trainer.modules["model"] = model
    t = torch.ones(len(video)) if isinstance(trainer, TeacherTrainer) else torch.ones(len(video), len(CHUNKS))
    history = torch.zeros_like(video)
    with torch.no_grad():
        return trainer.velocity(torch.zeros_like(video), history, t, context)


def test_pool_is_drawn_from_and_survives_resumption(tmp_path):
    whole, parts = make("start", pool=5), make("start", pool=5)
    run(whole, 4, tmp_path / "a", progress=False)
    run(parts, 2, tmp_path / "b", progress=False)
    resumed = make("start", pool=5, seed=3)
    run(resumed, 4, tmp_path / "b", progress=False)
    assert_same(resumed, whole)


class Constant(torch.nn.Module):
    """A teacher that sees one constant video behind every noise."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, x, t, context):
        return (x - self.value) / t.reshape(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("history", ["raven", "self_forcing"])
def test_distillation_moves_rollouts_to_the_teacher(history):
    student = tiny()
    config = DistillConfig(
        batch=4,
        accumulation=1,
        student_lr=1e-2,
        critic_lr=1e-2,
        guidance=1.0,
        ttur=1,
        history=history,
        ema=0.5,
        **SIZES,
    )
    trainer = RavenTrainer(student, Constant(0.7), PROMPTS, config, critic=tiny(3))
    _, context = PROMPTS(4, torch.Generator().manual_seed(9))

    def distance():
        played = rollout(student, context, SHAPE, CHUNKS, trainer.levels, generator=torch.Generator().manual_seed(1))
        return (played.x_0 - 0.7).abs().mean().item()

    before = distance()
    for _ in range(20):
        metrics = trainer.step()
    assert distance() < 0.75 * before
    assert set(metrics) == {"critic_loss", "critic_norm", "dmd_loss", "gap", "student_norm"}


def test_student_gradient_is_that_of_the_repacked_forward():
    """One micro-batch by hand: stored states, one level a sample, guided teacher, and the DMD direction."""
    trainer = make("raven", accumulation=1, guidance=3.0)
    trainer.begin_step()
    batch = trainer._student_batch(trainer._roll_out())
    loss, _ = trainer._student_loss(**batch)
    loss.backward()
    got = [p.grad.clone() for p in trainer.modules["student"].parameters()]

    student, context = trainer.modules["student"], batch["context"]
    student.zero_grad()
    v = repacked_forward(student, batch["x_t"], batch["x_0"], batch["t"], context, CHUNKS)
    estimate = x0_from_velocity(v, batch["x_t"], batch["t"])
    s = batch["s"].reshape(-1, 1, 1, 1, 1)
    with torch.no_grad():
        x_s = (1 - s) * estimate + s * batch["noise"]
        fake = x_s - s * trainer.modules["critic"](x_s, batch["s"], context)
        blind = trainer.teacher(x_s, batch["s"], torch.zeros_like(context))
        real = x_s - s * (blind + 3.0 * (trainer.teacher(x_s, batch["s"], context) - blind))
        norm = (estimate - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        weight = torch.tensor([2 / 5, 2 / 4, 1.0])  # p_N / p_j with 5, 4 and 2 of 5 frames left
        weight = (weight * 5 / (weight * torch.tensor(CHUNKS)).sum()).repeat_interleave(torch.tensor(CHUNKS))
        direction = weight[:, None, None] * (fake - real) / norm / estimate.numel()
    estimate.backward(direction)
    for grad, parameter in zip(got, student.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-7)


def test_self_forcing_differs_from_raven_only_in_the_history_gradient():
    grads = {}
    for history in ("raven", "self_forcing"):
        trainer = make("raven", accumulation=1, history=history)
        trainer.begin_step()
        loss, _ = trainer._student_loss(**trainer._student_batch(trainer._roll_out()))
        loss.backward()
        grads[history] = loss.item(), [p.grad.clone() for p in trainer.modules["student"].parameters()]
    assert grads["raven"][0] == grads["self_forcing"][0]
    assert any(not torch.equal(a, b) for a, b in zip(grads["raven"][1], grads["self_forcing"][1], strict=True))


def test_student_is_updated_every_second_step_after_the_critic_and_teacher_never():
    trainer = make("raven", rollout_every=1, critic_first=2)
    frozen = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    moved = []
    for _ in range(6):
        before = {name: [p.clone() for p in m.parameters()] for name, m in trainer.modules.items()}
        trainer.step()
        moved.append(
            {
                n: any(not torch.equal(a, b) for a, b in zip(before[n], m.parameters(), strict=True))
                for n, m in trainer.modules.items()
            }
        )
    assert [m["critic"] for m in moved] == [True] * 6
    assert [m["student"] for m in moved] == [False, False, False, True, False, True]
    assert all(torch.equal(value, trainer.teacher.state_dict()[name]) for name, value in frozen.items())


class Shuffled(CMGRPOTrainer):
    """The same magnitudes of advantage, given to the wrong samples."""

    def advantages(self, rewards, asked):
        right = super().advantages(rewards, asked)
        return right[torch.randperm(len(right), generator=torch.Generator().manual_seed(self.steps_done))]


def rewarded(trainer_type, method="cm_grpo"):
    """Brightness of fresh rollouts before and after a few updates."""
    config = PolicyConfig(
        group=24,
        prompts=1,
        lr=1e-3,
        ema=0.0,
        method=method,
        clip=None if method == "cm_grpo" else 1e-3,
        every_step=True,
        **SIZES,
    )
    trainer = trainer_type(tiny(2, head=0.2), brightness, PROMPTS, config)
    _, context = PROMPTS(32, torch.Generator().manual_seed(11))

    def score():
        with torch.no_grad():
            trainer.generator.manual_seed(1)
            return brightness(trainer._roll_out(context).x_0, None)["brightness"]

    before = score()
    for _ in range(12):
        metrics = trainer.step()
    change = score() - before
    return change.mean().item(), (change.std() / len(change) ** 0.5).item(), metrics


@pytest.mark.parametrize("method", ["cm_grpo", "flow_grpo"])
def test_policy_updates_raise_the_reward(method):
    gain, error, metrics = rewarded(CMGRPOTrainer, method)
    assert gain > 0.02 and gain > 4 * error
    assert {"reward", "reward/brightness", "advantage", "loss", "log_prob", "student_norm"} <= set(metrics)


def test_policy_updates_with_shuffled_advantages_do_not():
    gain, _, _ = rewarded(Shuffled)
    assert gain < 0.01


def test_policy_with_equal_rewards_leaves_the_student_alone():
    trainer = CMGRPOTrainer(
        tiny(), lambda video, prompts: {"same": torch.ones(len(video))}, PROMPTS, PolicyConfig(group=4, **SIZES)
    )
    before = weights(trainer)
    before = {name: value.clone() for name, value in before.items()}
    metrics = trainer.step()
    assert metrics["advantage"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_trainer_ratio_is_exactly_one_in_every_micro_batch():
    trainer = make("grpo", updates_per_rollout=1, micro_batch=4)
    assert trainer.step()["ratio"] == 1


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


WORKER = """
import sys
import torch
import test_train as t
from raven.grpo import group_advantages
from raven.train import distributed as d, run

with d.process_group("cpu") as device:
    rank = d.rank()
    assert d.world_size() == 2 and d.is_main() == (rank == 0)
    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.fill_(rank + 1.0)
    d.broadcast_parameters(module)
    assert (module.weight == 1).all()
    module.weight.grad = torch.full((1, 2), float(rank))
    d.average_gradients(module.parameters())
    assert (module.weight.grad == 0.5).all() and (module.bias.grad == 0).all()
    assert d.gather(torch.tensor([rank, 10 + rank])).tolist() == [0, 10, 1, 11]
    assert d.any_rank(rank == 1) and not d.any_rank(False)
    # Rank 0's two samples of the prompt differ by 1, rank 1's by 2; after the first normalisation all are +-1.
    rewards = torch.tensor([[0.0, 1.0 + rank]])
    got = group_advantages(rewards, ["p", "p"], gather=d.gather, rank=rank)
    assert torch.allclose(got, torch.tensor([-1.0, 1.0]), atol=1e-3), got

    for kind in ("raven", "grpo"):
        trainer = t.make(kind, seed=rank)  # other initial weights: rank 0's are taken
        run(trainer, 2, sys.argv[1] + "/" + kind, progress=False)
        flat = torch.cat([v.flatten() for v in t.weights(trainer).values()])
        both = d.gather(flat[None])
        assert torch.equal(both[0], both[1])
        assert len(t.read_metrics(sys.argv[1] + "/" + kind + "/metrics.jsonl")) == 2
        resumed = t.make(kind, seed=5)
        run(resumed, 2, sys.argv[1] + "/" + kind, progress=False)
        t.assert_same(resumed, trainer)
    print("ok", rank)
"""


def test_two_processes_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["teacher", "start", "raven"])
def test_graphed_steps_equal_ordinary_ones(kind):
    settings = {"accumulation": 1, "ttur": 1, "rollout_every": 1} if kind == "raven" else {}

    def trained(cuda_graph):
        trainer = make_on_gpu(kind, cuda_graph=cuda_graph, amp=False, **settings)
        return [{name: float(value) for name, value in trainer.step().items()} for _ in range(GraphedStep.WARMUP + 4)]

    for ours, theirs in zip(trained(True), trained(False), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def make_on_gpu(kind, **changes):
    if kind == "raven":
        settings = {"batch": 2, "student_lr": 1e-3, "critic_lr": 1e-3, **SIZES, **changes}
        prompts = WorldPrompts(World(), "cuda")
        return RavenTrainer(tiny().cuda(), tiny(1).cuda(), prompts, DistillConfig(**settings))
    settings = {"batch": 2, "warmup": 2, "steps": 10, **SIZES, **changes}
    trainer = TeacherTrainer if kind == "teacher" else StartTrainer
    return trainer(tiny().cuda(), World(), PretrainConfig(**settings))
