"""A moving average of cache rows in place: each number is read and written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4


@triton.jit
def _blend_kernel(
    mean_ptr, lost_ptr, new_ptr, count, cache_batch, lost_batch, alpha, rest, BLOCK: tl.constexpr
):  # fmt: skip
    """count numbers in a row, of batch entry program_id(1)."""
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    mean_ptr += batch * cache_batch
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(new_ptr + batch * cache_batch + at, mask=inside, other=0.0).to(tl.float32)
    if lost_ptr is not None:
        lost_ptr += batch * lost_batch
        mean += tl.load(lost_ptr + at, mask=inside, other=0.0).to(tl.float32)
    exact = alpha * mean + rest * new
    rounded = exact.to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + at, rounded, mask=inside)
    if lost_ptr is not None:
        tl.store(lost_ptr + at, (exact - rounded.to(tl.float32)).to(lost_ptr.dtype.element_ty), mask=inside)


def blend(cache: Tensor, lost: Tensor | None, target: int, source: int, tokens: int, alpha: float) -> None:
    """Arguments as in ``raven.ops.blend_rows``, with the rows of a batch entry packed."""
    count = tokens * cache.shape[2] * cache.shape[3]
    if not cache.shape[0] * count:
        return
    with torch.cuda.device_of(cache):
        _blend_kernel[(triton.cdiv(count, BLOCK), cache.shape[0])](
            cache[:, target:], lost, cache[:, source:], count, cache.stride(0),
            0 if lost is None else lost.stride(0), alpha, 1 - alpha, BLOCK, num_warps=WARPS,
        )  # fmt: skip


def aot_cases() -> Iterator[tuple]:
    """Cases for ahead-of-time compilation: (kernel, signature, constants, options)."""
    for dtype, kept in (("bf16", True), ("fp32", False)):
        signature = {"mean_ptr": "*" + dtype, "new_ptr": "*" + dtype, "alpha": "fp32", "rest": "fp32"}
        signature |= dict.fromkeys(("count", "cache_batch", "lost_batch"), "i32")
        constants: dict[str, object] = {"BLOCK": BLOCK}
        if kept:
            signature["lost_ptr"] = "*" + dtype
        else:
            constants["lost_ptr"] = None
        yield _blend_kernel, signature, constants, {"num_warps": WARPS}
