"""Public op: LayerNorm, then scale and shift from one row of a table for each segment of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_shape
from raven.ops.gated_residual import (
    DTYPES,
    check_norm,
    check_quantize,
    check_tables,
    empty_quantized,
    empty_statistics,
    gradients,
    in_one_pass,
    triton_reason,
)
from raven.ops.gaussian_step import direct
from raven.ops.quantize_rows import quantize_rows
from raven.reference import modulate as reference


def modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    lengths: Sequence[int] | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    quantize: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``LayerNorm(x) * (1 + scale) + shift`` without a learned affine; differentiable in every tensor.

    How a diffusion transformer tells a sub-layer the noise level (arXiv 2212.09748). One pass over memory, computed in
    float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: ``[B, L, C]``, bfloat16, float16, float32, or float64 (on the reference only). Packed channels are read in
            place whatever the other strides.
        shift, scale: ``[B, N, C]``, any of these dtypes, one row for each of N segments of tokens (slices of a table
            ``[B, N, 6, C]`` are read in place).
        lengths: tokens of each segment, N numbers that sum to L; ``None``: N segments of one length.
        eps: added to the variance.
        dtype: of the result; ``None``: that of ``x``.
        quantize: the result in float8 with a scale for each token, bit for bit ``quantize_rows`` of the result in that
            dtype, in the same pass. For inference: no tensor may ask for a gradient.

    Returns:
        ``y``, or quantised ``(y, y_scale)``: new packed tensors like ``x``, of which a quantised ``y`` is float8_e4m3fn
        and ``y_scale`` ``[B, L]`` float32. On a GPU a token gives the same bits alone and in a batch; gradients of
        shift and scale are summed in float32 in an order that only the shapes decide.

    Raises:
        ValueError: shapes, devices, lengths, eps; ``quantize`` where a gradient is asked for.
        TypeError: an unsupported dtype.
        NotImplementedError: forward-mode derivatives.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_shape("x", x, ("B", "L", "C"))
    check_dtype("x", x, DTYPES)
    check_shape("shift", shift, (x.shape[0], "N", x.shape[2]))
    check_shape("scale", scale, tuple(shift.shape))
    lengths = check_tables(x, {"shift": shift, "scale": scale}, lengths)
    check_norm(x, eps, dtype)
    check_no_tangent("modulate", x, shift, scale)
    tensors = (x, shift, scale)
    norm = (lengths, float(eps), dtype or x.dtype)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = direct(*tensors) and not differentiated
    if quantize:
        check_quantize(True, differentiated)
        return (_run_quantized if plain else _modulate_quantized)(*tensors, *norm)
    return (_run if plain else _modulate)(*tensors, *norm)[0]


def _run(x, shift, scale, lengths, eps, dtype):
    """``(y, statistics)``."""
    if backends.select("modulate", x, shift, scale) == "reference":
        return reference.modulate(x, shift, scale, lengths, eps, dtype)
    from raven.kernels.modulate import forward

    return forward(x, shift, scale, lengths, eps, dtype)


def _run_quantized(x, shift, scale, lengths, eps, dtype):
    """``(y, its scales)``."""
    if in_one_pass("modulate", dtype, x, shift, scale):
        from raven.kernels.modulate import forward

        return forward(x, shift, scale, lengths, eps, dtype, quantize=True)
    return quantize_rows(_run(x, shift, scale, lengths, eps, dtype)[0])


@torch.library.custom_op("raven::modulate_quantized", mutates_args=())
def _modulate_quantized(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    lengths: Sequence[int] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_quantized(x, shift, scale, lengths, eps, dtype)


@_modulate_quantized.register_fake
def _(x, shift, scale, lengths, eps, dtype):
    return empty_quantized(x)


@torch.library.custom_op("raven::modulate", mutates_args=())
def _modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    lengths: Sequence[int] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(x, shift, scale, lengths, eps, dtype)


@_modulate.register_fake
def _(x, shift, scale, lengths, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), empty_statistics(x, shift, scale)


def _setup_context(ctx, inputs, output):
    x, shift, scale, ctx.lengths, _, _ = inputs
    _, stats = output
    ctx.dtypes = (x.dtype, x.dtype, None, shift.dtype, scale.dtype)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(x, stats, scale)


def _autograd(ctx, grad_y, _):
    x, stats, scale = ctx.saved_tensors
    need_x, *need_tables = ctx.needs_input_grad[:3]
    grads = gradients(ctx, None, grad_y, x, stats, None, None, scale, (need_x, False, False, *need_tables))
    # lengths, eps and dtype take no gradient.
    return grads[0], *grads[3:], None, None, None


_modulate.register_autograd(_autograd, setup_context=_setup_context)
backends.register("modulate", triton=triton_reason, reference=backends.always)
