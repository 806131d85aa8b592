"""Public op: rows of a cache averaged into others, in place."""

from __future__ import annotations

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops.chunk_attention import MAX_GRID
from raven.ops.qk_norm_rope import DTYPES
from raven.reference import blend_rows as reference
from raven.spans import check_int


def blend_rows(
    cache: torch.Tensor, lost: torch.Tensor | None, target: int, source: int, tokens: int, alpha: float
) -> None:
    """Replace rows by ``alpha * cache[:, target + i] + (1 - alpha) * cache[:, source + i]``, i < ``tokens``, in place.

    With ``lost`` the first term is ``alpha * (cache[:, target + i] + lost[:, i])``, and ``lost[:, i]`` becomes what
    rounding the new row took away: small steps add up that the dtype of the cache could not hold. Computed in float32
    (float64 for float64), one pass over memory.

    Args:
        cache: ``[B, S, H, D]``, any floating dtype.
        lost: ``[B, T, H, D]`` with T at least ``tokens``, of the cache's dtype, zero at first; or ``None``.
        target, source: first rows of the two ranges, which do not overlap.
        tokens: how many rows.
        alpha: in [0, 1].

    Raises:
        ValueError: shapes, devices, ranges or alpha do not fit; or a gradient is asked for. A write in place has none.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_shape("cache", cache, ("B", "S", "H", "D"))
    check_dtype("cache", cache, DTYPES)
    B, S, H, D = cache.shape
    check_int("tokens", tokens, 0)
    for name, first in (("target", target), ("source", source)):
        if check_int(name, first, 0) + tokens > S:
            raise ValueError(f"{name}: got rows {first} to {first + tokens}, expected rows below {S}")
    if abs(target - source) < tokens:
        raise ValueError(f"source: got row {source}, expected {tokens} rows that do not overlap those from {target} on")
    if lost is not None:
        check_shape("lost", lost, (B, "T", H, D))
        check_dtype("lost", lost, (cache.dtype,))
        check_same_device("lost", lost, "cache", cache)
        if lost.shape[1] < tokens:
            raise ValueError(f"lost: got {lost.shape[1]} rows, expected at least {tokens}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, expected a number from 0 to 1")
    check_no_tangent("blend_rows", cache, lost)
    for name, x in (("cache", cache), ("lost", lost)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    if lost is None:
        _blend_rows(cache, target, source, tokens, float(alpha))
    else:
        _blend_rows_exactly(cache, lost, target, source, tokens, float(alpha))


@torch.library.custom_op("raven::blend_rows", mutates_args=("cache",))
def _blend_rows(cache: torch.Tensor, target: int, source: int, tokens: int, alpha: float) -> None:
    _run(cache, None, target, source, tokens, alpha)


@_blend_rows.register_fake
def _(cache, target, source, tokens, alpha):
    return None


# An op of its own: PyTorch 2.11 fails on mutated arguments that are None.
@torch.library.custom_op("raven::blend_rows_exactly", mutates_args=("cache", "lost"))
def _blend_rows_exactly(
    cache: torch.Tensor, lost: torch.Tensor, target: int, source: int, tokens: int, alpha: float
) -> None:
    _run(cache, lost, target, source, tokens, alpha)


@_blend_rows_exactly.register_fake
def _(cache, lost, target, source, tokens, alpha):
    return None


def _run(cache, lost, target, source, tokens, alpha):
    if backends.select("blend_rows", cache, lost) == "triton":
        from raven.kernels.blend_rows import blend
    else:
        blend = reference.blend_rows
    blend(cache, lost, target, source, tokens, alpha)


def _triton_reason(*tensors: object) -> str | None:
    for name, x in zip(("cache", "lost"), tensors, strict=False):
        if not isinstance(x, torch.Tensor):
            continue
        if x.shape[0] > MAX_GRID:
            return f"{name} has batch {x.shape[0]}, more than the {MAX_GRID} of a launch grid"
        if x[0:1].numel() and not x[0].is_contiguous():
            return f"{name} has strides {x.stride()}, and the rows of a batch entry must be packed"
    return backends.triton_reason(*tensors)


backends.register("blend_rows", triton=_triton_reason, reference=backends.always)
