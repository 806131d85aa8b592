"""bfloat16 weights with float32 masters: small updates count, runs resume exactly; and the phases of a step."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_train import CHUNKS, SHAPE, assert_same, make, tiny

from raven.checkpoint import save_checkpoint
from raven.train import distill, run
from raven.train.base import BaseTrainer
from raven.train.config import DistillConfig, PretrainConfig
from raven.train.optim import Ema, MasterWeights, adamw
from raven.train.phases import PhaseTimer, phase
from raven.train.prompts import PromptFile

KINDS = ("teacher", "start", "raven", "grpo")
TRAINED = {"teacher": "model", "start": "model", "raven": "student", "grpo": "student"}


def gradients_of(module, seed):
    """The same numbers for every precision (bfloat16 holds them), all of one sign, so that the updates add up."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).abs().bfloat16() for p in module.parameters()]


def test_masters_follow_float32_adamw_where_bfloat16_stands_still():
    settings = {"lr": 1e-5, "betas": (0.0, 0.999)}
    single, mixed, half = tiny(), tiny(), tiny().bfloat16()
    masters = MasterWeights(mixed)
    optimizers = [adamw(p, **settings) for p in (single.parameters(), masters.parameters, half.parameters())]
    before = half.blocks[0].ffn[0].weight.detach().clone()
    for step in range(50):
        for module in (single, mixed, half):
            for p, grad in zip(module.parameters(), gradients_of(module, step), strict=True):
                p.grad = grad.to(p.dtype, copy=True)
        masters.collect()
        assert all(p.grad is None for p in mixed.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        masters.publish()
    start = dict(tiny().named_parameters())
    for name, want in single.named_parameters():
        assert torch.equal(masters.state_dict()[name], want), name
        assert torch.equal(mixed.get_parameter(name), want.bfloat16()) and not torch.equal(want, start[name])
    assert mixed.dtype == torch.bfloat16
    # Most weights are above 0.03, where neighbours in bfloat16 are 1e-4 apart and a step is about 1e-5.
    stuck = (half.blocks[0].ffn[0].weight == before).float().mean()
    moved = (mixed.blocks[0].ffn[0].weight != before).float().mean()
    assert stuck > 0.9 and moved > 0.3


def test_gradients_of_micro_batches_add_up_in_float32():
    """256 + 1 is 256 in bfloat16."""
    module = torch.nn.Linear(1, 1, bias=False)
    masters = MasterWeights(module)
    for value in (256.0, 1.0, 1.0):
        module(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
        masters.collect()
    assert masters.parameters[0].grad.item() == 258.0 and masters.parameters[0].grad.dtype == torch.float32


def test_parameters_without_a_gradient_stay_without():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    masters = MasterWeights(module)
    assert [p.requires_grad for p in masters.parameters] == [True, False]
    module(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    masters.collect()
    assert masters.parameters[0].grad is not None and masters.parameters[1].grad is None


def test_average_reads_the_masters():
    module = torch.nn.Linear(2, 2)
    masters = MasterWeights(module)
    first = masters.parameters[0].detach().clone()
    ema = Ema(module, 0.5, masters)
    with torch.no_grad():
        masters.parameters[0] += 1e-5
    masters.publish()
    ema.update()
    assert torch.equal(ema.state_dict()["weight"], first.lerp(masters.parameters[0].detach(), 0.5))


def test_state_that_does_not_fit_is_refused():
    masters = MasterWeights(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="masters: got no 'bias', expected the 2 tensors of this model"):
        masters.load_state_dict({"weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    whole = make(kind, master_weights=True)
    records = run(whole, 4, tmp_path / "whole", progress=False)
    run(make(kind, master_weights=True), 3, tmp_path / "parts", progress=False)
    resumed = make(kind, seed=7, master_weights=True)
    assert run(resumed, 4, tmp_path / "parts", progress=False) == records
    assert_same(resumed, whole)
    name = TRAINED[kind]
    masters, theirs = (trainer.masters[name].state_dict() for trainer in (resumed, whole))
    assert all(torch.equal(masters[key], theirs[key]) for key in masters) and masters
    assert resumed.modules[name].dtype == torch.bfloat16
    for key, p in resumed.modules[name].named_parameters():
        assert torch.equal(p, masters[key].bfloat16()), key
    averaged = resumed.averaged(name)
    assert averaged.dtype == torch.float32 and resumed.modules[name].dtype == torch.bfloat16
    assert torch.equal(averaged.head.head.weight, resumed.averages[name].state_dict()["head.head.weight"])


@pytest.mark.parametrize("kind", ["start", "raven", "grpo"])
def test_training_moves_as_in_float32(kind):
    """The way of the weights over three steps, against float32: masters keep its direction and length."""
    start, ways = tiny().state_dict(), []
    for masters in (False, True):
        trainer = make(kind, master_weights=masters, **({"group": 4} if kind == "grpo" else {}))
        for _ in range(4):
            trainer.step()
        name = TRAINED[kind]
        state = trainer.masters[name].state_dict() if masters else dict(trainer.modules[name].named_parameters())
        ways.append(torch.cat([(value.detach() - start_of(start, key)).flatten() for key, value in state.items()]))
    assert torch.cosine_similarity(*ways, dim=0) > 0.8
    assert 0.8 < float(ways[1].norm() / ways[0].norm()) < 1.25


def start_of(state, name):
    """A parameter of ``tiny()`` by its own name."""
    return dict(tiny().named_parameters())[name].detach() if name not in state else state[name]


def test_command_writes_the_float32_average(tmp_path):
    for name, seed in (("teacher", 1), ("start", 0)):
        save_checkpoint(tmp_path / f"{name}.safetensors", tiny(seed))
    PromptFile.save(tmp_path / "prompts.safetensors", ["x"], [torch.randn(2, 4)])
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("teacher", "start", "prompts")}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", path)]
    settings = {"chunk_frames": list(CHUNKS), "latent_shape": list(SHAPE), "steps": 2, "ttur": 1, "student_lr": 1e-5}
    settings |= {"master_weights": "true", "checkpointing": "full"}
    arguments += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    assert distill.main([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
    student = load_file(tmp_path / "student.safetensors")
    weight, start = student["blocks.0.ffn.0.weight"], tiny(0).state_dict()["blocks.0.ffn.0.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, start)
    torch.testing.assert_close(weight, start, rtol=0, atol=5e-5)  # two steps of 1e-5, not the spacing of bfloat16


def test_settings_newer_than_a_run_keep_their_defaults(tmp_path):
    trainer = make("teacher")
    state = trainer.state_dict()
    for name in ("master_weights", "checkpointing"):
        state["config"].pop(name, None)
    make("teacher").load_state_dict(state)
    with pytest.raises(ValueError, match="master_weights False -> True"):
        make("teacher", master_weights=True).load_state_dict(state)


def test_checkpointing_is_set_on_what_is_trained():
    with pytest.raises(ValueError, match="checkpointing: got 'some', expected one of model, none, selective, full"):
        DistillConfig(checkpointing="some")
    trainer = make("raven", checkpointing="full")
    assert {trainer.modules[name].gradient_checkpointing for name in ("student", "critic")} == {"full"}
    plain = make("raven")
    plain.step(), trainer.step()
    assert_same(plain, trainer)
    with pytest.raises(ValueError, match="checkpointing: got 'full', expected 'model': Linear has no choice"):
        BaseTrainer(PretrainConfig(checkpointing="full"), "cpu").add_trained("model", torch.nn.Linear(1, 1), 1e-3)


def test_phases_of_a_step_are_timed():
    trainer = make("raven", accumulation=1, rollout_every=1, ttur=1)
    with PhaseTimer("cpu") as timer:
        trainer.step()
    times = timer.phases_ms()
    assert list(times) == [
        "rollout",
        "critic forward",
        "critic backward",
        "critic optimizer",
        "student forward",
        "critic score",
        "teacher score",
        "student backward",
        "student optimizer",
        "student average",
    ]
    assert all(value > 0 for value in times.values()) and sum(times.values()) < timer.total_ms()
    trainer.step()  # nobody listens any more
    assert timer.phases_ms() == times


def test_a_phase_that_fails_is_not_counted():
    with PhaseTimer("cpu") as timer:
        with pytest.raises(KeyError), phase("wrong"):
            raise KeyError("x")
        with phase("right"):
            pass
    assert list(timer.phases_ms()) == ["right"]
