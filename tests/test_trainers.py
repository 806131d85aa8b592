"""What each trainer learns, its gradient by hand, and its steps as CUDA graphs."""

import pytest
import torch
from tiny_train import CHUNKS, PROMPTS, SHAPE, SIZES, World, assert_same, brightness, make, tiny, weights

from raven.losses import flow_matching_loss
from raven.repack import repacked_forward
from raven.rollout import rollout
from raven.schedule import x0_from_velocity
from raven.train import DistillConfig, PolicyConfig, PretrainConfig, run
from raven.train.distill import RavenTrainer
from raven.train.graph import GraphedStep
from raven.train.policy import CMGRPOTrainer
from raven.train.pretrain import StartTrainer, TeacherTrainer
from raven.train.prompts import WorldPrompts


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


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("kind", ["teacher", "start", "raven"])
def test_graphed_steps_equal_ordinary_ones(kind, masters):
    settings = {"accumulation": 1, "ttur": 1, "rollout_every": 1} if kind == "raven" else {}
    settings["master_weights"] = masters

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
