"""The MLP of a block: its hidden layer is the largest tensor of the model, so as few of them live as possible."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)


class Mlp(nn.Sequential):
    """Linear, tanh-GELU, linear: ``[..., dim]`` -> the same; parameters ``0`` and ``2`` as in ``nn.Sequential``.

    Without gradients bias and GELU run in the first matrix product's epilogue on a GPU, in float32 before the hidden
    layer is rounded; with them its input to the GELU is rounded and kept. Linear layers of another class (quantised
    ones) are called as they are.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, _, last = self
        if type(first) is not nn.Linear or type(last) is not nn.Linear:
            return super().forward(x)
        tensors = (x, first.weight, first.bias, last.weight, last.bias)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if autocast:
                tensors = tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
            return _MlpFunction.apply(*tensors)
        # On a CPU the activation of this call is another one, the exact GELU.
        if x.is_cuda and not autocast and x.dtype in _HALF and x.dtype == first.weight.dtype and x.numel():
            hidden = torch._addmm_activation(first.bias, x.flatten(0, -2), first.weight.t(), use_gelu=True)
            return last(hidden).unflatten(0, x.shape[:-1])
        return super().forward(x)


class _MlpFunction(torch.autograd.Function):
    """Keeps the hidden layer before the GELU and recomputes the one after it; two are alive at most."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor, w_out: torch.Tensor, b_out: torch.Tensor
    ) -> torch.Tensor:
        hidden = F.linear(x, w_in, b_in)
        ctx.save_for_backward(x, hidden, w_in, w_out)
        return F.linear(F.gelu(hidden, approximate="tanh"), w_out, b_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, hidden, w_in, w_out = ctx.saved_tensors
        need_x, *need_in, need_w_out, need_b_out = ctx.needs_input_grad
        shape, x, hidden, grad = x.shape, x.flatten(0, -2), hidden.flatten(0, -2), grad.flatten(0, -2)
        dx = dw_in = db_in = None
        dw_out = grad.t() @ F.gelu(hidden, approximate="tanh") if need_w_out else None
        db_out = grad.sum(0) if need_b_out else None
        if need_x or any(need_in):
            dh = grad @ w_out
            torch.ops.aten.gelu_backward.grad_input(dh, hidden, approximate="tanh", grad_input=dh)
            dw_in = dh.t() @ x if need_in[0] else None
            db_in = dh.sum(0) if need_in[1] else None
            dx = (dh @ w_in).view(shape) if need_x else None
        return dx, dw_in, db_in, dw_out, db_out
