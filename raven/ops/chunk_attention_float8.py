"""Public op: attention whose scores are float8 products, on keys as a float8 cache stores them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops import _chunk_attention_gluon as gluon
from raven.ops.chunk_attention import DTYPES, _contents, _covered
from raven.ops.gaussian_step import on_device
from raven.ops.quantize_rows import quantize_rows
from raven.reference import chunk_attention_float8 as reference

if TYPE_CHECKING:
    from raven.layout import ChunkLayout, Spans

FLOAT8 = torch.float8_e4m3fn


def chunk_attention_float8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ChunkLayout | Spans,
    k_scale: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """``chunk_attention`` with keys in float8 and queries rounded to it; for inference.

    Each head of a query is rounded with a scale of its own (``quantize_rows``), the scores are products of float8
    numbers summed in float32, and everything after them is as in ``chunk_attention``: values are not rounded. On
    Hopper this takes less time than scaling the keys back; other GPUs have no kernel for it.

    Args:
        q: ``[B, Lq, H, D]``, bfloat16 or float16 (others on the reference only).
        k: ``[B, Lk, Hkv, D]`` float8_e4m3fn, as ``kv_append`` writes it into a ``KVCache``.
        v: ``[B, Lk, Hkv, D]``, dtype of q.
        layout: who sees whom, as in ``chunk_attention``.
        k_scale: ``[B, Lk, Hkv]`` float32: what each head of a key is multiplied by.
        scale: factor on the scores; default ``D ** -0.5``.

    Returns:
        ``[B, Lq, H, D]`` like q. A query that sees no key gives 0.

    Raises:
        ValueError: shapes, devices or a layout that do not fit; or a gradient is asked for: rounding has none.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_shape("q", q, ("B", "Lq", "H", "D"))
    check_shape("k", k, (q.shape[0], "Lk", "Hkv", q.shape[3]))
    check_shape("v", v, tuple(k.shape))
    check_shape("k_scale", k_scale, tuple(k.shape[:3]))
    check_dtype("q", q, DTYPES)
    check_dtype("k", k, (FLOAT8,))
    check_dtype("v", v, (q.dtype,))
    check_dtype("k_scale", k_scale, (torch.float32,))
    for name, x in (("k", k), ("v", v), ("k_scale", k_scale)):
        check_same_device(name, x, "q", q)
    Lq, Lk, H = q.shape[1], k.shape[1], q.shape[2]
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, expected a divisor of the {H} heads of q")
    check_no_tangent("chunk_attention_float8", q, v, k_scale)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("v", v), ("k_scale", k_scale)):
            if x.requires_grad:
                raise ValueError(f"{name}: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    spans = getattr(layout, "spans", layout)
    if not hasattr(spans, "kv_ranges"):
        raise TypeError(f"layout: got {type(layout).__name__}, expected ChunkLayout or Spans")
    if spans.q_end > Lq or spans.kv_end > Lk:
        raise ValueError(
            f"layout: got ranges that reach query {spans.q_end} and key {spans.kv_end}, "
            f"expected at most {Lq} (length of q) and {Lk} (length of k)"
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a positive finite number")
    lists = (spans.q_ranges, spans.kv_indptr, spans.kv_ranges)
    backends.select("chunk_attention_float8", v)  # says what is missing before anything runs
    return _chunk_attention_float8(*quantize_rows(q), k, k_scale, v, *lists, float(scale))


@torch.library.custom_op("raven::chunk_attention_float8", mutates_args=())
def _chunk_attention_float8(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_ranges: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    lists = (q_ranges, kv_indptr, kv_ranges)
    if backends.select("chunk_attention_float8", v) == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunk_attention_float8(q, q_scale, k, k_scale, v, *lists, scale)
    ranges = _contents(*lists)
    # The kernel writes only the rows of query ranges; the rest of an incomplete cover must still be defined.
    complete = _covered(ranges[0]) == q.shape[1] and k.numel() > 0
    out = (torch.empty if complete else torch.zeros)(q.shape, dtype=v.dtype, device=q.device)
    if q.numel() and k.numel():
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
        with on_device(q):
            gluon.forward(q, k, v, out, lse, ranges, scale, q_scale.contiguous(), k_scale.contiguous())
    return out


@_chunk_attention_float8.register_fake
def _(q, q_scale, k, k_scale, v, q_ranges, kv_indptr, kv_ranges, scale):
    return v.new_empty(q.shape)


def _triton_reason(v: object = None, *others: object) -> str | None:
    return gluon.reason(v) if isinstance(v, torch.Tensor) else gluon.compiler_reason()


backends.register("chunk_attention_float8", triton=_triton_reason, reference=backends.always)
