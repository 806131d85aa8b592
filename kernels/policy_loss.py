"""Triton kernel of `policy_loss`: loss, log-density and the velocity's gradient in one pass over memory.

Pieces, cells and counters are those of `gaussian_log_prob`; the program that finishes the last row adds the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from raven.kernels.gaussian_log_prob import (
    ROW_BLOCK,
    SIZES,
    STRIDES,
    Config,
    arrivals,
    default_config,
    launch,
    level_at,
    pieces,
    plain,
    residual,
    row_density,
    run_of,
    strides,
    tables,
    valid,
)
from raven.ops.gaussian_step import Chunks, borders, on_device, workspace


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "stride_advantages", "rows", "gain"])
def _policy_loss(
    v_ptr, x_t_ptr, x_s_ptr, t_ptr, s_ptr, advantages_ptr, weights_ptr, d_v_ptr, partial_ptr, counters_ptr,
    log_prob_ptr, loss_ptr, frames_ptr,
    C, F, P, N, splits, chunk_frames, stride_tb, stride_tn, stride_sb, stride_sn, stride_advantages, rows, gain,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, T_TABLE: tl.constexpr, S_TABLE: tl.constexpr,
    NEED_V: tl.constexpr,
):  # fmt: skip
    b, n, cell, start, begin, frames, length = run_of(
        tl.program_id(0), frames_ptr, C, F, P, N, splits, chunk_frames, BLOCK * STEPS, RAGGED
    )
    t = level_at(t_ptr, b, n, stride_tb, stride_tn, T_TABLE)
    s = level_at(s_ptr, b, n, stride_sb, stride_sn, S_TABLE)
    a = 1.0 - s
    weight = gain * (level_at(advantages_ptr, b, n, stride_advantages, 0, True) * tl.load(weights_ptr + n))
    factor = tl.where(valid(t, s), weight * (t * a / (s * s)), float("nan"))
    acc = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(STEPS):
        offsets = begin + i * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < length
        e = residual(v_ptr + start, x_t_ptr + start, x_s_ptr + start, offsets, mask, t, a)
        acc = tl.fma(e, e, acc)
        if NEED_V:
            tl.store(d_v_ptr + start + offsets, factor * e, mask=mask)
    row = b * N + n
    cells = C * splits
    cells_ptr = partial_ptr + row.to(tl.int64) * cells
    tl.store(cells_ptr + cell, tl.sum(acc))
    if arrivals(counters_ptr + row) == cells - 1:
        tl.store(log_prob_ptr + row, row_density(cells_ptr, cells, frames * P * C, t, s))
        tl.store(counters_ptr + row, 0)
        if arrivals(counters_ptr + rows) == rows - 1:
            total = tl.zeros([ROW_BLOCK], tl.float32)
            for k in range(0, rows, ROW_BLOCK):
                each = k + tl.arange(0, ROW_BLOCK)
                inside = each < rows
                log_prob = tl.load(log_prob_ptr + each, mask=inside, other=0.0, cache_modifier=".cg")
                sample = (each // N).to(tl.int64)
                advantage = tl.load(advantages_ptr + sample * stride_advantages, mask=inside, other=0.0)
                total += advantage * tl.load(weights_ptr + each % N, mask=inside, other=0.0) * log_prob
            tl.store(loss_ptr, -gain * tl.sum(total))
            tl.store(counters_ptr + rows, 0)


def forward(
    v: torch.Tensor,
    x_t: torch.Tensor,
    x_s: torch.Tensor,
    t: torch.Tensor | float,
    s: torch.Tensor | float,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    gain: float,
    chunks: Chunks,
    log_prob: torch.Tensor,
    loss: torch.Tensor,
    d_v: torch.Tensor | None,
    keep: bool = False,
    config: Config | None = None,
) -> None:
    """Write ``loss = -gain sum_bn advantages_b weights_n log_prob_bn``, ``log_prob``, and the loss's gradient ``d_v``.

    ``advantages`` ``[B]`` of any stride, ``weights`` ``[N]``, both float32; inputs not empty; the rest as in
    `gaussian_log_prob`.
    """
    cut = pieces(v.shape, chunks, config)
    partial, counters = workspace(v.device, cut.cells, cut.rows + 1, keep)
    pointers = (
        plain(v), plain(x_t), plain(x_s), t, s, advantages, weights, d_v, partial, counters, log_prob, loss,
        borders(chunks, v.device) if cut.constants[-1] else None,
    )  # fmt: skip
    sizes = (*cut.sizes, *strides(t), *strides(s), advantages.stride(0), cut.rows, gain)
    constants = (*cut.constants, *tables(t, s), d_v is not None)
    with on_device(v):
        launch(_policy_loss, cut.cells, pointers, sizes, constants, cut.num_warps)


def aot_cases() -> Iterator[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """What an ahead-of-time compile covers: ``(kernel, signature, constexprs, options)``."""
    config = default_config(1 << 20)
    ints = dict.fromkeys(["C", "F", "P", "N", "splits", "chunk_frames", *STRIDES, "stride_advantages", "rows"], "i32")
    outputs = dict.fromkeys(["partial_ptr", "log_prob_ptr", "loss_ptr"], "*fp32") | {"counters_ptr": "*i32"}
    for dtype, waiting, ragged in (("*fp32", "*fp32", False), ("*bf16", "*bf16", True), ("*fp16", "*fp32", False)):
        inputs = {"v_ptr": dtype, "x_t_ptr": "*fp32", "x_s_ptr": "*fp32", "t_ptr": "*fp32", "s_ptr": "fp32"}
        inputs |= {"advantages_ptr": "*fp32", "weights_ptr": "*fp32", "d_v_ptr": waiting}
        frames = {"frames_ptr": "*i32" if ragged else "constexpr"}
        constants = {"BLOCK": config.block, "STEPS": config.steps, "RAGGED": ragged}
        constants |= {"T_TABLE": True, "S_TABLE": False, "NEED_V": True} | ({} if ragged else {"frames_ptr": None})
        signature = {**inputs, **outputs, **frames, **ints, "gain": "fp32"}
        yield _policy_loss, signature, constants, {"num_warps": config.num_warps}
