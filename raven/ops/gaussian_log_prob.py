"""Public op: log-density of a consistency step, the policy of CM-GRPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raven import backends
from raven.errors import check_dtype, check_level, check_same_device, check_shape
from raven.reference import gaussian_log_prob as reference
from raven.schedule import Level, check_chunk_frames, compute_dtype, level_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    and x_s; the gradient of v is ``-t (1 - s)(x_s - (1 - s) x_0) / s^2``.

    Args:
        v, x_t, x_s: velocity, state at t, state at s: one shape ``[B, ...]``, with ``chunk_frames`` ``[B, C, F, ...]``;
            float32, bfloat16 or float16, each its own (float64 on the reference only). Keep the states in float32: the
            rounding of ``x_s`` counts ``1 / s^2`` times. Non-contiguous tensors are copied.
        t, s: noise level, ``0 <= t <= 1`` and ``0 < s <= 1``: a number, ``[B]``, or ``[B, N]`` with ``chunk_frames``.
        chunk_frames: frames of each of the N chunks along dimension 2; they sum to F.

    Returns:
        ``[B]``, or ``[B, N]`` with ``chunk_frames``; float32, accumulated in float32 (float64 for float64 inputs). No
        atomics: a sample gives the same bits alone, in a batch and from run to run. Empty samples give 0.

    Raises:
        ValueError: shapes, devices, chunk sizes, levels out of range (``s = 0`` is a point mass and has no density), a
            level that requires a gradient. Levels in a CUDA tensor are not read back, which would stall the stream:
            there a level out of range makes its log-density and gradients NaN.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    for name, x in (("v", v), ("x_t", x_t), ("x_s", x_s)):
        check_dtype(name, x, DTYPES)
        check_same_device(name, x, "v", v)
        check_shape(name, x, v.shape)
    if v.dim() == 0:
        raise ValueError("v: got shape (), expected [B, ...]")
    chunks = None if chunk_frames is None else check_chunk_frames(chunk_frames, v)
    columns = 1 if chunks is None else len(chunks)
    dtype = compute_dtype(v, x_t, x_s)
    for name, level in (("t", t), ("s", s)):
        check_level(name, level, exclusive=name == "s")
        if isinstance(level, torch.Tensor) and level.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, expected a constant (try {name}.detach())"
            )
    levels = [level_table(name, x, v.shape[0], columns, v.device, dtype) for name, x in (("t", t), ("s", s))]
    return _forward_op(v, x_t, x_s, *levels, chunks)


# Plain dispatcher registrations and not torch.library.custom_op: at four samples the host, not the GPU, sets the time,
# and these take about half of its overhead.
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
    if backends.select("gaussian_log_prob", v, x_t, x_s) == "reference":
        t, s = (level[:, 0] if chunk_frames is None else level for level in (t, s))
        return reference.gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames)
    from raven.kernels import gaussian_log_prob as kernels

    return kernels.forward(v, x_t, x_s, t, s, chunk_frames)


def _backward(grad, v, x_t, x_s, t, s, chunk_frames, need_v, need_x_t, need_x_s):
    needs = (need_v, need_x_t, need_x_s)
    if backends.select("gaussian_log_prob", v, x_t, x_s) == "reference":
        t, s = (level[:, 0] if chunk_frames is None else level for level in (t, s))
        return reference.gaussian_log_prob_backward(grad, v, x_t, x_s, t, s, chunk_frames, *needs)
    from raven.kernels import gaussian_log_prob as kernels

    return kernels.backward(grad, v, x_t, x_s, t, s, chunk_frames, *needs)


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


def _no_second_derivative(*args):
    """The backward is an op of its own: without a formula its gradient must be an error, not a silent zero."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        raise NotImplementedError("gaussian_log_prob: second derivatives are not available")
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(*args)


_library.impl("gaussian_log_prob", _forward, "CompositeExplicitAutograd")
_library.impl("gaussian_log_prob_backward", _backward, "CompositeExplicitAutograd")
_library.impl("gaussian_log_prob", _autograd, "Autograd")
_library.impl("gaussian_log_prob_backward", _no_second_derivative, "Autograd")
torch.library.register_fake("raven::gaussian_log_prob", _fake_forward, lib=_library)
torch.library.register_fake("raven::gaussian_log_prob_backward", _fake_backward, lib=_library)


def _triton_reason(*tensors: torch.Tensor) -> str | None:
    x = tensors[0]
    if x.numel() >= 2**31 * max(1, x.shape[0]):
        return "a sample has 2**31 elements or more"
    return backends.triton_reason(*tensors)


backends.register("gaussian_log_prob", triton=_triton_reason, reference=backends.always)
