"""Public op: log-density of a consistency step, the policy of CM-GRPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven import backends
from raven.errors import check_no_tangent
from raven.ops import gaussian_step as step
from raven.reference import gaussian_log_prob as reference
from raven.schedule import Level, compute_dtype


def gaussian_log_prob(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: Level,
    s: Level,
    chunk_frames: Sequence[int] | None = None,
) -> torch.Tensor:
    """Log-density of ``x_s`` under the consistency step from level t to s, summed over elements.

    ``log N(x_s; (1 - s) x_0, s^2 I)`` with ``x_0 = x_t - t v``, over d elements
    ``-|x_s - (1 - s) x_0|^2 / (2 s^2) - d log s - d/2 log 2 pi`` (RAVEN, arXiv 2605.15190). Differentiable in v, x_t
    and x_s; the gradient of v is ``-t (1 - s)(x_s - (1 - s) x_0) / s^2``. Call once with the same shapes before
    capturing a CUDA graph.

    Args:
        v, x_t, x_s: velocity, state at t, state at s: one shape ``[B, ...]``, with ``chunk_frames`` ``[B, C, F, ...]``;
            float32, bfloat16 or float16, each its own (float64 on the reference only). Keep the states in float32: the
            rounding of ``x_s`` counts ``1 / s^2`` times. Non-contiguous tensors are copied.
        t, s: noise level, ``0 <= t <= 1`` and ``0 < s <= 1``: a number, ``[B]``, or ``[B, N]`` with ``chunk_frames``.
        chunk_frames: frames of each of the N chunks along dimension 2; they sum to F.

    Returns:
        ``[B]``, or ``[B, N]`` with ``chunk_frames``; float32, accumulated in float32 (float64 for float64 inputs). No
        sum by atomics: a sample gives the same bits alone, in a batch and from run to run. Empty samples give 0.

    Raises:
        ValueError: shapes, devices, chunk sizes, levels out of range (``s = 0`` is a point mass and has no density), a
            level that requires a gradient. Levels in a CUDA tensor are not read back, which would stall the stream:
            there a level out of range makes its log-density and gradients NaN.
        TypeError: an unsupported dtype.
        NotImplementedError: second derivatives, forward-mode derivatives.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    chunks, dtype = step.check_states(v, x_t, x_s, chunk_frames)
    columns = 1 if chunks is None else len(chunks)
    check_no_tangent("gaussian_log_prob", v, x_t, x_s)
    if not step.direct(v, x_t, x_s):
        return _forward_op(v, x_t, x_s, *step.table_levels(t, s, v, columns, dtype), chunks)
    t = step.direct_level("t", t, v, columns, dtype)
    s = step.direct_level("s", s, v, columns, dtype)
    backend = step.choose("gaussian_log_prob", v, x_t, x_s)
    if torch.is_grad_enabled() and (v.requires_grad or x_t.requires_grad or x_s.requires_grad):
        velocity = v.dtype == torch.float32 and backend != "reference" and not (x_t.requires_grad or x_s.requires_grad)
        return (_apply_velocity if velocity else _apply)(v, x_t, x_s, t, s, chunks, backend)
    return _forward_on(backend, v, x_t, x_s, t, s, chunks, True)


def _forward_on(backend, v, x_t, x_s, t, s, chunks, keep, unit=None):
    """The log-density; ``unit`` receives its gradient in v (on a GPU backend). ``keep``: see ``step.workspace``."""
    if backend == "reference":
        t, s = step.reference_level(t, chunks), step.reference_level(s, chunks)
        return reference.gaussian_log_prob(v, x_t, x_s, t, s, chunks)
    plan, device = step.plan(v.shape, chunks), v.device
    if v.numel() == 0:
        return torch.zeros(plan.shape, dtype=torch.float32, device=device)
    out = torch.empty(plan.shape, dtype=torch.float32, device=device)
    if backend == "triton":
        from raven.kernels import gaussian_log_prob as kernels

        kernels.forward(v, x_t, x_s, t, s, chunks, out, unit, keep)
        return out
    with step.on_device(v):
        torch.ops.raven_cuda.gaussian_log_prob_forward.default(
            v.contiguous(), x_t.contiguous(), x_s.contiguous(), *step.kernel_level(t), *step.kernel_level(s),
            step.borders(chunks, device), *plan.sizes, *step.workspace(device, plan.cells, plan.rows, keep), out, unit,
        )  # fmt: skip
    return out


def _backward_on(backend, grad, v, x_t, x_s, t, s, chunks, need_v, need_x_t, need_x_s):
    """The gradients of v, x_t, x_s; ``None`` for one that is not wanted."""
    needs = (need_v, need_x_t, need_x_s)
    if backend == "reference":
        t, s = step.reference_level(t, chunks), step.reference_level(s, chunks)
        grads = iter(reference.gaussian_log_prob_backward(grad, v, x_t, x_s, t, s, chunks, *needs))
        return tuple(next(grads) if need else None for need in needs)
    outs = tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip((v, x_t, x_s), needs, strict=True)
    )
    if v.numel() == 0 or not any(needs):
        return outs
    if backend == "triton":
        from raven.kernels import gaussian_log_prob as kernels

        kernels.backward(grad, v, x_t, x_s, t, s, chunks, *outs)
        return outs
    with step.on_device(v):
        torch.ops.raven_cuda.gaussian_log_prob_backward.default(
            grad, v.contiguous(), x_t.contiguous(), x_s.contiguous(), *step.kernel_level(t), *step.kernel_level(s),
            step.borders(chunks, v.device), *step.plan(v.shape, chunks).sizes, *outs,
        )  # fmt: skip
    return outs


class _Direct(torch.autograd.Function):
    """Straight to the backend: what the registered op below does, without the dispatcher's rounds through Python."""

    @staticmethod
    def forward(ctx, v, x_t, x_s, t, s, chunks, backend):
        ctx.save_for_backward(v, x_t, x_s, *(x if isinstance(x, torch.Tensor) else None for x in (t, s)))
        ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in (t, s)]
        ctx.chunks, ctx.backend = chunks, backend
        return _forward_on(backend, v, x_t, x_s, t, s, chunks, True)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        v, x_t, x_s, t, s = ctx.saved_tensors
        t, s = ctx.numbers[0] if t is None else t, ctx.numbers[1] if s is None else s
        return *_backward_on(ctx.backend, grad, v, x_t, x_s, t, s, ctx.chunks, *ctx.needs_input_grad[:3]), *(None,) * 4


class _DirectVelocity(torch.autograd.Function):
    """For a float32 velocity that alone needs a gradient: the forward, which has read everything, writes it for a
    gradient of 1, and the backward scales it. That moves six tensors instead of seven, and keeps one instead of three.
    """

    @staticmethod
    def forward(ctx, v, x_t, x_s, t, s, chunks, backend):
        unit = torch.empty_like(v, memory_format=torch.contiguous_format)
        ctx.save_for_backward(unit)
        ctx.chunks, ctx.backend = chunks, backend
        return _forward_on(backend, v, x_t, x_s, t, s, chunks, True, unit)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        (unit,) = ctx.saved_tensors
        return step.scale_gradient(ctx.backend, grad, unit, unit.dtype, ctx.chunks), *(None,) * 6


# Function.apply but for its question whether functorch is at work, which ``step.direct`` has answered.
_apply, _apply_velocity = (super(torch.autograd.Function, each).apply for each in (_Direct, _DirectVelocity))


def _refuse_second_derivative() -> None:
    """The backward has no formula of its own: its gradient must be an error, not a silent zero."""
    if torch.is_grad_enabled():
        raise NotImplementedError("gaussian_log_prob: second derivatives are not available")


# Plain dispatcher registrations and not torch.library.custom_op, which takes the host twice as long.
_library = torch.library.Library("raven", "FRAGMENT")
_library.define(
    "gaussian_log_prob(Tensor v, Tensor x_t, Tensor x_s, Tensor t, Tensor s, int[]? chunk_frames) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "gaussian_log_prob_backward(Tensor grad, Tensor v, Tensor x_t, Tensor x_s, Tensor t, Tensor s, "
    "int[]? chunk_frames, bool need_v, bool need_x_t, bool need_x_s) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward_op = torch.ops.raven.gaussian_log_prob.default
_backward_op = torch.ops.raven.gaussian_log_prob_backward.default


def _forward(v, x_t, x_s, t, s, chunk_frames):
    chunks = None if chunk_frames is None else tuple(chunk_frames)
    return _forward_on(backends.select("gaussian_log_prob", v, x_t, x_s), v, x_t, x_s, t, s, chunks, False)


def _backward(grad, v, x_t, x_s, t, s, chunk_frames, need_v, need_x_t, need_x_s):
    chunks = None if chunk_frames is None else tuple(chunk_frames)
    backend = backends.select("gaussian_log_prob", v, x_t, x_s)
    grads = _backward_on(backend, grad, v, x_t, x_s, t, s, chunks, need_v, need_x_t, need_x_s)
    return [x for x in grads if x is not None]


def _fake_forward(v, x_t, x_s, t, s, chunk_frames):
    shape = (v.shape[0],) if chunk_frames is None else (v.shape[0], len(chunk_frames))
    return v.new_empty(shape, dtype=compute_dtype(v, x_t, x_s))


def _fake_backward(grad, v, x_t, x_s, t, s, chunk_frames, need_v, need_x_t, need_x_s):
    wanted = ((v, need_v), (x_t, need_x_t), (x_s, need_x_s))
    return [x.new_empty(x.shape) for x, need in wanted if need]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, x_t, x_s, t, s, chunk_frames):
        ctx.save_for_backward(v, x_t, x_s, t, s)
        ctx.chunk_frames = chunk_frames
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(v, x_t, x_s, t, s, chunk_frames)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:3]
        grads = iter(_backward_op(grad, *ctx.saved_tensors, ctx.chunk_frames, *needs))
        return *(next(grads) if need else None for need in needs), None, None, None


def _autograd(v, x_t, x_s, t, s, chunk_frames):
    return _LogProb.apply(v, x_t, x_s, t, s, chunk_frames)


def _backward_autograd(*args):
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        _refuse_second_derivative()
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(*args)


_library.impl("gaussian_log_prob", _forward, "CompositeExplicitAutograd")
_library.impl("gaussian_log_prob_backward", _backward, "CompositeExplicitAutograd")
_library.impl("gaussian_log_prob", _autograd, "Autograd")
_library.impl("gaussian_log_prob_backward", _backward_autograd, "Autograd")
torch.library.register_fake("raven::gaussian_log_prob", _fake_forward, lib=_library)
torch.library.register_fake("raven::gaussian_log_prob_backward", _fake_backward, lib=_library)

backends.register("gaussian_log_prob", cuda=step.cuda_reason, triton=step.triton_reason, reference=backends.always)
