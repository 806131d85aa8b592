"""Triton kernels of `consistency_step`: one pass over memory forward, one backward.

A tensor is seen as ``[rows, C, F, P]`` where one level holds for all of a row's frame; when a level holds for a whole
sample, that sample is a single frame. A program owns a piece of one run of P elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _place(C, F, P, splits, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    split = pid % splits
    row = pid // splits
    f = row % F
    b = row // F // C
    offsets = split * BLOCK + tl.arange(0, BLOCK)
    return b.to(tl.int64), f.to(tl.int64), row.to(tl.int64) * P, offsets, offsets < P


@triton.jit
def _step(
    v_ptr, x_t_ptr, noise_ptr, t_ptr, s_ptr, out_ptr, C, F, P, splits, stride_tb, stride_tf, stride_sb, stride_sf,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, f, start, offsets, mask = _place(C, F, P, splits, BLOCK)
    t = tl.load(t_ptr + b * stride_tb + f * stride_tf)
    s = tl.load(s_ptr + b * stride_sb + f * stride_sf)
    # Levels on the device cannot be refused without a synchronisation: a bad one gives NaN.
    a = tl.where((s >= 0) & (s <= 1) & (t >= 0) & (t <= 1), 1.0 - s, float("nan"))
    v = tl.load(v_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    x_t = tl.load(x_t_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    x_s = a * (x_t - t * v)
    if HAS_NOISE:
        x_s += s * tl.load(noise_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offsets, x_s, mask=mask)


@triton.jit
def _gradients(
    grad_ptr, t_ptr, s_ptr, d_v_ptr, d_x_t_ptr, d_noise_ptr, C, F, P, splits,
    stride_tb, stride_tf, stride_sb, stride_sf,
    NEED_V: tl.constexpr, NEED_X_T: tl.constexpr, NEED_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, f, start, offsets, mask = _place(C, F, P, splits, BLOCK)
    t = tl.load(t_ptr + b * stride_tb + f * stride_tf)
    s = tl.load(s_ptr + b * stride_sb + f * stride_sf)
    a = tl.where((s >= 0) & (s <= 1) & (t >= 0) & (t <= 1), 1.0 - s, float("nan"))
    grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if NEED_V:
        tl.store(d_v_ptr + start + offsets, -(t * a) * grad, mask=mask)
    if NEED_X_T:
        tl.store(d_x_t_ptr + start + offsets, a * grad, mask=mask)
    if NEED_NOISE:
        tl.store(d_noise_ptr + start + offsets, s * grad, mask=mask)


def _sizes(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> tuple[int, int, int, int]:
    """C, F, P and the number of programs along P: frames only matter when a level changes from frame to frame."""
    if t.shape[1] == 1 and s.shape[1] == 1:
        C, F, P = 1, 1, x.numel() // x.shape[0]
    else:
        C, F = x.shape[1], x.shape[2]
        P = x.numel() // (x.shape[0] * C * F)
    return C, F, P, triton.cdiv(P, _block(P))


def _block(P: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(P)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def _strides(level: torch.Tensor) -> tuple[int, int]:
    return level.stride(0), 0 if level.shape[1] == 1 else level.stride(1)


def _device(x: torch.Tensor):
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def forward(
    v: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor | None, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """``x_s`` like ``x_t``, contiguous; t and s ``[B, 1]`` or ``[B, F]`` float32 of any strides."""
    out = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    if x_t.numel() == 0:
        return out
    C, F, P, splits = _sizes(x_t, t, s)
    v, x_t = v.contiguous(), x_t.contiguous()
    noise = None if noise is None else noise.contiguous()
    with _device(x_t):
        _step[(x_t.shape[0] * C * F * splits,)](
            v, x_t, noise, t, s, out, C, F, P, splits, *_strides(t), *_strides(s),
            HAS_NOISE=noise is not None, BLOCK=_block(P), num_warps=_warps(_block(P)),
        )  # fmt: skip
    return out


def backward(
    grad: torch.Tensor, t: torch.Tensor, s: torch.Tensor, dtypes: Sequence[torch.dtype], wanted: Sequence[bool]
) -> list[torch.Tensor]:
    """The wanted ones of the gradients of v, x_t and noise, in the given dtypes, contiguous."""
    outs = [
        torch.empty(grad.shape, dtype=d, device=grad.device) if want else None
        for d, want in zip(dtypes, wanted, strict=True)
    ]
    found = [x for x in outs if x is not None]
    if not found or grad.numel() == 0:
        return found
    C, F, P, splits = _sizes(grad, t, s)
    grad = grad.contiguous()
    with _device(grad):
        _gradients[(grad.shape[0] * C * F * splits,)](
            grad, t, s, *outs, C, F, P, splits, *_strides(t), *_strides(s),
            NEED_V=wanted[0], NEED_X_T=wanted[1], NEED_NOISE=wanted[2], BLOCK=_block(P), num_warps=_warps(_block(P)),
        )  # fmt: skip
    return found


def aot_cases() -> Iterator[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """What an ahead-of-time compile covers: ``(kernel, signature, constexprs, options)``."""
    ints = dict.fromkeys(("C", "F", "P", "splits", "stride_tb", "stride_tf", "stride_sb", "stride_sf"), "i32")
    levels = {"t_ptr": "*fp32", "s_ptr": "*fp32"}
    options = {"num_warps": _warps(BLOCK)}
    for dtype in ("*fp32", "*bf16", "*fp16"):
        tensors = {"v_ptr": dtype, "x_t_ptr": dtype, "noise_ptr": dtype, **levels, "out_ptr": dtype}
        yield _step, {**tensors, **ints}, {"HAS_NOISE": True, "BLOCK": BLOCK}, options
        tensors = {"grad_ptr": dtype, **levels, "d_v_ptr": dtype, "d_x_t_ptr": dtype, "d_noise_ptr": "constexpr"}
        needs = {"NEED_V": True, "NEED_X_T": True, "NEED_NOISE": False, "d_noise_ptr": None, "BLOCK": BLOCK}
        yield _gradients, {**tensors, **ints}, needs, options
