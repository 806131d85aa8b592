"""Trainers on models of a few thousand weights, and a world of one constant a video."""

from types import SimpleNamespace

import torch

from raven.models import CausalWan, WanConfig
from raven.train import DistillConfig, PolicyConfig, PretrainConfig
from raven.train.distill import RavenTrainer
from raven.train.optim import step_seed
from raven.train.policy import CMGRPOTrainer
from raven.train.pretrain import StartTrainer, TeacherTrainer
from raven.train.prompts import WorldPrompts

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


class RanksInTurn(RavenTrainer):
    """One process that stands for two ranks of one micro-batch: it makes two, each from its rank's generators."""

    def begin_step(self):
        self.pairs = []
        for rank in range(2):
            host = torch.Generator()
            pair = (host, host if self.device.type == "cpu" else torch.Generator(self.device))
            for generator in pair:
                generator.manual_seed(step_seed(self.config.seed, rank, self.steps_done))
            self.pairs.append(pair)

    def as_next_rank(self, call, *arguments):
        self.host_generator, self.generator = self.pairs[0]
        self.pairs.reverse()
        return call(*arguments)

    def _roll_out(self):
        return self.as_next_rank(super()._roll_out)

    def _critic_batch(self, kept):
        return self.as_next_rank(super()._critic_batch, kept)

    def _student_batch(self, kept):
        return self.as_next_rank(super()._student_batch, kept)


def make(kind, seed=0, trainer=RavenTrainer, **changes):
    """A small trainer of each kind; ``trainer`` is the class of a "raven" one."""
    if kind in ("teacher", "start"):
        settings = {"batch": 2, "warmup": 2, "steps": 6, "lr": 3e-3, **SIZES, **changes}
        kind = TeacherTrainer if kind == "teacher" else StartTrainer
        return kind(tiny(seed), World(), PretrainConfig(**settings))
    if kind == "raven":
        rates = {"student_lr": 1e-3, "critic_lr": 1e-3}
        settings = {"batch": 2, "accumulation": 2, "rollout_every": 2, **rates, **SIZES, **changes}
        return trainer(tiny(seed), tiny(100), PROMPTS, DistillConfig(**settings))
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
