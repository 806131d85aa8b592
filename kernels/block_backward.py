"""Triton kernels of a Wan block's backward pass, of the parts that no public op covers.

GELU and the first bias of the MLP; the MLP's gate and last weight from products by segment; the RMS norm of the queries
that attend to the text. Sums over tokens are float32: a program writes its share, and the shares are added up in an
order that only the shapes decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1056  # blocks of tokens of the norm's backward, about


@triton.jit
def _gelu_kernel(hidden_ptr, grad_ptr, share_ptr, tokens, width, ROWS: tl.constexpr, STEP: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """grad *= gelu'(hidden) in place, both [tokens, width]; share [blocks, width] is its sum over ROWS tokens."""
    block = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for first in range(0, ROWS, STEP):
        token = block * ROWS + first + tl.arange(0, STEP)
        at = token.to(tl.int64)[:, None] * width + column[None, :]
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(hidden_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        # tanh(u) = 2 sigmoid(2 u) - 1 with u = sqrt(2 / pi) (x + 0.044715 x^3)
        square = x * x
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * square)))
        slope = sigmoid + x * sigmoid * (1.0 - sigmoid) * (1.5957691216057308 + 0.21406573 * square)
        grad *= slope
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        total += grad
    tl.store(share_ptr + block.to(tl.int64) * width + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _weigh_kernel(products_ptr, weight_ptr, gate_ptr, dgate_ptr, dweight_ptr, rows, width, segments,
                  FIRST: tl.constexpr, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One row of products [segments, rows, width]: weighted by its gates, and multiplied with the row of the weight."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    gate = tl.load(gate_ptr + segment * rows + row, mask=segment < segments, other=0.0)
    dot = tl.zeros([SEGMENTS, COLUMNS], tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < width
        at = segment.to(tl.int64)[:, None] * rows * width + row * width + column[None, :]
        product = tl.load(products_ptr + at, mask=(segment < segments)[:, None] & mask[None, :], other=0.0)
        weight = tl.load(weight_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        dot += product * weight[None, :]
        total = tl.sum(product * gate[:, None], axis=0)
        if not FIRST:
            total += tl.load(dweight_ptr + row * width + column, mask=mask, other=0.0)
        tl.store(dweight_ptr + row * width + column, total, mask=mask)
    tl.store(dgate_ptr + segment * rows + row, tl.sum(dot, axis=1), mask=segment < segments)


@triton.jit
def _norm_kernel(x_ptr, grad_ptr, weight_ptr, rstd_ptr, dx_ptr, share_ptr, tokens, C: tl.constexpr, P: tl.constexpr,
                 ROWS):  # fmt: skip
    """RMS norm backward over [tokens, C]: dx, and a program's share [programs, C] of the weight's gradient."""
    program = tl.program_id(0)
    channel = tl.arange(0, P)
    inside = channel < C
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    share = tl.zeros([P], tl.float32)
    for token in range(program * ROWS, tl.minimum((program + 1) * ROWS, tokens)):
        at = tl.cast(token, tl.int64) * C + channel
        rstd = tl.load(rstd_ptr + token)
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        share += grad * normed
        scaled = grad * weight
        along = tl.sum(scaled * normed, axis=0) / C
        tl.store(dx_ptr + at, (rstd * (scaled - normed * along)).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(share_ptr + program.to(tl.int64) * C + channel, share, mask=inside)


GELU = {"ROWS": 128, "STEP": 2, "COLUMNS": 1024}


def gelu_backward(hidden: Tensor, grad: Tensor) -> Tensor:
    """``grad *= gelu'(hidden)`` (tanh form) in place, ``[L, K]``, grad packed; returns its sum over L, float32."""
    tokens, width = hidden.shape
    assert grad.is_contiguous()
    hidden = hidden.contiguous()
    blocks = triton.cdiv(tokens, GELU["ROWS"])
    share = torch.empty((blocks, width), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _gelu_kernel[(triton.cdiv(width, GELU["COLUMNS"]), blocks)](
            hidden, grad, share, tokens, width, **GELU, num_warps=4
        )
    return share.sum(0)


def weigh_products(products: Tensor, weight: Tensor, gate: Tensor, dgate: Tensor, dweight: Tensor, first: bool) -> None:
    """``dgate[s, c] = sum_k products[s, c, k] weight[c, k]``, ``dweight[c, k] += sum_s gate[s, c] products[s, c, k]``.

    ``products`` ``[S, C, K]``, ``gate``, ``dgate`` ``[S, C]``, ``dweight`` ``[C, K]``: float32, the results packed;
    ``first`` writes ``dweight`` instead of adding to it.
    """
    segments, rows, width = products.shape
    assert dgate.is_contiguous() and dweight.is_contiguous()
    products, weight, gate = products.contiguous(), weight.contiguous(), gate.contiguous()
    size = triton.next_power_of_2(segments)
    with torch.cuda.device_of(products):
        _weigh_kernel[(rows,)](
            products, weight, gate, dgate, dweight, rows, width, segments, first, size, 4096 // size, num_warps=4
        )


def rms_norm_backward(x: Tensor, grad: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` ``[L, C]`` and ``weight`` ``[C]`` of ``x * rstd * weight``; rstd ``[L]`` is 1 / RMS of x."""
    tokens, channels = x.shape
    x, grad, weight, rstd = (t.contiguous() for t in (x, grad, weight, rstd))
    rows = triton.cdiv(tokens, PROGRAMS)
    programs = triton.cdiv(tokens, rows)
    dx = torch.empty_like(x)
    share = torch.empty((programs, channels), dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        _norm_kernel[(programs,)](
            x, grad, weight, rstd, dx, share, tokens, channels, size, rows, num_warps=min(max(size // 1024, 1), 16)
        )
    return dx, share.sum(0).to(weight.dtype)


def aot_cases() -> Iterator[tuple]:
    """What the compiler test builds."""
    for kind in ("*bf16", "*fp16", "*fp32"):
        signature = dict.fromkeys(("hidden_ptr", "grad_ptr"), kind) | {"share_ptr": "*fp32"}
        yield _gelu_kernel, signature | dict.fromkeys(("tokens", "width"), "i32"), GELU, {"num_warps": 4}
        names = ("products_ptr", "gate_ptr", "dgate_ptr", "dweight_ptr")
        signature = dict.fromkeys(names, "*fp32") | {"weight_ptr": kind}
        signature |= dict.fromkeys(("rows", "width", "segments"), "i32")
        yield _weigh_kernel, signature, {"FIRST": False, "SEGMENTS": 8, "COLUMNS": 512}, {"num_warps": 4}
        signature = dict.fromkeys(("x_ptr", "grad_ptr", "weight_ptr", "dx_ptr"), kind)
        signature |= dict.fromkeys(("rstd_ptr", "share_ptr"), "*fp32") | dict.fromkeys(("tokens", "ROWS"), "i32")
        yield _norm_kernel, signature, {"C": 1536, "P": 2048}, {"num_warps": 2}
