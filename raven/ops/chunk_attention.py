"""Public op: attention of packed query ranges over lists of key ranges."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.graphs import held_by_graphs
from raven.ops import _chunk_attention_cuda as cuda
from raven.ops import _chunk_attention_cuda_backward as cuda_backward
from raven.ops import _chunk_attention_gluon as gluon
from raven.ops.gaussian_step import direct, on_device
from raven.planner import TilePlan, plan, transpose
from raven.reference import chunk_attention as reference

if TYPE_CHECKING:
    from raven.layout import ChunkLayout, Spans

HEAD_DIMS = (32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_GRID = 65535  # of CUDA, along every axis but the first
Ranges = tuple[bytes, bytes, bytes]  # the content of the three lists of a ``Spans``


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ChunkLayout | Spans,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention where each run of queries sees a list of key ranges; differentiable in q, k, v (and in lse).

    Args:
        q: ``[B, Lq, H, D]``, bfloat16, float16, float32 or float64 (float64 on the reference only).
        k, v: ``[B, Lk, Hkv, D]``, dtype and device of q; ``H`` must be a multiple of ``Hkv`` (grouped query heads).
        layout: a ``ChunkLayout`` (``Lq = Lk = layout.length``) or ``Spans`` for any other pair of lengths.
            All batch entries share it.
        scale: factor on the scores; default ``D ** -0.5``.
        return_lse: also return the natural log-sum-exp of the scaled scores, ``[B, H, Lq]`` float32
            (float64 for float64 inputs).

    Returns:
        ``out`` like q, or ``(out, lse)``. A query that sees no key gives 0 and ``-inf``. No sum of the
        forward pass is by atomics: an input gives the same bits alone, in a batch and from run to run. On
        the backend cuda the gradient of q may differ in its last bits from run to run, unless
        ``torch.use_deterministic_algorithms(True)`` is set; no other gradient does.

    Raises:
        ValueError: shapes, devices, or a layout that does not fit them.
        TypeError: an unsupported dtype, or q, k, v of different dtypes.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    spans = _check(q, k, v, layout)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a positive finite number")
    lists = (spans.q_ranges, spans.kv_indptr, spans.kv_ranges)
    need = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not need and direct(q, k, v) and not torch.autograd.profiler._is_profiler_enabled:
        # What the registered op does, without the dispatcher's rounds through Python. A profile shows the op.
        out, lse = _forward(q, k, v, lists, _ranges(spans), float(scale))
    else:
        out, lse = _chunk_attention(q, k, v, *lists, float(scale))
    return (out, lse) if return_lse else out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: ChunkLayout | Spans) -> Spans:
    usual = (
        isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(v, torch.Tensor)
        and q.dtype in DTYPES
        and k.dtype == v.dtype == q.dtype
        and k.device == v.device == q.device
        and q.ndim == k.ndim == 4
        and q.shape[::3] == k.shape[::3]
        and k.shape == v.shape
    )
    if not usual:
        check_shape("q", q, ("B", "Lq", "H", "D"))
        check_shape("k", k, (q.shape[0], "Lk", "Hkv", q.shape[3]))
        check_shape("v", v, tuple(k.shape))
        check_dtype("q", q, DTYPES)
        for name, x in (("k", k), ("v", v)):
            check_dtype(name, x, (q.dtype,))
            check_same_device(name, x, "q", q)
    _, Lq, H, D = q.shape
    check_no_tangent("chunk_attention", q, k, v)
    if D == 0:
        raise ValueError("q: got head dim 0, expected at least 1")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, expected a divisor of the {H} heads of q")
    Lk = k.shape[1]
    spans = getattr(layout, "spans", layout)
    if not hasattr(spans, "kv_ranges"):
        raise TypeError(f"layout: got {type(layout).__name__}, expected ChunkLayout or Spans")
    if spans is not layout and (layout.length != Lq or layout.length != Lk):
        raise ValueError(f"layout: got {layout.length} tokens, expected {Lq} like q and {Lk} like k")
    if spans.q_end > Lq or spans.kv_end > Lk:
        raise ValueError(
            f"layout: got ranges that reach query {spans.q_end} and key {spans.kv_end}, "
            f"expected at most {Lq} (length of q) and {Lk} (length of k)"
        )
    return spans


@torch.library.custom_op("raven::chunk_attention", mutates_args=())
def _chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_ranges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    lists = (q_ranges, kv_indptr, kv_ranges)
    return _forward(q, k, v, lists, _contents(*lists), scale)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: tuple[torch.Tensor, ...], ranges: Ranges, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ranges``: what the ``lists`` of a ``Spans`` hold."""
    backend = backends.select("chunk_attention", q, k, v)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):  # it would round the products inside
            return reference.chunk_attention_forward(q, k, v, *lists, scale)

    # Kernels write only the rows of query ranges; the rest of an incomplete cover must still be defined.
    complete = _covered(ranges[0]) == q.shape[1] and k.numel() > 0
    out = (torch.empty if complete else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if not complete:
        lse.fill_(float("-inf"))
    if not (q.numel() and k.numel()):
        return out, lse
    if backend == "cuda":
        with on_device(q):
            cuda.forward(q, k, v, out, lse, ranges, scale)
        return out, lse
    if gluon.reason(q) is None:
        with on_device(q):
            gluon.forward(q, k, v, out, lse, ranges, scale)
        return out, lse
    from raven.kernels import chunk_attention as kernels

    config = kernels.forward_config(q.shape[-1], q.dtype, kernels.capability(q))
    tiles = held_by_graphs(_device_plan(*ranges, config.block_q, config.block_k, q.device))
    with on_device(q):  # Triton launches on the current device, whatever the tensors' is
        kernels.forward(q, k, v, out, lse, tiles, scale, config)
    return out, lse


@_chunk_attention.register_fake
def _(q, k, v, q_ranges, kv_indptr, kv_ranges, scale):
    lse_dtype = reference.accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=lse_dtype)


@torch.library.custom_op("raven::chunk_attention_backward", mutates_args=())
def _chunk_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_ranges: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_ranges: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spans = (q_ranges, kv_indptr, kv_ranges)
    backend = backends.select("chunk_attention", q, k, v)
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *spans, scale)
    if not (q.numel() and k.numel()):
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if backend == "cuda":
        with torch.cuda.device_of(q):
            return cuda_backward.backward(grad_out, grad_lse, q, k, v, out, lse, spans, scale)
    from raven.kernels import chunk_attention_backward as kernels
    from raven.kernels.chunk_attention import capability

    ranges = _contents(*spans)
    complete = _covered(ranges[0]) == q.shape[1]
    dq = (torch.empty if complete else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    keys = _transposed(*ranges)
    make = torch.empty if _covered(keys[0]) == k.shape[1] else torch.zeros
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    q_config, k_config = kernels.backward_configs(q.shape[-1], q.dtype, capability(q))
    q_tiles = held_by_graphs(_device_plan(*ranges, q_config.block_q, q_config.block_k, q.device))
    k_tiles = held_by_graphs(_device_plan(*keys, k_config.block_k, k_config.block_q, q.device))
    grads = (dq, dk, dv)
    with torch.cuda.device_of(q):
        kernels.backward(grad_out, grad_lse, q, k, v, out, lse, *grads, q_tiles, k_tiles, scale, q_config, k_config)
    return grads


@_chunk_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, q_ranges, kv_indptr, kv_ranges, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, q_ranges, kv_indptr, kv_ranges, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_ranges, kv_indptr, kv_ranges)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *spans = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return (None,) * 7
        grad_out = torch.zeros_like(out)
    grads = _chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *spans, ctx.scale)
    return *grads, None, None, None, None


_chunk_attention.register_autograd(_autograd, setup_context=_setup_context)


def _triton_reason(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]} is not one of {HEAD_DIMS}"
    if q.dtype == torch.float32 and q.shape[-1] == 256:
        return "float32 with head_dim 256 has no tiles: full float32 products at that width take minutes to compile"
    if max(q.shape[0], q.shape[2]) > MAX_GRID:
        return f"batch {q.shape[0]} or heads {q.shape[2]} exceed the {MAX_GRID} of a launch grid"
    return backends.triton_reason(q, k, v)


def _triton_remark(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    missing = gluon.reason(q)
    return "forward for Hopper" if missing is None else f"portable forward, not Hopper's: {missing}"


backends.register("chunk_attention", cuda=cuda.reason, triton=_triton_reason, reference=backends.always)
backends.remark("chunk_attention", "triton", _triton_remark)


def _contents(*lists: torch.Tensor) -> Ranges:
    return tuple(x.numpy().tobytes() for x in lists)


@lru_cache(maxsize=1024)
def _ranges(spans: Spans) -> Ranges:
    return _contents(spans.q_ranges, spans.kv_indptr, spans.kv_ranges)


@lru_cache(maxsize=1024)
def _covered(ranges: bytes) -> int:
    begins_and_ends = np.frombuffer(ranges, dtype=np.int32).reshape(-1, 2).sum(axis=0)
    return int(begins_and_ends[1] - begins_and_ends[0])


@lru_cache(maxsize=1024)
def _transposed(q_ranges: bytes, kv_indptr: bytes, kv_ranges: bytes) -> Ranges:
    """The same pairs seen from the keys: for each run of keys, the query ranges that read it."""
    return tuple(x.tobytes() for x in transpose(*_arrays(q_ranges, kv_indptr, kv_ranges)))


class DevicePlan:
    """A `TilePlan` as int32 tensors on the device; ``num_tiles`` stays on the host for the launch grid."""

    def __init__(self, tiles: TilePlan, device: torch.device):
        self.num_tiles = len(tiles.q_tiles)
        names = ("q_tiles", "full_indptr", "full_starts", "tail_indptr", "tails")
        parts = [torch.from_numpy(getattr(tiles, name)).reshape(-1) for name in names]
        # At least one element of padding, because the kernels read one tile ahead of the loop; and every list begins
        # at 16 bytes, because Triton compiles a kernel anew for pointers of another alignment.
        padded = [torch.nn.functional.pad(x, (0, 4 - len(x) % 4)) for x in parts]
        packed = torch.cat(padded).to(device)
        for name, part in zip(names, packed.split([len(x) for x in padded]), strict=True):
            setattr(self, name, part)


@lru_cache(maxsize=1024)
def _device_plan(
    q_ranges: bytes, kv_indptr: bytes, kv_ranges: bytes, block_q: int, block_k: int, device: torch.device
) -> DevicePlan:
    return DevicePlan(plan(*_arrays(q_ranges, kv_indptr, kv_ranges), block_q, block_k), device)


def _arrays(q_ranges: bytes, kv_indptr: bytes, kv_ranges: bytes):
    q, p, k = (np.frombuffer(x, dtype=np.int32) for x in (q_ranges, kv_indptr, kv_ranges))
    return q.reshape(-1, 2), p, k.reshape(-1, 2)
