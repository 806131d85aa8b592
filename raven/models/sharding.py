"""Weights spread over the GPUs of a process group (PyTorch's FSDP2), for models that one GPU does not train."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from raven.models.wan import CausalWan


def shard(model: CausalWan, mesh: DeviceMesh | None = None, param_dtype: torch.dtype | None = None) -> CausalWan:
    """Apply ``torch.distributed.fsdp.fully_shard`` to a ``CausalWan``, block by block, in place; returns the model.

    Every rank must hold the same weights and takes other samples; after a backward pass the gradients are the shards of
    their mean over the ranks. All modes of ``gradient_checkpointing`` work: a block's weights are gathered before it is
    run again. So does ``encode_text`` by itself, and with it ``raven.stream``. An optimizer is made afterwards, from
    the sharded parameters.

    A model on the CPU moves to the mesh's device a block at a time, so no GPU holds it whole.

    mesh: 1-D (2-D: replicated, then sharded); default all ranks of the default process group. param_dtype: what the
    gathered weights are cast to, such as ``torch.bfloat16`` over float32 shards; gradients are averaged in float32
    then. Raises ``TypeError`` for another model, as a wrapped one; ``ValueError`` for one that is sharded.
    """
    if not isinstance(model, CausalWan):
        raise TypeError(f"model: got {type(model).__name__}, expected a CausalWan")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model: got one that is sharded already, expected whole weights")
    reduce_dtype = None if param_dtype is None else torch.float32
    # Levels and modulations stay in float32, so inputs are left as they come.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.blocks:
        # Called for all layers before the first block is: apart, so that this does not gather a whole block.
        text = block.cross_attn
        norms = [] if isinstance(text.norm_k, nn.Identity) else [text.norm_k]
        fully_shard([text.k, *norms], mesh=mesh, mp_policy=policy)
        fully_shard(text.v, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode_text")
    return model


@torch.no_grad()
def unsharded(model: CausalWan) -> CausalWan | None:
    """A copy of a model that ``shard`` spread out, on the CPU of rank 0, to save or evaluate; ``None`` elsewhere.

    Every rank has to call it. Raises ``ValueError`` for a model that is not sharded.
    """
    if not isinstance(model, FSDPModule):
        raise ValueError("model: got whole weights, expected a model that raven.models.sharding.shard was given")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward without gradients gathered is still there
    first = dist.get_rank() == 0
    whole = None
    if first:
        with torch.device("meta"):
            whole = CausalWan(model.config).to(model.dtype)
        whole.to_empty(device="cpu")
        copies = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        full = weight.full_tensor()  # of one parameter at a time
        if first:
            copies[name].copy_(full)
    return whole
