"""Public op: the policy loss of CM-GRPO and its gradient, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.graphs import held_by_graphs
from raven.ops import gaussian_step as step
from raven.reference import policy_loss as reference
from raven.schedule import Level, compute_dtype


def policy_loss(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: Level,
    s: Level,
    advantages: torch.Tensor,
    chunk_frames: Sequence[int] | None = None,
    chunk_weights: Sequence[float] | None = None,
    scale: float = 100.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """REINFORCE loss of a consistency step from level t to s, and the step's log-density.

    ``loss = -scale * mean_b(advantages_b * sum_n chunk_weights_n log_prob_bn / d)``, d the elements of a sample and
    ``log_prob = gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames)`` (RAVEN, arXiv 2605.15190): what
    ``raven.losses.reinforce_loss`` makes of that log-density, to rounding. Differentiable in v only.

    Velocity and states are read once, and the gradient of v is written in the same pass, for the backward to multiply
    by the gradient of the loss (in place; nothing moves where that is 1). PPO's clipped ratio has no such form: the
    weight of an element depends on the whole sum, which is known after the pass; use ``gaussian_log_prob`` with
    ``raven.losses.clipped_ratio_loss`` for it. Call once with the same shapes before capturing a CUDA graph.

    Args:
        v, x_t, x_s: velocity, state at t, state at s: one shape ``[B, ...]``, with ``chunk_frames`` ``[B, C, F, ...]``;
            float32, bfloat16 or float16, each its own (float64 on the reference only). Keep the states in float32.
        t, s: noise level, ``0 <= t <= 1`` and ``0 < s <= 1``: a number, ``[B]``, or ``[B, N]`` with ``chunk_frames``.
        advantages: ``[B]``, a floating point type; taken as constant.
        chunk_frames: frames of each of the N chunks along dimension 2; they sum to F. Without: one chunk.
        chunk_weights: N finite numbers (``raven.losses.chunk_weights``), not on a GPU; default 1 each.
        scale: finite; the paper multiplies its policy loss by 100.

    Returns:
        The loss, no dimension, and the log-density, ``[B]`` or ``[B, N]`` with ``chunk_frames``, which takes no
        gradient; float32 (float64 for float64 inputs). The log-density has the bits of ``gaussian_log_prob`` on the
        backends cuda and reference, on triton it may differ in rounding; a sample gives the same bits alone, in a
        batch and from run to run. An empty batch, or empty samples, give 0.

    Raises:
        ValueError: shapes, devices, chunk sizes, weights, levels out of range; a state or a level that requires a
            gradient. Levels in a CUDA tensor are not read back: one out of range makes loss and gradients NaN.
        TypeError: an unsupported dtype.
        NotImplementedError: second derivatives, forward-mode derivatives.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    chunks, dtype = step.check_states(v, x_t, x_s, chunk_frames)
    columns = 1 if chunks is None else len(chunks)
    check_no_tangent("policy_loss", v, x_t, x_s, advantages)
    for name, x in (("x_t", x_t), ("x_s", x_s)):
        if x.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected a constant (try {name}.detach())"
            )
    check_dtype("advantages", advantages, step.DTYPES)
    check_same_device("advantages", advantages, "v", v)
    check_shape("advantages", advantages, (v.shape[0],))
    weights = _check_weights(chunk_weights, columns)
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    advantages = advantages.detach().to(dtype)
    if not step.direct(v, x_t, x_s):
        levels = step.table_levels(t, s, v, columns, dtype)
        need = torch.is_grad_enabled() and v.requires_grad
        return _policy_op(v, x_t, x_s, *levels, advantages, weights, scale, chunks, need)[:2]
    levels = [step.direct_level(name, level, v, columns, dtype) for name, level in (("t", t), ("s", s))]
    backend = step.choose("policy_loss", v, x_t, x_s)
    if torch.is_grad_enabled() and v.requires_grad:
        return _apply(v, x_t, x_s, *levels, advantages, weights, scale, chunks, backend)
    return _run(backend, v, x_t, x_s, *levels, advantages, weights, scale, chunks, False, True)[:2]


def _check_weights(chunk_weights: Sequence[float] | None, columns: int) -> tuple[float, ...]:
    if chunk_weights is None:
        return (1.0,) * columns
    if isinstance(chunk_weights, torch.Tensor) and chunk_weights.device.type != "cpu":
        raise ValueError(f"chunk_weights: got a tensor on {chunk_weights.device}, expected numbers")
    weights = tuple(float(w) for w in chunk_weights)
    if len(weights) != columns or not all(map(math.isfinite, weights)):
        raise ValueError(f"chunk_weights: got {weights}, expected {columns} finite numbers, one a chunk")
    return weights


@lru_cache(maxsize=256)
def _per_element(weights: tuple[float, ...], elements: int, device: torch.device) -> torch.Tensor:
    """``w_n / elements``; built on first use, so a CUDA graph is captured after one call outside of it."""
    with torch.inference_mode(False):
        return torch.tensor([w / elements for w in weights], dtype=torch.float32, device=device)


def _run(backend, v, x_t, x_s, t, s, advantages, weights, scale, chunks, need, keep):
    """Loss, log-density, and the loss's gradient in v (``None`` unless ``need``); ``keep``: see ``step.workspace``."""
    if backend == "reference":
        t, s = step.reference_level(t, chunks), step.reference_level(s, chunks)
        return reference.policy_loss_and_gradient(v, x_t, x_s, t, s, advantages, chunks, weights, scale, need)
    plan, device = step.plan(v.shape, chunks), v.device
    gradient = torch.empty(v.shape, dtype=_gradient_dtype(v), device=device) if need else None
    if v.numel() == 0:
        zeros = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((), plan.shape))
        return *zeros, gradient
    loss = torch.empty((), dtype=torch.float32, device=device)
    log_prob = torch.empty(plan.shape, dtype=torch.float32, device=device)
    per_element = held_by_graphs(_per_element(weights, plan.elements, device))
    if backend == "triton":
        from raven.kernels import policy_loss as kernels

        gain = scale / v.shape[0]
        kernels.forward(v, x_t, x_s, t, s, advantages, per_element, gain, chunks, log_prob, loss, gradient, keep)
        return loss, log_prob, gradient
    with step.on_device(v):
        torch.ops.raven_cuda.policy_loss.default(
            v.contiguous(), x_t.contiguous(), x_s.contiguous(), *step.kernel_level(t), *step.kernel_level(s),
            advantages, per_element, scale, step.borders(chunks, device), *plan.sizes,
            *step.workspace(device, plan.cells, plan.rows + 1, keep), log_prob, loss, gradient,
        )  # fmt: skip
    return loss, log_prob, gradient


def _gradient_dtype(v: torch.Tensor) -> torch.dtype:
    """float16 has not the range for a gradient that still waits for its factor."""
    return torch.float32 if v.dtype == torch.float16 else v.dtype


class _Direct(torch.autograd.Function):
    """Straight to the backend: what the registered op below does, without the dispatcher's rounds through Python."""

    @staticmethod
    def forward(ctx, v, x_t, x_s, t, s, advantages, weights, scale, chunks, backend):
        loss, log_prob, gradient = _run(backend, v, x_t, x_s, t, s, advantages, weights, scale, chunks, True, True)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(log_prob)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.chunks, ctx.backend = v.dtype, chunks, backend
        return loss, log_prob

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 10
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        if ctx.backend == "reference":
            d_v = (gradient * grad).to(ctx.dtype)
        else:
            d_v = step.scale_gradient(ctx.backend, grad, gradient, ctx.dtype, ctx.chunks)
        return d_v, *(None,) * 9


# Function.apply but for its question whether functorch is at work, which ``step.direct`` has answered.
_apply = super(torch.autograd.Function, _Direct).apply


def _refuse_second_derivative() -> None:
    """The gradient was made without autograd: its own gradient must be an error, not a silent zero."""
    if torch.is_grad_enabled():
        raise NotImplementedError("policy_loss: second derivatives are not available")


_library = torch.library.Library("raven", "FRAGMENT")
_library.define(
    "policy_loss(Tensor v, Tensor x_t, Tensor x_s, Tensor t, Tensor s, Tensor advantages, float[] chunk_weights, "
    "float scale, int[]? chunk_frames, bool need_v) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_policy_op = torch.ops.raven.policy_loss.default


def _forward(v, x_t, x_s, t, s, advantages, chunk_weights, scale, chunk_frames, need_v):
    chunks = None if chunk_frames is None else tuple(chunk_frames)
    backend = backends.select("policy_loss", v, x_t, x_s)
    loss, log_prob, gradient = _run(
        backend, v, x_t, x_s, t, s, advantages, tuple(chunk_weights), scale, chunks, need_v, False
    )
    return loss, log_prob, v.new_empty(0) if gradient is None else gradient


def _fake_forward(v, x_t, x_s, t, s, advantages, chunk_weights, scale, chunk_frames, need_v):
    dtype = compute_dtype(v, x_t, x_s)
    shape = (v.shape[0],) if chunk_frames is None else (v.shape[0], len(chunk_frames))
    gradient = v.new_empty(v.shape, dtype=_gradient_dtype(v)) if need_v else v.new_empty(0)
    return v.new_empty((), dtype=dtype), v.new_empty(shape, dtype=dtype), gradient


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, *others):
        with torch._C._AutoDispatchBelowAutograd():
            loss, log_prob, gradient = _policy_op(v, *others)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(log_prob, gradient)
        ctx.set_materialize_grads(False)
        ctx.dtype = v.dtype
        return loss, log_prob, gradient

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 10
        _refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), *(None,) * 9


def _autograd(*args):
    if args[-1]:
        return _PolicyLoss.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _policy_op(*args)


_library.impl("policy_loss", _forward, "CompositeExplicitAutograd")
_library.impl("policy_loss", _autograd, "Autograd")
torch.library.register_fake("raven::policy_loss", _fake_forward, lib=_library)

backends.register("policy_loss", cuda=step.cuda_reason, triton=step.triton_reason, reference=backends.always)
