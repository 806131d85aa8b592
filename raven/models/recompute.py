"""What the backward pass of a block recomputes: nothing, everything but its attention, or everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from raven.models.layers import Attend, Block
from raven.ops import chunk_attention

if TYPE_CHECKING:
    from raven.layout import ChunkLayout
    from raven.models.packing import LastSegment, Packing
    from raven.spans import Spans

MODES = ("none", "selective", "full")


def checkpointing_mode(value: str | bool) -> str:
    """One of ``MODES``; ``True`` stands for "full", ``False`` for "none". ``ValueError`` for anything else."""
    if isinstance(value, bool):
        return "full" if value else "none"
    if value not in MODES:
        raise ValueError(f"gradient_checkpointing: got {value!r}, expected one of {', '.join(MODES)}, True or False")
    return value


class RecomputedBlock(Block):
    """A ``Block`` whose backward pass may run it again.

    Both runs are inside one call of the module, so what gathers its weights around that call and its backward pass, as
    FSDP does, has them ready for the second run too.
    """

    def forward(
        self,
        x: torch.Tensor,
        levels: torch.Tensor,
        lengths: Sequence[int],
        text: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        attend: Attend,
        keep: Packing | LastSegment | None = None,
        mode: str = "none",
        attention_only: bool = False,
    ) -> torch.Tensor | None:
        """As ``Block``; ``mode`` is one of ``MODES``. ``attention_only``: what ``attend`` writes is all.

        The second run may leave out what only the result's values need.

        "selective" keeps the outputs and statistics of the self-attention and recomputes the rest. The first run builds
        no graph, so it takes the paths that need none. ``attend`` must call its keyword argument ``attention`` once.
        """
        if attention_only:
            self.attention(x, self.table(levels), lengths, layer, attend)
            return None  # nothing that a hook could take for the block's result
        once = super().forward
        if mode == "none":
            return once(x, levels, lengths, text, layer, attend, keep)

        def run(x, levels, k, v, attention, output=True):
            return once(x, levels, lengths, (k, v), layer, partial(attend, attention=attention), keep, output)

        def weights() -> list[nn.Parameter]:
            return [weight for weight in self.parameters() if weight.requires_grad]

        # The weights are arguments as well: their gradients then come out of this one node.
        return _Checkpointed.apply(run, weights, mode == "selective", x, levels, *text, *weights())


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        run: Callable[..., torch.Tensor],
        weights: Callable[[], list[nn.Parameter]],
        selective: bool,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        kind = tensors[0].device.type
        # No cache: it would hand the casts of weights made here, without a graph, to whom needs their gradient.
        settings = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        ctx.autocast = partial(torch.autocast, kind, **settings, cache_enabled=False)
        ctx.run, ctx.weights, ctx.count = run, weights, len(tensors)
        attention = _Recorded() if selective else chunk_attention
        with ctx.autocast():
            out = run(*tensors[:4], attention)
        ctx.save_for_backward(*tensors, *(attention.kept if selective else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = ctx.needs_input_grad[3:]
        if [weight.data_ptr() for weight in ctx.weights()] != [weight.data_ptr() for weight in tensors[4:]]:
            raise RuntimeError(
                "gradient_checkpointing: the block has other weights in the backward pass than it had in the forward "
                "pass (torch.func.functional_call swaps them, hooks on saved tensors copy them), expected the same "
                "ones; 'none' needs no second run"
            )
        inputs = [x.detach().requires_grad_(need) for x, need in zip(tensors[:4], needed[:4], strict=True)]
        with torch.enable_grad(), ctx.autocast():
            out = ctx.run(*inputs, partial(_known_attention, *kept) if kept else chunk_attention, output=False)
        wanted = [x for x, need in zip((*inputs, *tensors[4:]), needed, strict=True) if need]
        grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        return None, None, None, *(next(grads) if need else None for need in needed)


class _Recorded:
    """``chunk_attention`` that keeps its output and log-sum-exp."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, ...] = ()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: ChunkLayout | Spans) -> torch.Tensor:
        self.kept = chunk_attention(q, k, v, layout, return_lse=True)
        return self.kept[0]


def _known_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ChunkLayout | Spans,
) -> torch.Tensor:
    """``chunk_attention(q, k, v, layout)`` whose result is known: only the backward pass runs a kernel."""
    return _KnownAttention.apply(q, k, v, out, lse, getattr(layout, "spans", layout))


class _KnownAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, out, lse, spans: Spans) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans = spans
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        spans = (ctx.spans.q_ranges, ctx.spans.kv_indptr, ctx.spans.kv_ranges)
        grads = torch.ops.raven.chunk_attention_backward(grad, None, q, k, v, out, lse, *spans, q.shape[-1] ** -0.5)
        return *grads, None, None, None
