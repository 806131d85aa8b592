"""Public op: RMS norm of queries and keys, then 3-D rotary positions."""

from __future__ import annotations

import math

import torch

from raven import backends, native, rows
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.reference import qk_norm_rope as reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
HEAD_DIMS = (16, 32, 64, 128, 256)
# As csrc/include/raven/memory.cuh numbers them.
WEIGHT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    eps: float = 1e-6,
    theta: float = 10000.0,
    per_head: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS-normalise queries and keys over all heads of a token, then rotate them; differentiable in q, k, weights.

    The attention input of Wan 2.1 (arXiv 2503.20314): ``x * rsqrt(mean(x^2) + eps) * weight`` over the full width, then
    interleaved channel pairs turn by ``position * theta ** (-i / n)``, ``n`` the pairs of an axis: with ``c = D / 2``,
    ``c - 2 (c // 3)`` pairs turn with the frame, ``c // 3`` each with row and column. Computed in float32 (float64 for
    float64 inputs) from end to end and rounded once; code that rounds between norm and rotary differs by a rounding.

    Args:
        q: ``[B, L, H, D]``, D even; bfloat16, float16, float32, or float64 (on the reference only). Heads of a token
            must be packed to be read in place (a slice of a fused q, k, v projection is); other strides cost a copy.
        k: ``[B, L, Hk, D]``, dtype and device of q; Hk may differ from H.
        q_weight, k_weight: ``[H * D]`` and ``[Hk * D]`` (``[D]`` with ``per_head``), any floating dtype;
            ``None``: no norm, only the rotation.
        positions: int32 ``[L, 3]`` or ``[B, L, 3]``: (frame, row, column). Any value: there is no table to run out of.
        eps: added to the mean of squares.
        theta: base of the frequencies.
        per_head: take the mean over D for each head on its own.

    Returns:
        New packed tensors like q and k. On a GPU a token gives the same bits alone and in a batch, and the weights'
        gradients, summed in float32 in a fixed order, are the same from run to run.

    Raises:
        ValueError: shapes, devices, eps or theta out of range.
        TypeError: an unsupported dtype, or k of another dtype than q.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_arguments(q, k, q_weight, k_weight, positions, eps, theta, per_head)
    return _qk_norm_rope(q, k, q_weight, k_weight, positions, float(eps), float(theta), per_head)


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    eps: float,
    theta: float,
    per_head: bool,
) -> None:
    """The checks that ``qk_norm_rope`` and ``kv_append`` share."""
    check_shape("q", q, ("B", "L", "H", "D"))
    B, L, H, D = q.shape
    check_shape("k", k, (B, L, "Hk", D))
    if D < 2 or D % 2:
        raise ValueError(f"q: got head dim {D}, expected an even number")
    if H == 0 or k.shape[2] == 0:
        raise ValueError(f"q, k: got {H} and {k.shape[2]} heads, expected at least 1")
    check_dtype("q", q, DTYPES)
    check_dtype("k", k, (q.dtype,))
    check_same_device("k", k, "q", q)
    for name, weight, heads in (("q_weight", q_weight, H), ("k_weight", k_weight, k.shape[2])):
        if weight is not None:
            check_shape(name, weight, (D if per_head else heads * D,))
            check_dtype(name, weight, DTYPES)
            check_same_device(name, weight, "q", q)
    check_shape("positions", positions, (L, 3) if positions.ndim == 2 else (B, L, 3))
    check_dtype("positions", positions, (torch.int32,))
    check_same_device("positions", positions, "q", q)
    check_no_tangent("qk_norm_rope", q, k, q_weight, k_weight)
    if not 0 <= eps < math.inf:  # math.isfinite does not trace with dynamic shapes
        raise ValueError(f"eps: got {eps}, expected a finite number that is not negative")
    if not 0 < theta < math.inf:
        raise ValueError(f"theta: got {theta}, expected a positive finite number")


def _head_dim_reason(q: object) -> str | None:
    if isinstance(q, torch.Tensor) and q.shape[-1] not in HEAD_DIMS:
        return f"head dim {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    return None


def triton_reason(q: object, *others: object) -> str | None:
    """Why the Triton kernels of ``qk_norm_rope`` and ``kv_append`` cannot run on these tensors, or ``None``."""
    return _head_dim_reason(q) or backends.triton_reason(q, *others)


def cuda_reason(q: object, k: object = None, *others: object) -> str | None:
    """Why the CUDA kernels of ``qk_norm_rope`` and ``kv_append`` cannot run on these tensors, or ``None``."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor):
            continue
        # What a block holds of one row, in registers and shared memory.
        if (channels := x.shape[-2] * x.shape[-1]) > 8192:
            return f"{name} has {channels} channels in a token, more than 8192"
        if x.shape[0] * x.shape[1] >= 2**30:
            return f"{name} has {x.shape[0] * x.shape[1]} tokens, 2^30 or more"
    return _head_dim_reason(q) or native.reason(q, k, *others)


def weight_arguments(weight: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """A weight and the number of its dtype, as the CUDA ops take them."""
    return (None, 0) if weight is None else (rows.aligned(weight), WEIGHT_DTYPES[weight.dtype])


def _cuda_forward(q, k, q_weight, k_weight, positions, eps, theta, per_head):
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.shape[0] * q.shape[1]:
        with torch.cuda.device_of(q):
            torch.ops.raven_cuda.norm_rope_rows(
                rows.aligned_rows(q), rows.aligned_rows(k), None, q_out, k_out, None, None, None,
                *weight_arguments(q_weight), *weight_arguments(k_weight), positions.contiguous(), None,
                rows.frequency_table(q.shape[-1], theta, q.device), eps, per_head, True,
            )  # fmt: skip
    return q_out, k_out


def _cuda_backward(grad_q, grad_k, q, k, q_weight, k_weight, positions, eps, theta, per_head, weight_grad):
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    total = q.shape[0] * q.shape[1]
    # One block for each multiprocessor, in proportion to the heads, so that both tensors take the same time.
    most = max(rows.multiprocessors(q.device), 2)
    for_q = min(max(round(most * q.shape[2] / (q.shape[2] + k.shape[2])), 1), most - 1)
    blocks = [min(for_q, total), min(most - for_q, total)]
    # Each block writes one partial gradient of its weight; the second launch adds them up.
    partial, dweight = [None, None], [torch.empty(0, dtype=torch.float32, device=q.device) for _ in range(2)]
    for i, weight in enumerate((q_weight, k_weight)):
        if weight_grad and weight is not None:
            new = torch.empty if total else torch.zeros
            dweight[i] = new(weight.shape, dtype=weight.dtype, device=q.device)
            partial[i] = torch.empty((blocks[i], weight.numel()), dtype=torch.float32, device=q.device)
    if total:
        with torch.cuda.device_of(q):
            torch.ops.raven_cuda.norm_rope_backward(
                *map(rows.aligned_rows, (grad_q, grad_k, q, k)), dq, dk,
                *weight_arguments(q_weight), *weight_arguments(k_weight), *partial,
                *(None if p is None else w for p, w in zip(partial, dweight, strict=True)), positions.contiguous(),
                rows.frequency_table(q.shape[-1], theta, q.device), eps, per_head, *blocks,
            )  # fmt: skip
    return dq, dk, *dweight


@torch.library.custom_op("raven::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    eps: float,
    theta: float,
    per_head: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = backends.select("qk_norm_rope", q, k, q_weight, k_weight)
    if backend == "cuda":
        run = _cuda_forward
    elif backend == "triton":
        from raven.kernels.qk_norm_rope import forward as run
    else:
        run = reference.qk_norm_rope
    return run(q, k, q_weight, k_weight, positions, eps, theta, per_head)


@_qk_norm_rope.register_fake
def _(q, k, q_weight, k_weight, positions, eps, theta, per_head):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("raven::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    eps: float,
    theta: float,
    per_head: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = backends.select("qk_norm_rope", q, k, q_weight, k_weight)
    if backend == "cuda":
        run = _cuda_backward
    elif backend == "triton":
        from raven.kernels.qk_norm_rope_backward import backward as run
    else:
        run = reference.qk_norm_rope_backward
    dq, dk, dq_weight, dk_weight = run(
        grad_q, grad_k, q, k, q_weight, k_weight, positions, eps, theta, per_head, weight_grad
    )
    return dq, dk, _like(dq_weight, q_weight), _like(dk_weight, k_weight)


def _like(grad: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return grad if weight is None else grad.to(weight.dtype)


@_qk_norm_rope_backward.register_fake
def _(grad_q, grad_k, q, k, q_weight, k_weight, positions, eps, theta, per_head, weight_grad):
    dq_weight, dk_weight = (
        q.new_empty(0, dtype=torch.float32) if w is None else w.new_empty(w.shape if weight_grad else 0)
        for w in (q_weight, k_weight)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_weight, dk_weight


def _setup_context(ctx, inputs, output):
    q, k, q_weight, k_weight, positions, ctx.eps, ctx.theta, ctx.per_head = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, positions)


def _autograd(ctx, grad_q, grad_k):
    need_q_weight, need_k_weight = ctx.needs_input_grad[2:4]
    dq, dk, dq_weight, dk_weight = _qk_norm_rope_backward(
        grad_q, grad_k, *ctx.saved_tensors, ctx.eps, ctx.theta, ctx.per_head, need_q_weight or need_k_weight
    )
    # The last four arguments take no gradient.
    return dq, dk, dq_weight if need_q_weight else None, dk_weight if need_k_weight else None, *(None,) * 4


_qk_norm_rope.register_autograd(_autograd, setup_context=_setup_context)
backends.register("qk_norm_rope", cuda=cuda_reason, triton=triton_reason, reference=backends.always)
