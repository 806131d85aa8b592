"""What all trainers share: seeding, precision, and a state from which the next step follows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from raven.train import distributed
from raven.train.checkpointing import check_same_config, check_same_tensors
from raven.train.config import Config
from raven.train.optim import Ema, MasterWeights, adamw, clip_gradients, load_optimizer, step_seed
from raven.train.phases import phase


class BaseTrainer:
    """Counts steps, seeds them, and saves and loads what a subclass trains (see ``add_trained``).

    ``modules`` are trained weights; ``optimizers``, ``averages`` and ``masters`` go by the same names.
    """

    ignored_settings: tuple[str, ...] = ("steps", "checkpointing")  # may differ between a run and its continuation

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
        self.masters: dict[str, MasterWeights] = {}

    def add_trained(self, name: str, module: torch.nn.Module, lr: float, ema: float | None = None) -> None:
        """Train a module under ``name``: rank 0's weights everywhere, an optimizer, and an average if ``ema`` is given.

        With ``config.master_weights`` the module is cast to bfloat16 in place and its masters are trained. Raises
        ``ValueError``, with the module as it was, for one that cannot be trained so.
        """
        config = self.config
        if config.checkpointing != "model":
            if not hasattr(module, "gradient_checkpointing"):
                kind = type(module).__name__
                raise ValueError(f"checkpointing: got {config.checkpointing!r}, expected 'model': {kind} has no choice")
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{name}: got no parameter that requires a gradient, expected at least one")
        if config.checkpointing != "model":
            module.gradient_checkpointing = config.checkpointing
        distributed.broadcast_parameters(module)
        self.modules[name] = module.train()
        if config.master_weights:
            self.masters[name] = MasterWeights(module)
        self.optimizers[name] = adamw(self.trained(name), lr, config.betas, config.eps, config.weight_decay)
        if ema is not None:
            self.averages[name] = Ema(module, ema, self.masters.get(name))

    def trained(self, name: str) -> list[torch.nn.Parameter]:
        """What the optimizer of ``name`` steps: the module's parameters, or their masters."""
        return self.masters[name].parameters if name in self.masters else list(self.modules[name].parameters())

    def begin_step(self) -> None:
        """Seed the generators for the step to come: from the run's seed, the rank and the step's number alone.

        Gradients of a step that an error broke off are dropped.
        """
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            self.modules[name].zero_grad(set_to_none=True)
        seed = step_seed(self.config.seed, distributed.rank(), self.steps_done)
        self.host_generator.manual_seed(seed)
        if self.generator is not self.host_generator:
            self.generator.manual_seed(seed)

    def autocast(self, module: torch.nn.Module) -> torch.autocast:
        """bfloat16 over float32 weights on a GPU when the settings say so; a no-op on a CPU and for other weights."""
        single = next(module.parameters()).dtype == torch.float32
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.amp and single and self.device.type == "cuda"
        )

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal float32 of the shape of ``x``, from the trainer's generator."""
        return torch.randn(x.shape, generator=self.generator, device=self.device)

    def backward(self, name: str, loss: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's loss to those of ``name``, in the precision of what is stepped."""
        with phase(f"{name} backward"):
            loss.backward()
            if name in self.masters:
                self.masters[name].collect()

    def apply_gradients(self, name: str) -> torch.Tensor:
        """Average over ranks, clip, step and clear; returns the gradient norm before clipping (0-d)."""
        with phase(f"{name} optimizer"):
            if name in self.masters:  # where a loss was not passed to ``backward``
                self.masters[name].collect()
            parameters = self.trained(name)
            distributed.average_gradients(parameters)
            norm = clip_gradients(parameters, self.config.grad_clip)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad(set_to_none=True)
            if name in self.masters:
                self.masters[name].publish()
        return norm

    def update_average(self, name: str) -> None:
        """Move the average of ``name``, if it has one, towards what was just stepped."""
        if name in self.averages:
            with phase(f"{name} average"):
                self.averages[name].update()

    def averaged(self, name: str) -> torch.nn.Module:
        """A copy of a trained module with its averaged weights, in their float32, for evaluation and export."""
        module = copy.deepcopy(self.modules[name])
        if name in self.masters:
            module.float()
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
            "masters": {name: masters.state_dict() for name, masters in self.masters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises ``ValueError``, before anything is replaced, for another kind of run, other settings or other models.
        """
        if state.get("trainer") != type(self).__name__:
            raise ValueError(f"checkpoint: got one of {state.get('trainer')}, expected one of {type(self).__name__}")
        added = {name: value for name, value in type(self.config)().to_dict().items() if name in self._settings()}
        check_same_config({**added, **state["config"]}, self._settings())  # settings that are newer than the run
        self._check_tensors(state)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        for name, masters in self.masters.items():
            masters.load_state_dict(state["masters"][name])
        self.steps_done = state["steps_done"]

    def _check_tensors(self, state: dict[str, Any]) -> None:
        for kind in ("modules", "averages", "masters"):
            for name, part in getattr(self, kind).items():
                check_same_tensors(f"checkpoint: {kind}/{name}", state[kind].get(name), part.state_dict())
        for name, optimizer in self.optimizers.items():
            groups = (state["optimizers"][name]["param_groups"], optimizer.param_groups)
            saved, current = (sum(len(group["params"]) for group in kind) for kind in groups)
            if saved != current:
                raise ValueError(f"checkpoint: optimizers/{name}: got {saved} trained tensors, expected {current}")

    def _settings(self) -> dict[str, Any]:
        return {key: value for key, value in self.config.to_dict().items() if key not in self.ignored_settings}


def freeze(modules: Iterable[torch.nn.Module]) -> None:
    """Put modules into evaluation mode without gradients."""
    for module in modules:
        module.eval().requires_grad_(False)
