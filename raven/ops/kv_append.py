"""Public op: norm and rotary of the chunk in flight, and the write of its keys and values into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raven import backends, rows
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops.qk_norm_rope import DTYPES, check_arguments, cuda_reason, triton_reason, weight_arguments
from raven.reference import kv_append as reference

if TYPE_CHECKING:
    from raven.cache import KVCache


def kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    cache: KVCache,
    layer: int,
    eps: float = 1e-6,
    theta: float = 10000.0,
    per_head: bool = False,
) -> torch.Tensor:
    """Normalise and rotate q and k as ``qk_norm_rope`` does, write k and v into ``cache``, and return q.

    Writes the rows ``cache.slots`` of ``cache.k[layer]`` and ``cache.v[layer]``, the slot of the chunk in flight, and
    nothing else; values are copied bit for bit when the dtypes agree. One pass over memory, nothing is read back to
    the host. Doing it again with the same arguments leaves the same bits.

    Args:
        q: ``[B, L, H, D]``; k, v: ``[B, L, Hk, D]``; other arguments as in ``qk_norm_rope``. ``L`` is the length of
            ``cache.slots``.
        cache: an open ``KVCache`` (after ``begin``) whose buffers are ``[B, S, Hk, D]`` of any floating dtype. One of
            float8 e4m3 gets, for each head of a token, a scale of amax / 448 and the numbers divided by it. One with
            ``keys="raw"`` gets normalised keys without rotation; only q is rotated then.
        layer: index of the layer whose buffers are written.

    Returns:
        New queries, ``[B, L, H, D]``, packed.

    Raises:
        ValueError: shapes, devices or the layer do not fit; or a gradient is asked for. A write in place has none:
            it is for generation, under ``torch.no_grad()``.
        TypeError: an unsupported dtype, or k or v of another dtype than q.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_no_tangent("kv_append", q, k, v, q_weight, k_weight)
    check_arguments(q, k, q_weight, k_weight, positions, eps, theta, per_head)
    check_shape("v", v, tuple(k.shape))
    check_dtype("v", v, (q.dtype,))
    check_same_device("v", v, "q", q)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("q_weight", q_weight), ("k_weight", k_weight)):
            if x is not None and x.requires_grad:
                raise ValueError(f"{name}: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    if not 0 <= layer < len(cache.k):
        raise ValueError(f"layer: got {layer}, expected 0 to {len(cache.k) - 1}")
    B, L, Hk, D = k.shape
    slots, k_cache, v_cache = cache.slots, cache.k[layer], cache.v[layer]
    if slots.shape[0] != L:
        raise ValueError(f"k: got {L} tokens, expected {slots.shape[0]} like the chunk in flight of the cache")
    check_shape("cache.k", k_cache, (B, "S", Hk, D))
    check_shape("cache.v", v_cache, tuple(k_cache.shape))
    for name, x in (("cache.k", k_cache), ("cache.v", v_cache)):
        check_dtype(name, x, (*DTYPES, torch.float8_e4m3fn))
        check_same_device(name, x, "q", q)
    check_dtype("cache.v", v_cache, (k_cache.dtype,))
    arguments = (q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache)
    options = (float(eps), float(theta), per_head, cache.keys == "rotated")
    k_scale, v_scale = cache.k_scale[layer], cache.v_scale[layer]
    if k_scale is None or v_scale is None:
        return _kv_append(*arguments, *options)
    return _kv_append_float8(*arguments, k_scale, v_scale, *options)


@torch.library.custom_op("raven::kv_append", mutates_args=("k_cache", "v_cache"))
def _kv_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    eps: float,
    theta: float,
    per_head: bool,
    rotate_keys: bool = True,
) -> torch.Tensor:
    scales = None, None
    return _run(
        q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, *scales, rotate_keys, eps, theta, per_head
    )


@_kv_append.register_fake
def _(q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, eps, theta, per_head, rotate_keys=True):
    return q.new_empty(q.shape)


# An op of its own: PyTorch 2.11 fails on mutated arguments that are None.
@torch.library.custom_op("raven::kv_append_float8", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def _kv_append_float8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    eps: float,
    theta: float,
    per_head: bool,
    rotate_keys: bool = True,
) -> torch.Tensor:
    scales = k_scale, v_scale
    return _run(
        q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, *scales, rotate_keys, eps, theta, per_head
    )


@_kv_append_float8.register_fake
def _(
    q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, k_scale, v_scale, eps, theta, per_head,
    rotate_keys=True,
):  # fmt: skip
    return q.new_empty(q.shape)


def _run(
    q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, k_scale, v_scale, rotate_keys, eps, theta, per_head
):
    backend = backends.select("kv_append", q, k, v, q_weight, k_weight, k_cache, v_cache)
    if backend == "cuda":
        run = _cuda_append
    elif backend == "triton":
        from raven.kernels.kv_append import append as run
    else:
        run = reference.kv_append
    options = (eps, theta, per_head, k_scale, v_scale, rotate_keys)
    return run(q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, *options)


def _cuda_append(
    q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, eps, theta, per_head, k_scale, v_scale, rotate_keys
):
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0] * q.shape[1]:
        with torch.cuda.device_of(q):
            torch.ops.raven_cuda.norm_rope_rows(
                *map(rows.aligned_rows, (q, k, v)), q_out, k_cache, v_cache, k_scale, v_scale,
                *weight_arguments(q_weight), *weight_arguments(k_weight), positions.contiguous(), slots.contiguous(),
                rows.frequency_table(q.shape[-1], theta, q.device), eps, per_head, rotate_keys,
            )  # fmt: skip
    return q_out


def _caches(tensors: tuple[object, ...]) -> list[tuple[str, torch.Tensor]]:
    """The caches among the arguments of ``select``, by name."""
    return [(n, x) for n, x in zip(("k_cache", "v_cache"), tensors[5:7], strict=False) if isinstance(x, torch.Tensor)]


def _cuda_reason(*tensors: object) -> str | None:
    q = tensors[0] if tensors else None
    for name, x in _caches(tensors):
        if isinstance(q, torch.Tensor) and x.dtype not in (q.dtype, torch.float8_e4m3fn):
            return f"{name} has dtype {x.dtype}, neither that of q nor float8_e4m3fn"
        if not rows.are_aligned(x):
            return (
                f"{name} has strides {x.stride()}: heads of a row must be packed, rows begin at multiples of 16 bytes"
            )
    return cuda_reason(*tensors)


def _triton_reason(*tensors: object) -> str | None:
    for name, x in _caches(tensors):
        if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
            return f"{name} has strides {x.stride()}, and the heads of a row must be packed"
        if x.dtype == torch.float8_e4m3fn:
            if backends.interpreting():
                return f"{name} has dtype float8_e4m3fn, which Triton's interpreter does not compute"
            if x.is_cuda and backends.capability(x.device.index) < (8, 9):
                return f"{name} has dtype float8_e4m3fn, which needs compute capability (8, 9)"
    return triton_reason(*tensors)


backends.register("kv_append", cuda=_cuda_reason, triton=_triton_reason, reference=backends.always)
