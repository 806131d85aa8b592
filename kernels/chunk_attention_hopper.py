"""Forward kernel of ``chunk_attention`` for Hopper in Gluon, Triton's lower-level language.

A block owns 128 queries of one head, or a part of their keys, and has three roles. One warp keeps two rings of 128-key
tiles filled with the copy engine; two warpgroups of 64 queries each consume them: the scores of a tile are on their way
through the tensor cores while those of the tile before weigh its values. Full tiles come first and need no mask. Of a
tail the columns beyond its length score -inf, and the values behind it, which belong to somebody else and may be NaN,
are set to 0 in shared memory, because 0 * NaN is NaN.

The language moves between releases of Triton: `raven.ops._chunk_attention_gluon.reason` says whether this one has it.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

BLOCK_Q = 128
BLOCK_K = 128
FIELDS = gl.constexpr(8)  # of a row of work: q_start, q_length, head, first step, full tiles, tails, slot or -1, 0
STAGES = gl.constexpr(2)  # tiles of a ring
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
# ptxas moves the wait for the tensor cores above the exponentials, which only then have nothing to overlap with. A
# barrier whose condition (a sum of exponentials is -1) depends on all of them, and never holds, keeps it below them.
STAY = gl.constexpr("{.reg .pred p; setp.eq.f32 p, $1, 0fBF800000; @p bar.arrive 15, 128; mov.f32 $0, $1;}")

_load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _fetch(X, ring, full, empty, j, b, start, h, ROWS: gl.constexpr, D: gl.constexpr):
    slot = j % STAGES
    mbarrier.wait(empty.index(slot), (j // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), ROWS * D * 2)
    _load_tile(X, [b, start, h, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _producer(Q, K, V, queries, keys, values, q_full, k_full, k_empty, v_full, v_empty,
              work, steps, GROUP: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr):  # fmt: skip
    item, b = work + FIELDS * gl.program_id(0), gl.program_id(1)
    q_start, h, first = gl.load(item), gl.load(item + 2), gl.load(item + 3)
    n = gl.load(item + 4) + gl.load(item + 5)
    h_k = h // GROUP
    if n > 0:
        mbarrier.expect(q_full, 2 * 64 * D * 2)
        _load_tile(Q, [b, q_start, h, 0], q_full, queries.index(0))
        _load_tile(Q, [b, q_start + 64, h, 0], q_full, queries.index(1))
    start = gl.load(steps + 2 * first)
    for j in range(n):
        following = gl.load(steps + 2 * (first + j + 1))  # one ahead, so that no address waits for a load
        _fetch(K, keys, k_full, k_empty, j, b, start, h_k, BLOCK_K, D)
        _fetch(V, values, v_full, v_empty, j, b, start, h_k, BLOCK_K, D)
        start = following


@gluon.jit
def _clear_behind(v, length, side, cleared, phase, ROWS: gl.constexpr, D: gl.constexpr):
    """Set the rows of a tile of values from ``length`` on to 0; each consumer takes one half of the tile."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, layout))
    if side == 0:
        if length < ROWS // 2:
            half = v.slice(0, ROWS // 2)
            x = half.load(layout)
            half.store(gl.where((row < length)[:, None], x, gl.zeros_like(x)))
    else:
        half = v.slice(ROWS // 2, ROWS // 2)
        x = half.load(layout)
        half.store(gl.where((row + ROWS // 2 < length)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()  # the tensor cores read what plain stores wrote
    mbarrier.arrive(cleared)
    mbarrier.wait(cleared, phase)


@gluon.jit
def _scores(q, keys, k_full, j, ROWS: gl.constexpr, SCORES: gl.constexpr):
    slot = j % STAGES
    mbarrier.wait(k_full.index(slot), j // STAGES & 1)
    zero = gl.zeros([64, ROWS], gl.float32, SCORES)
    return warpgroup_mma(q, keys.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, m, total, scale_log2, dtype: gl.constexpr, WEIGHTS: gl.constexpr):
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)  # no weight yet, instead of exp2(-inf - -inf)
    p = gl.exp2(s * scale_log2 - shift[:, None])
    correction = gl.exp2(m - shift)
    total = total * correction + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), WEIGHTS), m_new, total, correction


@gluon.jit
def _step(acc, p, m, total, q, keys, values, k_full, k_empty, v_full, v_empty, cleared, clearings, side, j,
          length_before, length, scale_log2, FULL: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
          SCORES: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr):  # fmt: skip
    """Scores of tile ``j``, and the output of tile ``j - 1``, whose weights are ``p``."""
    s = _scores(q, keys, k_full, j, ROWS, SCORES)
    before = (j - 1) % STAGES
    mbarrier.wait(v_full.index(before), (j - 1) // STAGES & 1)
    if not FULL:
        if length_before < ROWS:
            _clear_behind(values.index(before), length_before, side, cleared, clearings & 1, ROWS, D)
            clearings += 1
    acc = warpgroup_mma(p, values.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(j % STAGES))
    if not FULL:
        column = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCORES))
        s = gl.where((column < length)[None, :], s, float("-inf"))
    p_new, m, total, correction = _softmax(s, m, total, scale_log2, p.dtype, WEIGHTS)
    total = gl.inline_asm_elementwise(STAY, "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, p_new, m, total, clearings


@gluon.jit
def _store_rows(q, acc, lse, Out, Lse, start, left, b, h, L, H, D: gl.constexpr, SCORES: gl.constexpr):
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    gl.store(Lse + (b.to(gl.int64) * H + h) * L + start + row, lse, mask=row < left)
    q.store(acc.to(q.dtype))  # by way of the queries' shared memory, so that rows leave in one piece
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    col = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = Out + ((b.to(gl.int64) * L + start) * H + h) * D
    gl.store(at + row[:, None] * (H * D) + col[None, :], q.load(layout), mask=(row < left)[:, None])


@gluon.jit
def _store_part(acc, lse, Parts, PartsLse, start, D: gl.constexpr, SCORES: gl.constexpr, OUTPUT: gl.constexpr):
    gl.store(PartsLse + start + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES)), lse)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUT))
    col = gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT))
    gl.store(Parts + start * D + row[:, None] * D + col[None, :], acc)


@gluon.jit
def _consumer(queries, keys, values, q_full, k_full, k_empty, v_full, v_empty, cleared, Out, Lse, Parts, PartsLse,
              work, steps, slots, L, H, scale, side, ROWS: gl.constexpr, D: gl.constexpr):  # fmt: skip
    item = work + FIELDS * gl.program_id(0)
    first, n_full = gl.load(item + 3), gl.load(item + 4)
    n = n_full + gl.load(item + 5)
    scale_log2 = scale * LOG2E
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    dtype: gl.constexpr = Out.dtype.element_ty
    q = queries.index(side)
    m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, D], gl.float32, OUTPUT)
    clearings = 0
    if n > 0:
        mbarrier.wait(q_full, 0)
        length = gl.load(steps + 2 * first + 1)
        s = warpgroup_mma_wait(0, deps=[_scores(q, keys, k_full, 0, ROWS, SCORES)])
        mbarrier.arrive(k_empty.index(0))
        column = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SCORES))
        s = gl.where((column < length)[None, :], s, float("-inf"))
        p, m, total, _ = _softmax(s, m, total, scale_log2, dtype, WEIGHTS)
        for j in range(1, n_full):
            acc, p, m, total, clearings = _step(
                acc, p, m, total, q, keys, values, k_full, k_empty, v_full, v_empty, cleared, clearings, side, j,
                ROWS, ROWS, scale_log2, True, ROWS, D, SCORES, OUTPUT, WEIGHTS,
            )  # fmt: skip
        for j in range(gl.maximum(n_full, 1), n):
            following = gl.load(steps + 2 * (first + j) + 1)
            acc, p, m, total, clearings = _step(
                acc, p, m, total, q, keys, values, k_full, k_empty, v_full, v_empty, cleared, clearings, side, j,
                length, following, scale_log2, False, ROWS, D, SCORES, OUTPUT, WEIGHTS,
            )  # fmt: skip
            length = following
        last = (n - 1) % STAGES
        mbarrier.wait(v_full.index(last), (n - 1) // STAGES & 1)
        if length < ROWS:
            _clear_behind(values.index(last), length, side, cleared, clearings & 1, ROWS, D)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, values.index(last), acc, is_async=True)])

    seen = total != 0  # not "> 0": a NaN among the visible keys must show
    lse = gl.where(seen, (m + gl.log2(total)) * LN2, float("-inf"))
    acc = acc * gl.convert_layout(gl.where(seen, 1.0 / total, 0.0), gl.SliceLayout(1, OUTPUT))[:, None]
    # Loaded here, not before the loop, which leaves no register free.
    item, b = work + FIELDS * gl.program_id(0), gl.program_id(1)
    q_start, q_length, h, slot = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 6)
    if slot < 0:
        _store_rows(q, acc, lse, Out, Lse, q_start + side * 64, q_length - side * 64, b, h, L, H, D, SCORES)
    else:
        _store_part(acc, lse, Parts, PartsLse, (b.to(gl.int64) * slots + slot) * 128 + side * 64, D, SCORES, OUTPUT)


@gluon.jit(do_not_specialize=["L", "slots"])
def _forward(Q, K, V, Out, Lse, Parts, PartsLse, work, steps, scale, slots, L, H,
             GROUP: gl.constexpr, BLOCK_K: gl.constexpr, D: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = Out.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(dtype, [2, 64, D], swizzled)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, D], swizzled)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, D], swizzled)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    cleared = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, 1)
    mbarrier.init(cleared, 2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(v_full.index(i), 1)
        mbarrier.init(k_empty.index(i), 2)
        mbarrier.init(v_empty.index(i), 2)
    gl.warp_specialize(
        [
            (_consumer, (queries, keys, values, q_full, k_full, k_empty, v_full, v_empty, cleared, Out, Lse, Parts,
                         PartsLse, work, steps, slots, L, H, scale, 0, BLOCK_K, D)),
            (_consumer, (queries, keys, values, q_full, k_full, k_empty, v_full, v_empty, cleared, Out, Lse, Parts,
                         PartsLse, work, steps, slots, L, H, scale, 1, BLOCK_K, D)),
            (_producer, (Q, K, V, queries, keys, values, q_full, k_full, k_empty, v_full, v_empty, work, steps,
                         GROUP, BLOCK_K, D)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def _tiles_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    block = [1, rows, 1, x.shape[-1]]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, gl.NVMMASharedLayout(128, 16, 4))


def forward(q, k, v, out, lse, parts, parts_lse, work, steps, scale: float) -> None:
    """Fill out and lse, or parts of them, for every row of ``work``.

    Args:
        q, k, v: ``[B, Lq, H, D]`` and ``[B, Lk, Hkv, D]`` as the copy engine can fetch them, bfloat16 or float16.
        out, lse: ``[B, Lq, H, D]`` and ``[B, H, Lq]`` float32, contiguous.
        parts, parts_lse: ``[B, slots, 128, D]`` and ``[B, slots, 128]`` float32, where parts of split tiles go.
        work: int32 ``[n, 8]``, see FIELDS; steps: int32 ``[m + 1, 2]`` of (first key, keys), full tiles before tails.
    """
    B, L, H, D = q.shape
    _forward[len(work), B](
        _tiles_of(q, 64), _tiles_of(k, BLOCK_K), _tiles_of(v, BLOCK_K), out, lse, parts, parts_lse, work, steps, scale,
        parts.shape[1], L, H, GROUP=H // k.shape[2], BLOCK_K=BLOCK_K, D=D, num_warps=4,
    )  # fmt: skip
