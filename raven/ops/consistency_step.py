"""Public op: one stochastic step of a consistency model."""

from __future__ import annotations

import torch

from raven import backends
from raven.errors import check_dtype, check_level, check_no_tangent, check_same_device, check_shape
from raven.ops.gaussian_step import direct
from raven.reference import consistency_step as reference
from raven.schedule import Level, compute_dtype, level_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def consistency_step(
    v: torch.Tensor,
    x_t: torch.Tensor,
    t: Level,
    s: Level,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Go from level t to s: ``x_s = (1 - s)(x_t - t v) + s noise`` (RAVEN, arXiv 2605.15190).

    Differentiable in v, x_t and noise. One pass over memory, computed in float32 (float64 for float64 inputs).

    Args:
        v, x_t: velocity and state, one shape ``[B, ...]``; float32, bfloat16 or float16, each its own (float64 on the
            reference only).
        t, s: noise level in [0, 1]: a number, ``[B]``, ``[B, F]`` with one level per frame of ``[B, C, F, ...]``, or
            the broadcast form that `raven.schedule.expand_level` returns. ``s = 0`` gives the clean video.
        noise: standard normal, shape of ``x_t``; drawn in ``x_t``'s dtype when missing (and not at all for the number
            ``s = 0``).
        generator: draws the noise, on its own device.

    Returns:
        ``x_s``, shape and dtype of ``x_t``.

    Raises:
        ValueError: shapes, devices, a level out of range or one that requires a gradient, both noise and generator.
            Levels in a CUDA tensor are not read back: one out of range gives NaN.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    given = [("v", v), ("x_t", x_t)] + ([] if noise is None else [("noise", noise)])
    for name, x in given:
        check_dtype(name, x, DTYPES)
        check_same_device(name, x, "v", v)
        check_shape(name, x, v.shape)
    check_no_tangent("consistency_step", v, x_t, noise)
    if v.dim() == 0:
        raise ValueError("v: got shape (), expected [B, ...]")
    if noise is not None and generator is not None:
        raise ValueError("generator: got one together with noise, expected at most one of the two")
    dtype = compute_dtype(*(x for _, x in given))
    levels = [_per_frame(name, level, x_t, dtype) for name, level in (("t", t), ("s", s))]
    if noise is None and (isinstance(s, torch.Tensor) or s != 0):
        source = x_t.device if generator is None else generator.device
        noise = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=source).to(x_t.device)
    tensors = [x for x in (v, x_t, noise) if x is not None]
    if direct(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return _run(v, x_t, noise, *levels)
    return _consistency_step(v, x_t, noise, *levels)


def _per_frame(name: str, level: Level, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[B, 1]``, or ``[B, F]`` when the level changes from frame to frame."""
    check_level(name, level)
    B, columns = x.shape[0], 1
    if isinstance(level, torch.Tensor):
        if level.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected a constant (try {name}.detach())"
            )
        if level.dim() > 2 and level.dim() == x.dim():
            frames = level.shape[2]
            if tuple(level.shape) not in ((1, 1, frames) + (1,) * (x.dim() - 3), (B, 1, frames) + (1,) * (x.dim() - 3)):
                raise ValueError(f"{name}: got shape {tuple(level.shape)}, expected a level per sample or per frame")
            level = level.reshape(level.shape[0], frames).expand(B, frames)
        if level.dim() == 2 and level.shape[1] != 1 and x.dim() > 2:
            columns = x.shape[2]
    return level_table(name, level, B, columns, x.device, dtype)


def _run(
    v: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor | None, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    if backends.select("consistency_step", v, x_t, noise) == "reference":
        t, s = (_squeeze(level) for level in (t, s))
        return reference.consistency_step(v, x_t, noise, t, s)
    from raven.kernels import consistency_step as kernels

    return kernels.forward(v, x_t, noise, t, s)


_consistency_step = torch.library.custom_op("raven::consistency_step", _run, mutates_args=())


@_consistency_step.register_fake
def _(v, x_t, noise, t, s):
    return x_t.new_empty(x_t.shape)


@torch.library.custom_op("raven::consistency_step_backward", mutates_args=())
def _consistency_step_backward(
    grad: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    v_dtype: torch.dtype,
    noise_dtype: torch.dtype,
    need_v: bool,
    need_x_t: bool,
    need_noise: bool,
) -> list[torch.Tensor]:
    dtypes, wanted = (v_dtype, grad.dtype, noise_dtype), (need_v, need_x_t, need_noise)
    # dtypes of the outputs count too: the kernels write neither float64 nor anything for float64 levels.
    if t.dtype == torch.float64 or backends.select("consistency_step", grad) == "reference":
        return reference.consistency_step_backward(grad, _squeeze(t), _squeeze(s), dtypes, wanted)
    from raven.kernels import consistency_step as kernels

    return kernels.backward(grad, t, s, dtypes, wanted)


@_consistency_step_backward.register_fake
def _(grad, t, s, v_dtype, noise_dtype, need_v, need_x_t, need_noise):
    wanted = ((v_dtype, need_v), (grad.dtype, need_x_t), (noise_dtype, need_noise))
    return [grad.new_empty(grad.shape, dtype=dtype) for dtype, need in wanted if need]


def _squeeze(level: torch.Tensor) -> torch.Tensor:
    return level[:, 0] if level.shape[1] == 1 else level


def _setup_context(ctx, inputs, output):
    v, x_t, noise, t, s = inputs
    ctx.dtypes = (v.dtype, x_t.dtype if noise is None else noise.dtype)
    ctx.save_for_backward(t, s)


def _autograd(ctx, grad):
    needs = ctx.needs_input_grad[:3]
    grads = iter(_consistency_step_backward(grad, *ctx.saved_tensors, *ctx.dtypes, *needs))
    return *(next(grads) if need else None for need in needs), None, None


_consistency_step.register_autograd(_autograd, setup_context=_setup_context)


def _triton_reason(*tensors: torch.Tensor | None) -> str | None:
    x = tensors[0]
    if x is not None and x.numel() >= 2**31 * max(1, x.shape[0]):
        return "a sample has 2**31 elements or more"
    return backends.triton_reason(*tensors)


backends.register("consistency_step", triton=_triton_reason, reference=backends.always)
