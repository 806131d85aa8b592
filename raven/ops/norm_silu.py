"""Public op: RMS norm and SiLU of rows in one pass, as convolutional video decoders have them before a convolution."""

from __future__ import annotations

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.reference import norm_silu as reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# A program of the kernel holds a whole row.
MAX_CHANNELS = 16384


def norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``silu(s / rms(s) * weight)`` of every row of ``s = x + bias + residual``; without a weight, s itself.

    ``rms(s)`` is the root of the mean of the squares (arXiv 1910.07467), ``silu(y) = y / (1 + exp(-y))``. One pass
    over memory, computed in float32 (float64 for float64) and rounded once.

    Args:
        x: ``[..., C]``, bfloat16, float16, float32, or float64 (on the reference only).
        weight: ``[C]`` in x's dtype, or ``None``.
        bias: ``[C]`` in x's dtype, such as a convolution's that was left out of it.
        residual: as x.
        out: where the result goes, shaped as x; may be x or residual, but no part of them. With more channels than x,
            those beyond become zero, as a convolution over padded channels wants them. ``None``: new memory, packed.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes or devices do not fit, x has no channels, or a gradient is asked for: there is none.
        TypeError: an unsupported dtype, or not x's.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_dtype("x", x, DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., C] with at least one channel")
    for name, other, shape in (
        ("weight", weight, tuple(x.shape[-1:])),
        ("bias", bias, tuple(x.shape[-1:])),
        ("residual", residual, tuple(x.shape)),
        ("out", out, (*x.shape[:-1], "C")),
    ):
        if other is not None:
            check_shape(name, other, shape)
            check_dtype(name, other, (x.dtype,))
            check_same_device(name, other, "x", x)
    if out is not None and out.shape[-1] < x.shape[-1]:
        raise ValueError(f"out: got {out.shape[-1]} channels, expected at least x's {x.shape[-1]}")
    check_no_tangent("norm_silu", x, weight, bias, residual)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual), ("out", out)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_silu(x, weight, bias, residual, out)
    return out


@torch.library.custom_op("raven::norm_silu", mutates_args=("out",))
def _norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if backends.select("norm_silu", x, out, weight, bias, residual) == "triton":
        from raven.kernels.norm_silu import forward
    else:
        forward = reference.norm_silu
    forward(x, out, weight, bias, residual)


@_norm_silu.register_fake
def _(x, weight, bias, residual, out):
    return None


def _triton_reason(x: object = None, out: object = None, *others: object) -> str | None:
    for name, tensor in (("x", x), ("out", out)):
        if isinstance(tensor, torch.Tensor) and not 1 <= tensor.shape[-1] <= MAX_CHANNELS:
            return f"{name} has rows of {tensor.shape[-1]} channels, not 1 to {MAX_CHANNELS}"
    for name, tensor in zip(("x", "out", "weight", "bias", "residual"), (x, out, *others), strict=False):
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}, and rows must be packed"
    return backends.triton_reason(x, out, *others)


backends.register("norm_silu", triton=_triton_reason, reference=backends.always)
