"""Public op: rows of a key/value cache as attention takes them, computed into a buffer that all layers share."""

from __future__ import annotations

import math

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent, check_same_device, check_shape
from raven.ops.chunk_attention import MAX_GRID
from raven.ops.qk_norm_rope import DTYPES, HEAD_DIMS
from raven.reference import read_rows as reference


def read_rows(
    cache: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    theta: float = 10000.0,
) -> None:
    """Write ``out[:, r] = rotate(cache[:, r] * scale[:, r], positions[i])`` for every ``r = rows[i]``, in place.

    One pass over memory, computed in float32 and rounded once; other rows of ``out`` are left as they are.

    Args:
        cache: keys or values ``[B, S, H, D]``, of any floating dtype or float8_e4m3fn.
        rows: int32 ``[R]`` on the same device, which rows, each at most once; a negative one is left out.
        out: ``[B, S, H, D]``, bfloat16, float16, float32 (float64 on the reference only).
        scale: float32 ``[B, S, H]``, what each head of a row is multiplied by, such as the scales of a float8 cache.
        positions: int32 ``[R, 3]``, (frame, row, column) of every row: turn its interleaved channel pairs as
            ``qk_norm_rope`` does (keys that are stored raw). ``None``: as they are.
        theta: base of the rotary frequencies.

    Raises:
        ValueError: shapes, devices or theta do not fit; or a gradient is asked for. A write in place has none.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run these tensors.
    """
    check_shape("cache", cache, ("B", "S", "H", "D"))
    check_shape("out", out, tuple(cache.shape))
    check_shape("rows", rows, ("R",))
    check_dtype("cache", cache, (*DTYPES, torch.float8_e4m3fn))
    check_dtype("out", out, DTYPES)
    check_dtype("rows", rows, (torch.int32,))
    if scale is not None:
        check_shape("scale", scale, tuple(cache.shape[:3]))
        check_dtype("scale", scale, (torch.float32,))
    if positions is not None:
        check_shape("positions", positions, (rows.shape[0], 3))
        check_dtype("positions", positions, (torch.int32,))
        if cache.shape[3] % 2 or cache.shape[3] == 0:
            raise ValueError(f"cache: got head dim {cache.shape[3]}, expected an even number for a rotation")
    for name, x in (("rows", rows), ("out", out), ("scale", scale), ("positions", positions)):
        if x is not None:
            check_same_device(name, x, "cache", cache)
    if not 0 < theta < math.inf:
        raise ValueError(f"theta: got {theta}, expected a positive finite number")
    check_no_tangent("read_rows", cache, out, scale)
    for name, x in (("cache", cache), ("out", out), ("scale", scale)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    _read_rows(cache, rows, out, scale, positions, float(theta))


@torch.library.custom_op("raven::read_rows", mutates_args=("out",))
def _read_rows(
    cache: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    theta: float,
) -> None:
    if backends.select("read_rows", cache, out, scale) == "triton":
        from raven.kernels.read_rows import read
    else:
        read = reference.read_rows
    read(cache, rows, out, scale, positions, theta)


@_read_rows.register_fake
def _(cache, rows, out, scale, positions, theta):
    return None


def _triton_reason(cache: object = None, out: object = None, scale: object = None, *others: object) -> str | None:
    for name, x in (("cache", cache), ("out", out)):
        if isinstance(x, torch.Tensor):
            if x.shape[0] > MAX_GRID:
                return f"{name} has batch {x.shape[0]}, more than the {MAX_GRID} of a launch grid"
            if x.shape[3] not in HEAD_DIMS:
                return f"head dim {x.shape[3]} is not one of {', '.join(map(str, HEAD_DIMS))}"
            if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
                return f"{name} has strides {x.stride()}, and the heads of a row must be packed"
            if x.dtype == torch.float8_e4m3fn:
                if backends.interpreting() and not x.is_cuda:
                    return f"{name} has dtype float8_e4m3fn, which Triton's interpreter does not compute"
                if x.is_cuda and backends.capability(x.device.index) < (8, 9):
                    return f"{name} has dtype float8_e4m3fn, which needs compute capability (8, 9)"
    if isinstance(scale, torch.Tensor) and (scale.stride(2) != 1 or scale.stride(1) != scale.shape[2]):
        return f"scale has strides {scale.stride()}, and the heads of a row must be packed"
    return backends.triton_reason(cache, out, scale, *others)


backends.register("read_rows", triton=_triton_reason, reference=backends.always)
