"""Public op: norm and rotary of the chunk in flight, and the write of its keys and values into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops.qk_norm_rope import DTYPES, check_arguments, triton_reason
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
        cache: an open ``KVCache`` (after ``begin``) whose buffers are ``[B, S, Hk, D]`` of any floating dtype.
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
        check_dtype(name, x, DTYPES)
        check_same_device(name, x, "q", q)
    return _kv_append(
        q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, float(eps), float(theta), per_head
    )


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
) -> torch.Tensor:
    if backends.select("kv_append", q, k, v, q_weight, k_weight, k_cache, v_cache) == "reference":
        run = reference.kv_append
    else:
        from raven.kernels.kv_append import append as run
    return run(q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, eps, theta, per_head)


@_kv_append.register_fake
def _(q, k, v, q_weight, k_weight, positions, slots, k_cache, v_cache, eps, theta, per_head):
    return q.new_empty(q.shape)


def _triton_reason(*tensors: object) -> str | None:
    for name, x in zip(("k_cache", "v_cache"), tensors[-2:], strict=False):
        if isinstance(x, torch.Tensor) and x.ndim == 4 and (x.stride(3) != 1 or x.stride(2) != x.shape[3]):
            return f"{name} has strides {x.stride()}, and the heads of a row must be packed"
    return triton_reason(*tensors)


backends.register("kv_append", triton=_triton_reason, reference=backends.always)
