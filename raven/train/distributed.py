"""Data parallelism under ``torchrun``: every function is a no-op in a single process.

Trainers are data parallel in the plainest way: the same weights everywhere, other prompts and other noise on every
rank (the seed of a step depends on the rank), and one all-reduce of all gradients per optimizer step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without ``torchrun``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and draws progress bars."""
    return rank() == 0


@contextmanager
def process_group(device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Join the process group that ``torchrun`` describes, if it does, and yield this process's device.

    NCCL on GPUs (one per process), gloo on CPUs. ``device``: ``"cpu"``, ``"cuda"`` or None for what there is. Raises
    ``ValueError`` for another device, when CUDA is asked for and there is none, when there are more local processes
    than GPUs, or when several processes are to share one GPU (``"cuda:0"``). After an error inside, NCCL's connections
    are cut instead of closed: closing waits for the other ranks, who may be waiting for this one.
    """
    try:
        kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected 'cpu' or 'cuda'") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, expected 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', expected 'cpu' (PyTorch sees no GPU)")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        index = torch.device(device).index if device is not None else None
        if index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"device: got {device!r} under torchrun, expected 'cuda' (each process takes the GPU of its LOCAL_RANK)"
            )
        index = local if index is None else index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device: got cuda:{index}, expected an index below {torch.cuda.device_count()}")
        torch.cuda.set_device(index)
        chosen = torch.device("cuda", index)
    else:
        chosen = torch.device(kind)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield chosen
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=chosen if kind == "cuda" else None)
    try:
        yield chosen
    except BaseException:
        if kind == "cuda":
            dist.group.WORLD.abort()
        raise
    finally:
        dist.destroy_process_group()


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1).float() for t in tensors])


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


@torch.no_grad()
def broadcast_parameters(module: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0. ``ValueError`` for sharded ones, which differ rightly."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):
            raise ValueError(f"module: got {name} sharded over the ranks, expected whole weights on every rank")
    if world_size() == 1:
        return
    tensors = [t.data for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()]
    flat = _flat(tensors)
    dist.broadcast(flat, src=0)
    _unflatten(flat, tensors)


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks, in one flat float32 all-reduce.

    A parameter without a gradient counts as zero, so that ranks whose graphs differ still agree on the layout.
    """
    if world_size() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in trained]
    flat = _flat(grads)
    dist.all_reduce(flat)
    _unflatten(flat / world_size(), grads)


def gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate a ``[B, ...]`` tensor of every rank (all the same shape) in rank order."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def average(values: Mapping[str, float | torch.Tensor], device: torch.device | str = "cpu") -> dict[str, float]:
    """Every number (0-d tensors too) as its mean over all ranks, which must give the same names in the same order."""
    if world_size() == 1 or not values:
        return {name: float(value) for name, value in values.items()}
    flat = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()])
    dist.all_reduce(flat)
    return dict(zip(values, (flat / world_size()).tolist(), strict=True))


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether ``flag`` holds on at least one rank; every rank gets the same answer."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device)
    dist.all_reduce(votes)
    return bool(votes.item() > 0)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
