"""Optimizers, learning rates, moving averages and seeds, in forms that a CUDA graph can hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch

from raven.train.checkpointing import check_same_tensors


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed of one training step on one rank.

    Trainers seed their generators anew at every step, so the randomness of step n does not depend on what was drawn
    before it, and a checkpoint needs no generator states.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.0, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require gradients; on a GPU its rate is a tensor (see ``set_lr``)."""
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("parameters: got none that requires a gradient, expected at least one")
    cuda = trained[0].is_cuda
    rate = torch.tensor(lr, device=trained[0].device) if cuda else lr
    return torch.optim.AdamW(
        trained, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True, capturable=cuda
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor that a CUDA graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer state, keeping the learning rate where (number, or tensor on its device) it lives."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        loaded = float(group["lr"])
        group["lr"] = rate.fill_(loaded) if isinstance(rate, torch.Tensor) else loaded


def warmup_cosine(step: int, steps: int, warmup: int, lr: float, final: float = 0.0) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up to ``lr``, then a cosine to ``final * lr``."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float | None) -> torch.Tensor:
    """Clip the global gradient norm to ``limit`` (None: only measure it); returns the norm before, a 0-d tensor."""
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained], foreach=True)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm, foreach=True)
    return norm


class MasterWeights:
    """Float32 values of the parameters of a module that computes in bfloat16.

    Making it casts the module in place. An optimizer steps ``parameters``: updates far below the spacing of bfloat16
    add up there. Around it, ``collect`` after every backward pass adds the module's gradients to those of the masters,
    in float32, and ``publish`` rounds the masters back into the module.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self._live = list(module.parameters())
        # Float32 values move here as they are: the cast below gives the module new memory.
        self.parameters = [torch.nn.Parameter(p.detach().float(), requires_grad=p.requires_grad) for p in self._live]
        module.to(dtype)

    @torch.no_grad()
    def collect(self) -> None:
        """Move the module's gradients into those of the masters, one by one: each is freed before the next is made."""
        for live, master in zip(self._live, self.parameters, strict=True):
            if live.grad is None:
                continue
            if master.grad is None:
                master.grad = live.grad.float()
            else:
                master.grad += live.grad
            live.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module."""
        torch._foreach_copy_([p.data for p in self._live], [p.data for p in self.parameters])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name of every parameter -> its master."""
        return {name: p.detach() for name, p in zip(self.names, self.parameters, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what ``state_dict`` gave, in place, into the masters and the module; ``ValueError`` for another's."""
        check_same_tensors("masters", state, self.state_dict())
        torch._foreach_copy_([p.data for p in self.parameters], [state[name] for name in self.names])
        self.publish()


class Ema:
    """Exponential moving average of a module's parameters, in float32.

    ``update`` is one fused operation. The average starts at the module's values when it is made. With ``masters`` it
    follows those: bfloat16 would hide from it what a step changes.
    """

    def __init__(self, module: torch.nn.Module, decay: float, masters: MasterWeights | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1)")
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self._live = [p.data for p in (module.parameters() if masters is None else masters.parameters)]
        self.average = [p.float().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's current parameters."""
        live = [p if p.dtype == torch.float32 else p.float() for p in self._live]
        torch._foreach_lerp_(self.average, live, 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Write the average into the parameters of ``module``; ``ValueError`` for another architecture's."""
        check_same_tensors("module", dict(module.named_parameters()), self.state_dict())
        torch._foreach_copy_([p.data for p in module.parameters()], self.average)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name of every parameter -> its average."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what ``state_dict`` gave, in place; ``ValueError`` for another's."""
        check_same_tensors("ema", state, self.state_dict())
        torch._foreach_copy_(self.average, [state[name] for name in self.names])
