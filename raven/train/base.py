"""What all trainers share: seeding, precision, and a state from which the next step follows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from raven.train import distributed
from raven.train.checkpointing import check_same_config
from raven.train.config import Config
from raven.train.optim import Ema, clip_gradients, load_optimizer, step_seed


class BaseTrainer:
    """Counts steps, seeds them, and saves and loads the modules, optimizers and averages that a subclass registers.

    ``modules`` are trained weights; ``optimizers`` and ``averages`` go by the same names.
    """

    ignored_settings: tuple[str, ...] = ("steps",)  # may differ between a run and its continuation

    def __init__(self, config: Config, device: torch.device | str) -> None:
        self.config = config
        self.device = torch.device(device)
        self.steps_done = 0
        self.host_generator = torch.Generator()
        on_host = self.device.type == "cpu"
        self.generator = self.host_generator if on_host else torch.Generator(self.device)
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.averages: dict[str, Ema] = {}

    def begin_step(self) -> None:
        """Seed the generators for the step to come: from the run's seed, the rank and the step's number alone."""
        seed = step_seed(self.config.seed, distributed.rank(), self.steps_done)
        self.host_generator.manual_seed(seed)
        if self.generator is not self.host_generator:
            self.generator.manual_seed(seed)

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU when the settings say so; a no-op on a CPU."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.amp and self.device.type == "cuda"
        )

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal float32 of the shape of ``x``, from the trainer's generator."""
        return torch.randn(x.shape, generator=self.generator, device=self.device)

    def apply_gradients(self, name: str) -> torch.Tensor:
        """Average over ranks, clip, step and clear; returns the gradient norm before clipping (0-d)."""
        parameters = list(self.modules[name].parameters())
        distributed.average_gradients(parameters)
        norm = clip_gradients(parameters, self.config.grad_clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return norm

    def averaged(self, name: str) -> torch.nn.Module:
        """A copy of a trained module with its averaged weights, for evaluation and export."""
        module = copy.deepcopy(self.modules[name])
        self.averages[name].copy_to(module)
        return module.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on. Tensors are references: save it before the next step."""
        return {
            "trainer": type(self).__name__,
            "config": self._settings(),
            "steps_done": self.steps_done,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; ``ValueError`` for another kind of run or other settings."""
        if state["trainer"] != type(self).__name__:
            raise ValueError(f"checkpoint: got one of {state['trainer']}, expected one of {type(self).__name__}")
        check_same_config(state["config"], self._settings())
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.steps_done = state["steps_done"]

    def _settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.to_dict().items() if key not in self.ignored_settings}


def freeze(modules: Iterable[torch.nn.Module]) -> None:
    """Put modules into evaluation mode without gradients."""
    for module in modules:
        module.eval().requires_grad_(False)
