"""Several processes: what they agree on, what one process would have done, the commands under torchrun, and shards."""

import argparse
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from tiny_train import CHUNKS, SHAPE, RanksInTurn, brightness, make, tiny
from torch.distributed.run import get_args_parser

from raven.checkpoint import load_model, save_checkpoint
from raven.train import distill, distributed, policy, run
from raven.train.loop import read_metrics
from raven.train.prompts import PromptFile

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ALONE = {"accumulation": 1, "rollout_every": 1}

WORKER = """
import os, signal, sys
import torch
import tiny_train as t
from raven.grpo import group_advantages
from raven.train import Interrupted, distributed as d, read_metrics, run

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
    assert d.average({"a": rank, "b": torch.tensor(4.0 * rank)}) == {"a": 0.5, "b": 2.0}
    # Rank 0's two samples of the prompt differ by 1, rank 1's by 2; after the first normalisation all are +-1.
    rewards = torch.tensor([[0.0, 1.0 + rank]])
    got = group_advantages(rewards, ["p", "p"], gather=d.gather, rank=rank)
    assert torch.allclose(got, torch.tensor([-1.0, 1.0]), atol=1e-3), got

    alone = {"accumulation": 1, "rollout_every": 1}
    runs = {"raven": {}, "raven alone": alone, "raven masters": {"master_weights": True, **alone}, "grpo": {"kl": 0.1}}
    for name, settings in runs.items():
        kind = name.split()[0]
        trainer = t.make(kind, seed=rank, **settings)  # other initial weights: rank 0's are taken
        folder = sys.argv[1] + "/" + name
        run(trainer, 4, folder, progress=False)
        flat = torch.cat([v.flatten() for v in t.weights(trainer).values()])
        both = d.gather(flat[None])
        assert torch.equal(both[0], both[1])
        assert len(read_metrics(folder + "/metrics.jsonl")) == 4
        resumed = t.make(kind, seed=5, **settings)
        run(resumed, 4, folder, progress=False)
        t.assert_same(resumed, trainer)
        if name == "raven alone":
            whole = trainer

    def stopped():  # one rank is interrupted in its second step: both end after it
        if rank == 1 and trainer.steps_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    trainer = t.make("raven", **alone)
    step, trainer.step = trainer.step, stopped
    folder = sys.argv[1] + "/stopped"
    try:
        run(trainer, 4, folder, progress=False)
    except Interrupted:
        assert trainer.steps_done == 2
    else:
        raise AssertionError("not interrupted")
    trainer = t.make("raven", seed=5, **alone)
    run(trainer, 4, folder, progress=False)
    t.assert_same(trainer, whole)

    # Files that only one rank sees.
    trainer = t.make("raven", **alone)
    try:
        run(trainer, 6, sys.argv[1] + ("/stopped" if rank else "/elsewhere"), progress=False)
    except ValueError as error:
        assert "expected the same on every rank" in str(error)
    else:
        raise AssertionError("ranks at different steps")
"""


SHARDED = """
import torch
from tiny_wan import tiny_inputs, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from raven.models.sharding import shard, unsharded
from raven.repack import repacked_forward
from raven.stream import Stream
from raven.train import distributed as d

def loss(model, part):
    x_t, x_0, t, context = (v[part] for v in tiny_inputs(6, torch.float64))
    return (repacked_forward(model, x_t, x_0, t, context, 2) * x_0).mean()

with d.process_group("cpu") as device:
    rank = d.rank()
    for mode in ("none", "selective", "full"):
        plain, model = tiny_model(torch.float64), shard(tiny_model(torch.float64))
        plain.gradient_checkpointing = model.gradient_checkpointing = mode
        loss(plain, slice(None)).backward()
        for _ in range(2):  # what was gathered for the first pass is not there any more
            model.zero_grad()
            loss(model, slice(rank, rank + 1)).backward()
        for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert isinstance(got, DTensor) and got.to_local().numel() < want.numel() or want.shape[0] == 1, name
            torch.testing.assert_close(got.grad.full_tensor(), want.grad, rtol=1e-9, atol=1e-12, msg=name)

    context = tiny_inputs(1)[3]
    def video(model):
        stream = Stream(model, context, (4, 4, 4), 2, max_frames=4, generator=torch.Generator().manual_seed(3))
        return torch.cat(list(stream.generate(levels=[1.0, 0.5])), dim=2)
    with torch.no_grad():
        assert torch.equal(video(model), video(plain))
    whole = unsharded(model)
    assert (whole is None) == (rank == 1)
    if whole is not None:
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), plain.parameters(), strict=True))
    named = {name: value.full_tensor() for name, value in model.state_dict().items()}
    assert named.keys() == plain.state_dict().keys()
    assert all(torch.equal(named[name], value) for name, value in plain.state_dict().items())

    for wrong, message in ((model, "sharded already"), (torch.nn.Linear(2, 2), "expected a CausalWan")):
        try:
            shard(wrong)
        except (ValueError, TypeError) as error:
            assert message in str(error)
        else:
            raise AssertionError(message)
    whole_blocks = tiny_model()
    for block in whole_blocks.blocks:
        fully_shard(block)
    try:
        whole_blocks.encode_text(context)
    except ValueError as error:
        assert "expected raven.models.sharding.shard" in str(error)
    else:
        raise AssertionError("blocks that were sharded whole")
    try:
        d.broadcast_parameters(model)
    except ValueError as error:
        assert "sharded" in str(error)
    else:
        raise AssertionError("broadcast_parameters took shards")

    low, half = shard(tiny_model(), param_dtype=torch.bfloat16), tiny_model(torch.bfloat16)
    x_t, x_0, t, context = tiny_inputs(6)
    got, want = (repacked_forward(m, x_t, x_0, t, context, 2) for m in (low, half))
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in low.parameters())
"""


def run_two(source, tmp_path, *arguments):
    """A script in two processes that find each other; their output is in the message when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(source)
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**environment(), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
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


def environment():
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    run_two(WORKER, tmp_path, str(tmp_path))
    trainer = make("raven", trainer=RanksInTurn, accumulation=2, rollout_every=1)
    wanted = run(trainer, 4, tmp_path / "one", progress=False)
    got = read_metrics(tmp_path / "raven alone" / "metrics.jsonl")
    assert "student_norm" in wanted[-1]
    for step, record in zip(wanted, got, strict=True):
        assert record == pytest.approx(step, rel=1e-5)


def test_sharded_gradients_are_those_of_the_whole_model(tmp_path):
    """FSDP2: every mode of recomputation, streaming, and the way back to whole weights."""
    run_two(SHARDED, tmp_path)


def torchrun(*command, processes=2):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = ["--nproc-per-node", str(processes), "--master-port", str(port), "-m", "raven.cli", *map(str, command)]
    whole = [sys.executable, "-m", "torch.distributed.run", *line]
    return subprocess.run(whole, env=environment(), capture_output=True, text=True, timeout=120)


def training_files(folder):
    """Options of ``raven distill`` and ``raven grpo`` for a start, a teacher and prompts written into ``folder``."""
    save_checkpoint(folder / "teacher.safetensors", tiny(1))
    save_checkpoint(folder / "start.safetensors", tiny(0))
    PromptFile.save(folder / "prompts.safetensors", ["x", "y"], [torch.randn(2, 4), torch.randn(3, 4)])
    common = ["--prompts", folder / "prompts.safetensors", "--out", folder / "out"]
    for setting in (f"chunk_frames={list(CHUNKS)}", f"latent_shape={list(SHAPE)}", "steps=2"):
        common += ["--set", setting]
    models = ["--teacher", folder / "teacher.safetensors", "--causal-start", folder / "start.safetensors"]
    return ["distill", *models, *common], ["grpo", "--student", folder / "start.safetensors", *common]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_torchrun_distils(device, tmp_path):
    command, _ = training_files(tmp_path)
    done = torchrun(*command, "--device", device, "--set", "master_weights=true")
    assert done.returncode == 0, done.stderr
    student = tmp_path / "out" / "student.safetensors"
    assert done.stdout.split() == [str(student)]  # of rank 0 alone
    assert [record["step"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2]
    assert not torch.equal(load_model(student).head.head.weight, tiny(0).head.head.weight)


def make_failing_reward():
    def reward(video, prompts):
        if distributed.rank() == 1:
            raise ValueError("video: got a fault on purpose")
        return brightness(video, prompts)

    return reward


@pytest.mark.gpu
@two_gpus
def test_a_fault_on_one_gpu_ends_the_others(tmp_path):
    _, command = training_files(tmp_path)
    began = time.monotonic()
    done = torchrun(*command, "--device", "cuda", "--reward", f"{__name__}:make_failing_reward")
    assert done.returncode != 0 and "raven grpo: video: got a fault on purpose" in done.stderr
    assert time.monotonic() - began < 90  # torchrun itself allows the others 30 s


class Parsed(Exception):
    """Carries the parser of a command out of its ``main``."""


def test_torchrun_leaves_our_options_alone(monkeypatch):
    """It reads the whole command line, and stops at what could be short for one of its own options."""

    def stop(parser, argv):
        raise Parsed(parser)

    torchruns = get_args_parser()
    parse = torchruns.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for command in (distill, policy):
        with pytest.raises(Parsed) as parsed:
            command.main([])
        options = {option for action in parsed.value.args[0]._actions for option in action.option_strings}
        assert "--prompts" in options
        for option in options - {"--start"}:
            assert parse(["-m", "raven.cli", "distill", option, "1"]).training_script_args == ["distill", option, "1"]


def test_several_processes_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device: got 'cuda:0' under torchrun, expected 'cuda'"):
        with distributed.process_group("cuda:0"):
            pass
