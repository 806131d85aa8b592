"""The MLP of a block: its hidden layer is the largest tensor of the model, so as few of them live as possible."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from raven import backends
from raven.models.fp8 import Float8Rows
from raven.ops import gated_residual

_HALF = (torch.bfloat16, torch.float16)
SEGMENT = 2048  # fewest tokens of a segment for which products by segment cost less than the output of the MLP
GROUP = 7  # segments whose products live at once


class Mlp(nn.Sequential):
    """Linear, tanh-GELU, linear: ``[B, L, dim]`` -> the same; parameters ``0`` and ``2`` as in ``nn.Sequential``.

    On a GPU bias and GELU of 16-bit layers run in the first matrix product's epilogue, in float32 before the hidden
    layer is rounded. The backward pass then has no input of the GELU and computes it again, so that a forward pass
    gives the same bits with and without gradients. Linear layers of another class (quantised ones) are called as they
    are.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    @property
    def is_plain(self) -> bool:
        """Whether both layers are what they were made as and nobody listens, so that their weights say all."""
        return all(
            type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
            for layer in (self[0], self[2])
        )

    def tensors(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x``, then weight and bias of both layers, in the dtype that matrix products have under autocast."""
        tensors = (x, self[0].weight, self[0].bias, self[2].weight, self[2].bias)
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return tensors
        return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_plain:
            return super().forward(x)
        fused = x.is_cuda and x.dtype in _HALF and x.dtype == self[0].weight.dtype and x.numel() > 0
        fused = fused and not torch.is_autocast_enabled("cuda")
        if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in self.parameters())):
            return _MlpFunction.apply(*self.tensors(x), fused)
        return self[2](_epilogue(x, self[0].weight, self[0].bias)) if fused else super().forward(x)


def _epilogue(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU (tanh form) of a linear layer in one call. Not on a CPU, where this call means the exact GELU."""
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


def gated_mlp(
    x: torch.Tensor,
    mlp: nn.Module,
    y: torch.Tensor | Float8Rows,
    gate: torch.Tensor,
    lengths: Sequence[int],
    output: bool = True,
) -> torch.Tensor:
    """``x + gate * mlp(y)``: x, y ``[B, L, C]``, gate ``[B, N, C]`` for N segments of the given lengths.

    output: ``False`` when only the gradient of the result will be used, as in a recomputation. Its values are then
    undefined, and the last matrix product is left out where segments are long.
    """
    if output or not isinstance(mlp, Mlp) or not mlp.is_plain:
        return gated_residual(x, mlp(y), gate, lengths)
    if min(lengths) < SEGMENT:
        return gated_residual(x, _MlpFunction.apply(*mlp.tensors(y), False), gate, lengths)
    return _GradientOnly.apply(x, gate, *mlp.tensors(y), tuple(lengths))


class _MlpFunction(torch.autograd.Function):
    """Keeps the hidden layer before the GELU, or nothing of it where that is ``fused``; two are alive at most."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        w_in: torch.Tensor,
        b_in: torch.Tensor,
        w_out: torch.Tensor,
        b_out: torch.Tensor,
        fused: bool,
    ) -> torch.Tensor:
        hidden = None if fused else F.linear(x, w_in, b_in)
        ctx.save_for_backward(x, hidden, w_in, b_in, w_out)
        active = _epilogue(x, w_in, b_in) if fused else F.gelu(hidden, approximate="tanh")
        return F.linear(active, w_out, b_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden, w_in, b_in, w_out = ctx.saved_tensors
        if hidden is None:
            hidden = F.linear(x, w_in, b_in)
        need = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        dw_out = rows.t() @ F.gelu(hidden, approximate="tanh").flatten(0, -2) if need[3] else None
        db_out = rows.sum(0) if need[4] else None
        return *_first_layer(grad, x, hidden, w_in, w_out, need[:3]), dw_out, db_out, None


def block_kernels(*tensors: torch.Tensor) -> ModuleType | None:
    """The Triton kernels of the backward pass where they take these tensors."""
    if backends.get_backend() not in (None, "triton") or backends.triton_reason(*tensors) is not None:
        return None
    return import_module("raven.kernels.block_backward")


def _first_layer(grad, x, hidden, w_in, w_out, need) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the input, the first weight and the first bias, from that of the MLP's output."""
    if not any(need):
        return None, None, None
    dh, hidden, rows = grad.flatten(0, -2) @ w_out, hidden.flatten(0, -2), x.flatten(0, -2)
    if kernels := block_kernels(dh, hidden):
        db = kernels.gelu_backward(hidden, dh).to(w_in.dtype)
    else:
        torch.ops.aten.gelu_backward.grad_input(dh, hidden, approximate="tanh", grad_input=dh)
        db = dh.sum(0) if need[2] else None
    dx = (dh @ w_in).view(x.shape) if need[0] else None
    return dx, dh.t() @ rows if need[1] else None, db if need[2] else None


class _GradientOnly(torch.autograd.Function):
    """``gated_mlp`` without its values.

    The gate's gradient is the sum over a segment's tokens of ``grad * (hidden @ w_out.T + b_out)``, so it follows from
    the product ``grad.T @ hidden`` of the segment, and these products, weighted by the gates, add up to the gradient
    of ``w_out``. The output itself, a matrix product as large, is not needed.
    """

    @staticmethod
    def forward(ctx, x, gate, y, w_in, b_in, w_out, b_out, lengths: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(y, F.linear(y, w_in, b_in), gate, w_in, w_out, b_out)
        ctx.lengths = lengths
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, hidden, gate, w_in, w_out, b_out = ctx.saved_tensors
        need = ctx.needs_input_grad
        lengths = ctx.lengths if len(set(ctx.lengths)) > 1 else None
        (branch,) = torch.ops.raven.gated_residual_backward(
            grad, None, None, None, None, gate, None, lengths, grad.dtype, y.dtype, [False, True, False, False, False]
        )
        dgate = dw_out = db_out = None
        if need[1] or need[5] or need[6]:
            dgate, dw_out, db_out = _by_segment(grad, hidden, gate, w_out, b_out, ctx.lengths)
        grads = _first_layer(branch, y, hidden, w_in, w_out, need[2:5])
        return grad, dgate, *grads, dw_out, db_out, None


def _by_segment(grad, hidden, gate, w_out, b_out, lengths) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the gate, the last weight and the last bias."""
    wide = torch.float64 if w_out.dtype == torch.float64 else torch.float32
    sums = torch.stack([part.sum(1, dtype=wide) for part in grad.split(lengths, dim=1)], dim=1)  # [B, N, C]
    gates = gate.flatten(0, 1).to(wide).contiguous()  # rows of a table of six lie apart
    dgate, dweight = (
        torch.empty(gates.shape, dtype=wide, device=gates.device),
        torch.empty(w_out.shape, dtype=wide, device=gates.device),
    )
    lengths *= grad.shape[0]  # of the segments of all samples, one after the other
    groups = [lengths[i : i + GROUP] for i in range(0, len(lengths), GROUP)]
    tensors = (grad.to(w_out.dtype), F.gelu(hidden, approximate="tanh"))
    rows = (t.flatten(0, 1).split([sum(group) for group in groups]) for t in tensors)
    kernels = block_kernels(w_out)
    for i, (group, left, right) in enumerate(zip(groups, *rows, strict=True)):
        part = slice(i * GROUP, i * GROUP + len(group))
        products = _products(left, right, group, wide)
        if kernels:
            kernels.weigh_products(products, w_out, gates[part], dgate[part], dweight, i == 0)
            continue
        dgate[part] = torch.einsum("sck,ck->sc", products, w_out.to(wide))
        weighted = torch.einsum("sck,sc->ck", products, gates[part])
        dweight = weighted if i == 0 else dweight + weighted
    dgate = dgate.view_as(sums) + b_out * sums
    db_out = (gates.view_as(sums) * sums).sum((0, 1))
    return dgate.to(gate.dtype), dweight.to(w_out.dtype), db_out.to(b_out.dtype)


def _products(left: torch.Tensor, right: torch.Tensor, lengths: Sequence[int], wide: torch.dtype) -> torch.Tensor:
    """``left.T @ right`` for each run of rows, not rounded to their dtype: ``[L, C]``, ``[L, K]`` to ``[n, C, K]``."""
    options = {"out_dtype": wide} if left.is_cuda and left.dtype in _HALF else {}
    if not options:
        left, right = left.to(wide), right.to(wide)
    if len(set(lengths)) == 1:
        left, right = (t.unflatten(0, (len(lengths), -1)) for t in (left, right))
        return torch.bmm(left.transpose(1, 2), right, **options)
    pairs = zip(*(t.split(lengths) for t in (left, right)), strict=True)
    return torch.stack([torch.mm(a.t(), b, **options) for a, b in pairs])
