"""Public op: residual plus a gated branch and, in the same pass, the LayerNorm that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops.gaussian_step import direct
from raven.ops.quantize_rows import quantize_rows
from raven.reference import gated_residual as reference
from raven.schedule import compute_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_CHANNELS = 16384


def gated_residual(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    *,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    quantize: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``x_new = x + gate * branch``, and on request ``y``, the LayerNorm of ``x_new``; differentiable in every tensor.

    How the sub-layers of a diffusion transformer meet (arXiv 2212.09748): with ``n = (x_new - mean) / sqrt(var + eps)``
    over the channels, ``y = n * (1 + scale) + shift`` or ``y = n * weight + bias``. One pass over memory, computed in
    float32 (float64 for float64 inputs); ``x_new`` is rounded once to the dtype of ``x``, and normalised as rounded.

    Args:
        x: ``[B, L, C]``, bfloat16, float16, float32, or float64 (on the reference only). Packed channels are read in
            place whatever the other strides.
        branch: ``[B, L, C]``, any of these dtypes.
        gate: ``[B, N, C]``, any of these dtypes, one row for each of N segments of tokens (a slice of a table
            ``[B, N, 6, C]`` is read in place). ``None``: 1.
        lengths: tokens of each segment, N numbers that sum to L; ``None``: N segments of one length.
        shift, scale: ``[B, N, C]``, both or none: ask for ``y``.
        weight, bias: ``[C]``, both or none, and not with shift and scale: ask for ``y``.
        eps: added to the variance.
        dtype: of ``y``; ``None``: that of ``x``.
        quantize: ``y`` in float8 with a scale for each token, bit for bit ``quantize_rows`` of ``y`` in that dtype, in
            the same pass. For inference: no tensor may ask for a gradient.

    Returns:
        ``x_new``, or ``(x_new, y)``, or quantised ``(x_new, y, y_scale)``: new packed tensors like ``x``, of which a
        quantised ``y`` is float8_e4m3fn and ``y_scale`` ``[B, L]`` float32. On a GPU a token gives the same
        bits alone and in a batch; gradients of gate, shift, scale, weight and bias are summed in float32 in an order
        that only the shapes decide.

    Raises:
        ValueError: shapes, devices, lengths, eps, or a choice of norms that does not fit; ``quantize`` without a norm
            or where a gradient is asked for.
        TypeError: an unsupported dtype.
        NotImplementedError: forward-mode derivatives.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_shape("x", x, ("B", "L", "C"))
    check_dtype("x", x, DTYPES)
    check_shape("branch", branch, tuple(x.shape))
    check_dtype("branch", branch, DTYPES)
    check_same_device("branch", branch, "x", x)
    if weight is not None or bias is not None:
        if shift is not None or scale is not None:
            raise ValueError("weight, bias: got them together with shift or scale, expected one of the two pairs")
        shift, scale, names = bias, weight, ("bias", "weight")
    else:
        names = ("shift", "scale")
    if (shift is None) != (scale is None):
        missing, given = names if shift is None else names[::-1]
        raise ValueError(f"{missing}: got None together with {given}, expected both or none")
    tables = {"gate": gate, names[0]: shift, names[1]: scale}
    lengths = check_tables(x, tables, lengths)
    check_norm(x, eps, dtype)
    check_no_tangent("gated_residual", x, branch, gate, shift, scale)
    tensors = [t for t in (x, branch, gate, shift, scale) if t is not None]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    plain = direct(*tensors) and not differentiated
    if quantize:
        check_quantize(scale is not None, differentiated)
        run = _run_quantized if plain else _gated_residual_quantized
        return run(x, branch, gate, shift, scale, lengths, float(eps), dtype or x.dtype)
    if scale is None:
        return (_run if plain else _gated_residual)(x, branch, gate, lengths)
    norm = (shift, scale, lengths, float(eps), dtype or x.dtype)
    if plain:
        return _run_with_norm(x, branch, gate, *norm)[:2]
    return _gated_residual_norm(x, branch, gate, *norm)[:2]


def check_tables(
    x: torch.Tensor, tables: dict[str, torch.Tensor | None], lengths: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Check tables ``[B, N, C]`` (weight and bias: ``[C]``) and lengths; ``None`` for segments of one length."""
    B, L, C = x.shape
    segments, owner = None, ""
    for name, table in tables.items():
        if table is None:
            continue
        if name in ("weight", "bias"):
            check_shape(name, table, (C,))
        elif segments is None:
            check_shape(name, table, (B, "N", C))
            segments, owner = table.shape[1], name
        else:
            check_shape(name, table, (B, segments, C))
        check_dtype(name, table, DTYPES)
        check_same_device(name, table, "x", x)
    if segments is None:
        return None
    if segments == 0:
        raise ValueError(f"{owner}: got no segment, expected at least one row")
    if lengths is None:
        if L % segments:
            raise ValueError(f"lengths: got None for {L} tokens and {segments} segments, expected a length for each")
        return None
    lengths = tuple(lengths)
    if any(isinstance(n, float) for n in lengths):
        raise TypeError(f"lengths: got {lengths}, expected integers")
    if len(lengths) != segments or sum(lengths) != L or min(lengths) < 0:
        raise ValueError(f"lengths: got {lengths}, expected {segments} lengths that sum to {L}")
    return None if min(lengths) == max(lengths) else lengths


def check_norm(x: torch.Tensor, eps: float, dtype: torch.dtype | None) -> None:
    """The checks of a norm over the channels that ``modulate`` and ``gated_residual`` share."""
    if x.shape[2] == 0:
        raise ValueError("x: got 0 channels, expected at least 1")
    if not 0 <= eps < math.inf:  # math.isfinite does not trace with dynamic shapes
        raise ValueError(f"eps: got {eps}, expected a finite number that is not negative")
    if dtype is not None and dtype not in DTYPES:
        takes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"dtype: got {dtype}, expected {takes}")


def check_quantize(norm: bool, differentiated: bool) -> None:
    """Only a norm's result is quantised, and rounding has no gradient."""
    if not norm:
        raise ValueError("quantize: got True without a norm, expected shift and scale, or weight and bias")
    if differentiated:
        raise ValueError("quantize: got True for tensors with requires_grad=True, expected torch.no_grad()")


def in_one_pass(op: str, dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether the kernel of a norm quantises its result of that dtype too: where both ops run on Triton."""
    if dtype == torch.float64 or backends.select(op, *tensors) != "triton":
        return False
    return backends.select("quantize_rows", tensors[0]) == "triton"


def triton_reason(x: object, *others: object) -> str | None:
    """Why the Triton kernels of ``modulate`` and ``gated_residual`` cannot run on these tensors, or ``None``."""
    if isinstance(x, torch.Tensor) and x.shape[-1] > MAX_CHANNELS:
        return f"x has {x.shape[-1]} channels, more than {MAX_CHANNELS}"
    return backends.triton_reason(x, *others)


def _run(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, lengths: Sequence[int] | None
) -> torch.Tensor:
    if backends.select("gated_residual", x, branch, gate) == "reference":
        return reference.gated_sum(x, branch, gate, lengths)
    from raven.kernels import gated_residual as kernels

    return kernels.forward(x, branch, gate, None, None, lengths, 0.0, None)[0]


def _run_with_norm(x, branch, gate, shift, scale, lengths, eps, dtype):
    """``(x_new, y, statistics)``."""
    if backends.select("gated_residual", x, branch, gate, shift, scale) == "reference":
        return reference.gated_residual(x, branch, gate, shift, scale, lengths, eps, dtype)
    from raven.kernels import gated_residual as kernels

    return kernels.forward(x, branch, gate, shift, scale, lengths, eps, dtype)


@torch.library.custom_op("raven::gated_residual", mutates_args=())
def _gated_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None, lengths: Sequence[int] | None
) -> torch.Tensor:
    return _run(x, branch, gate, lengths)


@_gated_residual.register_fake
def _(x, branch, gate, lengths):
    return x.new_empty(x.shape)


@torch.library.custom_op("raven::gated_residual_norm", mutates_args=())
def _gated_residual_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    lengths: Sequence[int] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _run_with_norm(x, branch, gate, shift, scale, lengths, eps, dtype)


@_gated_residual_norm.register_fake
def _(x, branch, gate, shift, scale, lengths, eps, dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), empty_statistics(x, shift, scale)


def empty_statistics(x: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
    """Room for mean and 1 / standard deviation of each token, ``[B, L, 2]``."""
    return x.new_empty((x.shape[0], x.shape[1], 2), dtype=compute_dtype(x, *tables))


def _run_quantized(x, branch, gate, shift, scale, lengths, eps, dtype):
    """``(x_new, y, scales of y)``."""
    if in_one_pass("gated_residual", dtype, x, branch, gate, shift, scale):
        from raven.kernels import gated_residual as kernels

        return kernels.forward(x, branch, gate, shift, scale, lengths, eps, dtype, quantize=True)
    total, y, _ = _run_with_norm(x, branch, gate, shift, scale, lengths, eps, dtype)
    return total, *quantize_rows(y)


@torch.library.custom_op("raven::gated_residual_quantized", mutates_args=())
def _gated_residual_quantized(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    lengths: Sequence[int] | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _run_quantized(x, branch, gate, shift, scale, lengths, eps, dtype)


@_gated_residual_quantized.register_fake
def _(x, branch, gate, shift, scale, lengths, eps, dtype):
    return x.new_empty(x.shape), *empty_quantized(x)


def empty_quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the quantised result of a norm, and for its scales ``[B, L]``."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("raven::gated_residual_backward", mutates_args=())
def _backward(
    grad_total: torch.Tensor | None,
    grad_y: torch.Tensor | None,
    total: torch.Tensor | None,
    stats: torch.Tensor | None,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    lengths: Sequence[int] | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    grads = (grad_total, grad_y) if grad_y is None else (grad_y, grad_total)
    dtypes = (x_dtype, branch_dtype)
    if backends.select("gated_residual", *grads, total, stats, branch, gate, scale) == "reference":
        run = reference.backward
    else:
        from raven.kernels.gated_residual_backward import backward as run
    return run(grad_total, grad_y, total, stats, branch, gate, scale, lengths, dtypes, wanted)


@_backward.register_fake
def _(grad_total, grad_y, total, stats, branch, gate, scale, lengths, x_dtype, branch_dtype, wanted):
    grad = grad_total if grad_y is None else grad_y
    wide = compute_dtype(*(t for t in (grad_total, grad_y, total, branch, gate, scale) if t is not None))
    like = (grad, grad, gate, scale, scale)
    kinds = (x_dtype, branch_dtype, wide, wide, wide)
    return [
        grad.new_empty(table.shape, dtype=kind) for table, kind, want in zip(like, kinds, wanted, strict=True) if want
    ]


def gradients(ctx, grad_total, grad_y, total, stats, branch, gate, scale, needs):
    """Gradients of x, branch, gate, shift and scale in the dtypes of ``ctx.dtypes``, ``None`` where none is needed."""
    grads: list[torch.Tensor | None] = [None] * 5
    wanted = list(needs)
    if grad_y is None:  # without the norm, x has the gradient of the sum
        total = stats = scale = None
        grads[0] = grad_total if needs[0] else None
        wanted[0] = wanted[3] = wanted[4] = False
        if gate is None or grad_total is None:
            grads[1] = grad_total.to(ctx.dtypes[1]) if needs[1] and grad_total is not None else None
            return tuple(grads)
    # Without a gate x and branch have one gradient, written once where their dtypes agree.
    shared = gate is None and wanted[0] and wanted[1] and ctx.dtypes[0] == ctx.dtypes[1]
    if shared:
        wanted[1] = False
    if any(wanted):
        branch = branch if wanted[2] else None
        found = iter(
            _backward(grad_total, grad_y, total, stats, branch, gate, scale, ctx.lengths, *ctx.dtypes[:2], wanted)
        )
        for i, want in enumerate(wanted):
            if want:
                grads[i] = next(found).to(ctx.dtypes[i])
    if shared:
        grads[1] = grads[0]
    return tuple(grads)


def _setup_sum(ctx, inputs, output):
    x, branch, gate, ctx.lengths = inputs
    ctx.dtypes = (x.dtype, branch.dtype, None if gate is None else gate.dtype)
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate)


def _autograd_sum(ctx, grad_total):
    branch, gate = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:3], False, False)
    return *gradients(ctx, grad_total, None, None, None, branch, gate, None, needs)[:3], None


def _setup_norm(ctx, inputs, output):
    x, branch, gate, shift, scale, ctx.lengths, _, _ = inputs
    total, _, stats = output
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, branch, gate, shift, scale))
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, stats, branch if ctx.needs_input_grad[2] else None, gate, scale)


def _autograd_norm(ctx, grad_total, grad_y, _):
    return *gradients(ctx, grad_total, grad_y, *ctx.saved_tensors, ctx.needs_input_grad[:5]), None, None, None


_gated_residual.register_autograd(_autograd_sum, setup_context=_setup_sum)
_gated_residual_norm.register_autograd(_autograd_norm, setup_context=_setup_norm)
backends.register("gated_residual", triton=triton_reason, reference=backends.always)
