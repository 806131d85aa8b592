"""Public op: rows in float8 with a scale each, as a row-wise scaled matrix product takes them."""

from __future__ import annotations

import torch

from raven import backends
from raven.errors import check_dtype, check_no_tangent
from raven.reference import quantize_rows as reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# A program of the kernel holds a whole row.
MAX_CHANNELS = 32768


def quantize_rows(x: torch.Tensor, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide every row by its scale, the row's largest magnitude / 448, and round it to float8 e4m3.

    The rule of float8 storage in the cache: a row whose largest magnitude is below 2^-64 is scaled as if it were that;
    a NaN or an infinity makes its whole row NaN when it is scaled back. Computed in float32 (float64 for float64) and
    rounded once; one pass over memory.

    Args:
        x: ``[..., C]``, bfloat16, float16, float32, or float64 (on the reference only). Rows with any stride between
            them are read in place.
        gelu: apply GELU first, in its tanh form, without a rounding in between.

    Returns:
        ``[..., C]`` float8_e4m3fn and ``[...]`` float32, both packed; their product is x, or its GELU.

    Raises:
        ValueError: x has no channels, or a gradient is asked for: rounding has none.
        TypeError: an unsupported dtype.
        BackendUnavailableError: the backend asked for by name cannot run this tensor.
    """
    check_dtype("x", x, DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., C] with at least one channel")
    check_no_tangent("quantize_rows", x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: got requires_grad=True, expected no gradient: call under torch.no_grad()")
    return _quantize_rows(x, gelu)


@torch.library.custom_op("raven::quantize_rows", mutates_args=())
def _quantize_rows(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if backends.select("quantize_rows", x) == "triton":
        from raven.kernels.quantize_rows import quantize

        return quantize(x, gelu)
    stored, scale = reference.quantize_rows(x, gelu)
    return stored.contiguous(), scale.contiguous()


@_quantize_rows.register_fake
def _(x, gelu):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _triton_reason(x: object = None, *others: object) -> str | None:
    if isinstance(x, torch.Tensor):
        if not 1 <= x.shape[-1] <= MAX_CHANNELS:
            return f"x has rows of {x.shape[-1]} channels, not 1 to {MAX_CHANNELS}"
        if backends.interpreting() and not x.is_cuda:
            return "the result has dtype float8_e4m3fn, which Triton's interpreter does not compute"
        if x.is_cuda and backends.capability(x.device.index) < (8, 9):
            return "the result has dtype float8_e4m3fn, which needs compute capability (8, 9)"
    return backends.triton_reason(x, *others)


backends.register("quantize_rows", triton=_triton_reason, reference=backends.always)
