"""Stand-ins for the packages that ``raven bench --peers`` calls: their own parameters, dense arithmetic behind them.

The parameters are those of flash-attn-4 4.0.0b36, FlashAttention 3 (hopper/flash_attn_interface.py), MagiAttention with
``auto_range_merge`` and, renamed, ``range_merge``, flashinfer 0.7.2. What a call does not know raises ``TypeError``.
"""

import functools
import inspect
from types import ModuleType
from typing import NamedTuple

import torch

from raven.reference import qk_norm_rope as reference

FA3_DENSE = """q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False"""
FA3_VARLEN = """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False"""
FA4_DENSE = """q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None"""
FA4_VARLEN = """q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None,
    causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None,
    aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
    disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None"""
MAGI_OLD = """q, k, v, q_ranges, k_ranges, max_seqlen_q, max_seqlen_k, attn_type_map=None, softmax_scale=None,
    softcap=0.0, deterministic=False, sm_margin=0, disable_fwd_atomic_reduction=False, auto_range_merge=False,
    ref_block_size=None"""
MAGI = """q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, index_sparse_indices=None, q_block_size=1,
    sparse_k_block_size=1, sink=None, sink_layout="sh", softmax_scale=None, softcap=0.0, deterministic=False,
    sm_margin=0, disable_fwd_atomic_reduction=False, disable_bwd_dkv_atomic_reduction=False,
    disable_bwd_dq_atomic_reduction=False, ref_block_size=None, max_seqlen_q=None, range_merge=False, swap_ab=False,
    pack_gqa=False, cat_gqa=False, block_sparse=False, index_sparse=False, swap_bwd_qk_loop=None,
    return_max_logits=False"""
FLASHINFER_INIT = """self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
    kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None,
    variant_owns_mask=False"""
FLASHINFER_PLAN = """self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None,
    custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False,
    window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, q_data_type="float16",
    kv_data_type=None, o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
    token_pos_in_items_len=0, max_item_len_ptr=None, fixed_split_size=None, disable_split_kv=False, seq_lens=None,
    seq_lens_q=None, max_token_per_sequence=None, max_sequence_kv=None, v_indptr=None, o_indptr=None,
    uniform_q_len=None"""
FLASHINFER_RUN = """self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, out=None, lse=None,
    return_lse=False, lse_base="log2", lse_layout="NH", enable_pdl=None, kv_cache_sf=None"""
FLASHINFER_QK = """qkv, q_weight, k_weight, *, ppf, pph, ppw, num_frame_channels, num_height_channels,
    num_width_channels, num_heads_q, num_heads_k, num_heads_v, head_dim, eps=1e-6, base=10000.0, interleave=True,
    factor=1.0, low=0.0, high=0.0, attention_factor=1.0, is_qk_norm=True, output_fp8=False, output_quant_scale=1.0,
    v_quant_scale=1.0, q_out=None, k_out=None, v_out=None"""


def takes(parameters):
    """The decorated function gets what was passed, defaults included, as one namespace."""
    signature = inspect.signature(eval(f"(lambda {parameters}: None)"))

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            return function(Given(bound.arguments))

        call.__signature__ = signature
        return call

    return decorate


class Given:
    """Arguments by name."""

    def __init__(self, arguments):
        self.__dict__.update(arguments)


def attention(q, k, v, mask=None):
    """``[L, H, D]``; what ``mask`` [Lq, Lk] has not is not seen."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def varlen(q, k, v, q_ends, k_ends):
    """One dense attention per pair of sequences."""
    assert q_ends.dtype == k_ends.dtype == torch.int32 and len(q_ends) == len(k_ends)
    assert q_ends[-1] == len(q) and k_ends[-1] == len(k) == len(v)
    edges = [list(zip(ends[:-1], ends[1:], strict=True)) for ends in (q_ends.tolist(), k_ends.tolist())]
    return torch.cat([attention(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in zip(*edges, strict=True)])


def _assert_longest(a):
    assert a.max_seqlen_q == a.cu_seqlens_q.diff().max() and a.max_seqlen_k == a.cu_seqlens_k.diff().max()


@takes(FA3_DENSE)
def fa3_dense(a):
    assert not a.causal and len(a.q) == 1
    return attention(a.q[0], a.k[0], a.v[0])[None]


@takes(FA3_VARLEN)
def fa3_varlen(a):
    assert not a.causal
    _assert_longest(a)
    return varlen(a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k)


@takes(FA4_DENSE)
def fa4_dense(a):
    assert not a.causal and len(a.q) == 1
    mask = None
    if a.block_sparse_tensors is not None:
        size = a.q.shape[1], a.k.shape[1]
        mask = visible(a.block_sparse_tensors, *size, a.mask_mod, a.aux_tensors)
        back = visible(a.block_sparse_tensors_bwd, *size, a.mask_mod, a.aux_tensors, by_keys=True)
        assert torch.equal(mask, back), "the backward has another mask"
        assert not a.deterministic, "Deterministic not implemented for block-sparse backward"
    return attention(a.q[0], a.k[0], a.v[0], mask)[None], "lse"


@takes(FA4_VARLEN)
def fa4_varlen(a):
    assert not a.causal
    _assert_longest(a)
    return varlen(a.q, a.k, a.v, a.cu_seqlens_q, a.cu_seqlens_k), "lse"


class BlockSparseTensorsTorch(NamedTuple):
    """FlashAttention 4's lists of blocks."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def visible(lists, q_len, kv_len, mask_mod, aux_tensors, by_keys=False):
    """The mask that lists of blocks mean: whole blocks as they are, the others as ``mask_mod`` says, no more blocks."""
    block, keys = lists.block_size
    assert block == keys == 128, "Hopper's kernel takes no other"
    sizes = [-(-n // block) for n in ((kv_len, q_len) if by_keys else (q_len, kv_len))]
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    parts = ((lists.full_block_cnt, lists.full_block_idx, True), (lists.mask_block_cnt, lists.mask_block_idx, False))
    for counts, indices, whole in parts:
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == (1, 1, sizes[0]) and indices.shape == (1, 1, *sizes)
        for i, count in enumerate(counts[0, 0].tolist()):
            for j in indices[0, 0, i, :count].tolist():
                row, column = (j, i) if by_keys else (i, j)
                cell = mask[row * block : (row + 1) * block, column * block : (column + 1) * block]
                assert not cell.any() and (not whole or cell.numel() == block * block)
                if whole:
                    cell[:] = True
                    continue
                key = column * block + torch.arange(cell.shape[1])
                for at in range(cell.shape[0]):
                    query = torch.tensor([row * block + at])
                    cell[at] = mask_mod(torch.tensor([0]), torch.tensor([0]), query, key, None, aux_tensors)
    return mask


def _magi(a, merged):
    assert a.q_ranges.dtype == a.k_ranges.dtype == torch.int32 and a.attn_type_map is None
    assert not (a.deterministic and merged), "refused by the package"
    queries = [tuple(x) for x in a.q_ranges.tolist()]
    single = len(set(queries)) == len(queries)
    assert a.disable_fwd_atomic_reduction == (single or merged), "right and fastest"
    mask = torch.zeros(len(a.q), len(a.k), dtype=torch.bool)
    for (begin, end), (first, last) in zip(queries, a.k_ranges.tolist(), strict=True):
        mask[begin:end, first:last] = True
    return attention(a.q, a.k, a.v, mask), "meta"


@takes(MAGI_OLD)
def magi_old(a):
    assert a.max_seqlen_q == a.q_ranges.diff().max() and a.max_seqlen_k == a.k_ranges.diff().max()
    return _magi(a, a.auto_range_merge)


@takes(MAGI)
def magi(a):
    assert a.max_seqlen_q == a.q_ranges.diff().max()
    return _magi(a, a.range_merge)


class RaggedWrapper:
    """flashinfer's: a plan, then calls."""

    @takes(FLASHINFER_INIT)
    def __init__(a):
        assert a.kv_layout == "NHD" and a.float_workspace_buffer.dtype == torch.uint8

    @takes(FLASHINFER_PLAN)
    def plan(a):
        assert not a.causal and a.q_data_type == a.kv_data_type == torch.float64
        a.self.ends = a.qo_indptr, a.kv_indptr
        a.self.shape = a.num_qo_heads, a.head_dim_qk

    @takes(FLASHINFER_RUN)
    def run(a):
        assert a.q.shape[1:] == a.self.shape and not a.q.requires_grad
        return varlen(a.q, a.k, a.v, *a.self.ends)


@takes(FLASHINFER_QK)
def fused_qk_rmsnorm_rope(a):
    batch, length, width = a.qkv.shape
    channels = (a.num_frame_channels, a.num_height_channels, a.num_width_channels)
    assert length == a.ppf * a.pph * a.ppw and a.head_dim in (64, 128, 256) and a.interleave
    assert sum(channels) == a.head_dim and channels == tuple(2 * n for n in reference.axis_pairs(a.head_dim))
    assert width == (a.num_heads_q + a.num_heads_k + a.num_heads_v) * a.head_dim and a.qkv.is_contiguous()
    assert a.q_weight.dtype == a.k_weight.dtype == a.qkv.dtype
    at = torch.cartesian_prod(*(torch.arange(n) for n in (a.ppf, a.pph, a.ppw)))
    q, k, v = (x.unflatten(2, (-1, a.head_dim)) for x in a.qkv.chunk(3, dim=2))
    return *reference.qk_norm_rope(q, k, a.q_weight, a.k_weight, at.int(), a.eps, a.base), v


def module(name, **attributes):
    found = ModuleType(name)
    found.__dict__.update(attributes)
    return found


def packages():
    """What ``sys.modules`` holds where all of them are installed."""
    cutlass = {"Int32": int, "range_constexpr": range}
    flash = {"flash_attn_func": fa4_dense, "flash_attn_varlen_func": fa4_varlen}
    found = [
        module("flash_attn_interface", flash_attn_func=fa3_dense, flash_attn_varlen_func=fa3_varlen),
        module("flash_attn"),
        module("flash_attn.cute", **flash),
        module("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch),
        module("flash_attn.cute.utils", scalar_to_ssa=lambda value, dtype: value),
        module("cutlass", **cutlass),
        module("cutlass.cute", jit=lambda function: function),
        module("magi_attention"),
        module("magi_attention.functional", flex_flash_attn_func=magi),
        module("flashinfer.norm", fused_qk_rmsnorm_rope=fused_qk_rmsnorm_rope),
        module("flashinfer", BatchPrefillWithRaggedKVCacheWrapper=RaggedWrapper),
    ]
    return {m.__name__: m for m in found}
