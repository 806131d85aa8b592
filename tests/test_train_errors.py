"""What training refuses: by the name of the argument, and with everything as it was."""

import random

import pytest
import torch
from tiny_train import CHUNKS, PROMPTS, SHAPE, assert_same, make, tiny, weights

from raven.checkpoint import load_checkpoint, write_safetensors
from raven.train import DistillConfig, PolicyConfig, PretrainConfig, checkpointing, policy, run
from raven.train.files import import_factory
from raven.train.graph import GraphedStep
from raven.train.loop import read_metrics
from raven.train.optim import Ema
from raven.train.prompts import PromptFile


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistillConfig, {"student_lr": float("nan")}, "student_lr: got nan, expected finite numbers"),
        (DistillConfig, {"critic_lr": -1e-3}, "critic_lr: got -0.001, expected at least 0"),
        (DistillConfig, {"ema": 1.0}, r"ema: got 1.0, expected a number in \[0, 1\)"),
        (DistillConfig, {"betas": (0.9,)}, r"betas: got \(0.9,\), expected two numbers in \[0, 1\)"),
        (DistillConfig, {"shift": 0.0}, "shift: got 0.0, expected a positive number"),
        (DistillConfig, {"window": -1}, "window: got -1, expected at least 0"),
        (DistillConfig, {"grad_clip": 0}, "grad_clip: got 0, expected a positive number"),
        (PolicyConfig, {"kl": -0.1}, "kl: got -0.1, expected at least 0"),
        (PolicyConfig, {"clip": 0.0}, "clip: got 0.0, expected a positive number"),
        (PolicyConfig, {"kl": 0.1, "method": "flow_grpo", "clip": 1e-4}, "kl: got 0.1 with method 'flow_grpo'"),
        (PretrainConfig, {"pool": -1}, "pool: got -1, expected at least 0"),
        (PretrainConfig, {"prompt_dropout": 1.0}, r"prompt_dropout: got 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_named(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize("kind", ["raven", "grpo"])
@pytest.mark.parametrize("fault", ["modules", "averages", "masters", "optimizers", "trainer"])
def test_a_checkpoint_of_another_model_leaves_the_trainer_as_it_was(kind, fault, tmp_path):
    settings = {"master_weights": True, "ema": 0.5}
    other, trainer = make(kind, seed=3, **settings), make(kind, **settings)
    other.step()
    state = other.state_dict()
    name = list(state["modules"])[-1]
    if fault == "trainer":
        del state["trainer"]
        message = f"checkpoint: got one of None, expected one of {type(trainer).__name__}"
    elif fault == "optimizers":
        state["optimizers"][name]["param_groups"][0]["params"].pop()
        message = f"checkpoint: optimizers/{name}: got {len(trainer.trained(name)) - 1} trained tensors, expected"
    else:
        part = state[fault][name if fault != "averages" else "student"]
        key = list(part)[-1]
        part[key] = part[key][:1, :0] if part[key].ndim > 1 else part[key][:0]
        message = f"checkpoint: {fault}/.*: got {key} .*0.*, expected"
    checkpointing.save_atomic(state, tmp_path / "checkpoint.pt")
    before = {key: value.clone() for key, value in weights(trainer).items()}
    with pytest.raises(ValueError, match=message):
        run(trainer, 2, tmp_path, progress=False)
    assert trainer.steps_done == 0 and all(torch.equal(weights(trainer)[key], value) for key, value in before.items())


def test_an_average_goes_into_its_own_architecture_only():
    ema, other = Ema(torch.nn.Linear(2, 2), 0.5), torch.nn.Linear(2, 3)
    before = [p.detach().clone() for p in other.parameters()]
    for load in (lambda: ema.copy_to(other), lambda: ema.load_state_dict(other.state_dict())):
        with pytest.raises(ValueError, match=r"(module|ema): got weight \(3, 2\), expected \(2, 2\)"):
            load()
    assert all(torch.equal(*pair) for pair in zip(before, other.parameters(), strict=True))
    with pytest.raises(ValueError, match="ema: got no 'bias', expected the 2 tensors"):
        ema.load_state_dict({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="ema: got NoneType in place of saved tensors"):
        ema.load_state_dict(None)


def test_a_step_that_broke_off_leaves_no_gradient():
    """A reward that fails once, after the first of two micro-batches was differentiated."""
    want, trainer = make("grpo"), make("grpo")
    backward, calls = trainer.backward, []

    def failing(name, loss):
        backward(name, loss)
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("out of memory")

    trainer.backward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step()
    assert any(p.grad is not None for p in trainer.trained("student"))
    trainer.step()
    want.step()
    assert_same(trainer, want)


def test_modules_that_cannot_be_trained_stay_as_they_were():
    frozen = tiny().requires_grad_(False).eval()
    trainer = make("grpo", master_weights=True)
    with pytest.raises(ValueError, match="other: got no parameter that requires a gradient"):
        trainer.add_trained("other", frozen, 1e-3)
    assert frozen.dtype == torch.float32 and not frozen.training and list(trainer.modules) == ["student"]


def test_log_that_is_no_log_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (b"not json", b"[1]", b'{"loss": 1.0}', b"\xff\xfe"):
        path.write_bytes(b'{"step": 1}\n' + line + b"\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: got .*, expected metrics as JSON with a step"):
            read_metrics(path)


def test_embeddings_of_a_prompt_file_are_checked(tmp_path):
    path, rows = tmp_path / "prompts.safetensors", [torch.ones(1, 4), torch.ones(2, 4)]
    wrong = [
        (
            {},
            [torch.ones(1, 4), torch.full((1, 4), float("nan"))],
            "embedding of 'b': got 4 of 4 values NaN or infinite",
        ),
        ({}, [torch.ones(1, 4), torch.ones(1, 3)], "embedding of 'b': got text_dim 3, expected 4 as that of 'a'"),
        ({"negative": torch.ones(1, 5)}, rows, "embedding of 'negative': got text_dim 5, expected 4"),
        ({}, [torch.ones(4), torch.ones(1, 4)], r"embedding of 'a': got shape \(4,\)"),
    ]
    for embeddings, error in (
        ([torch.ones(1, 4).long()] * 2, ValueError),
        ([torch.ones(())] * 2, ValueError),
        ([[1.0]] * 2, TypeError),
    ):
        with pytest.raises(error, match="embedding of 'a': got .*, expected"):
            PromptFile.save(path, ["a", "b"], embeddings)
    with pytest.raises(ValueError, match=r"prompts: got \[1, 2\], expected texts"):
        PromptFile.save(path, [1, 2], rows)
    for options, embeddings, message in wrong:
        with pytest.raises(ValueError, match=message):
            PromptFile.save(path, ["a", "b"], embeddings, **options)
        assert not path.exists()
        tensors = {str(i): tensor for i, tensor in enumerate(embeddings)} | options
        write_safetensors(path, tensors, {"prompts": '["a", "b"]'})
        with pytest.raises(ValueError, match=message):
            PromptFile(path, text_len=3)
        path.unlink()
    for prompts, message in (
        ("[", "that are not JSON"),
        ("[1, 2]", "expected a list of texts"),
        ('"ab"', "'ab' for prompts"),
    ):
        write_safetensors(path, {"0": rows[0], "1": rows[1]}, {"prompts": prompts})
        with pytest.raises(ValueError, match=message):
            PromptFile(path, text_len=3)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        ("brightness", TypeError, "reward: got str, expected a function"),
        (lambda video, prompts: [1.0], TypeError, "reward: got list from it, expected"),
        (lambda video, prompts: {"x": 1.0}, TypeError, "reward 'x': got float, expected a tensor"),
        (lambda video, prompts: {"x": video.mean()}, ValueError, r"reward 'x': got shape \(\), expected \[6\]"),
    ],
)
def test_rewards_of_another_form_are_named(reward, error, message):
    config = PolicyConfig(chunk_frames=CHUNKS, latent_shape=SHAPE, group=3, prompts=2)
    with pytest.raises(error, match=message):
        policy.CMGRPOTrainer(tiny(), reward, PROMPTS, config).step()


@pytest.mark.parametrize("pairs", [["=1"], ["a=b"], ["a=nan"], ["a=1", "a=2"]])
def test_weights_of_rewards_are_checked(pairs):
    with pytest.raises(ValueError, match=f"weight: got '{pairs[-1]}', expected NAME=NUMBER"):
        policy._weights(pairs)


def test_factories_are_called():
    with pytest.raises(TypeError, match="reward: got 'os:sep', a str, expected something to call"):
        import_factory("os:sep", "reward")


def test_a_graphed_step_says_which_inputs_it_takes():
    class OnGpu(torch.Tensor):
        is_cuda = True

    step = GraphedStep(lambda **inputs: inputs)
    first = torch.ones(2).as_subclass(OnGpu)
    step._calls, step._inputs = 1, {"x": first}
    with pytest.raises(ValueError, match="inputs: got y, expected x as before"):
        step(y=first)
    with pytest.raises(ValueError, match=r"x: got torch.float32 \[3\], expected torch.float32 \[2\] as before"):
        step(x=torch.ones(3).as_subclass(OnGpu))


@pytest.mark.gpu
def test_a_capture_that_failed_is_not_replayed():
    calls = []

    def update(x):
        calls.append(1)
        if len(calls) == GraphedStep.WARMUP + 1:
            raise RuntimeError("broken off")
        return {"y": x + 1}

    step = GraphedStep(update)
    for i in range(GraphedStep.WARMUP):
        assert float(step(x=torch.tensor(float(i), device="cuda"))["y"]) == i + 1
    with pytest.raises(RuntimeError, match="broken off"):
        step(x=torch.zeros((), device="cuda"))
    assert float(step(x=torch.tensor(7.0, device="cuda"))["y"]) == 8


def test_tensors_and_other_state_are_compared():
    """A module may keep what is no tensor beside its own."""
    tensors = {"a": torch.zeros(2), "extra": {"steps": 3}}
    checkpointing.check_same_tensors("model", {**tensors, "extra": {}}, tensors)
    for saved, message in (
        ({**tensors, "a": 7}, r"model: got a int, expected \(2,\)"),
        ({**tensors, 1: 2, "b": 3}, "model: got more 1, expected the 2 tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpointing.check_same_tensors("model", saved, tensors)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_damaged_checkpoint_is_refused_whatever_its_bytes_say(as_zip, tmp_path):
    """Bytes of the pickled part changed at random; some changes leave a readable file, none another error."""
    trainer = make("grpo")
    trainer.step()
    path = tmp_path / "checkpoint.pt"
    checkpointing.save_atomic(trainer.state_dict(), path)
    if not as_zip:
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    whole, draw = path.read_bytes(), random.Random(0)
    begin = max(0, whole.find(b"data.pkl"))
    end = whole.find(b"byteorder", begin) if as_zip else len(whole) // 8
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[draw.randrange(begin, end)] = draw.randrange(256)
        path.write_bytes(damaged)
        for load in (checkpointing.load, load_checkpoint):
            try:
                load(path)
            except ValueError as error:
                assert "checkpoint.pt is not a readable" in str(error) or "checkpoint.pt cannot be read" in str(error)
                refused += 1
    assert refused > 100
