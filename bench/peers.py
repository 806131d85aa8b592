"""Public attention kernels that ``raven bench --peers`` measures as well: where they are importable, or why not.

A kernel that takes no lists of key ranges gets keys and values gathered beforehand, one list per query range, in one
call over sequences of different lengths. The gather, and the sum of the gradients of keys that several ranges read, are
not counted: such a row's name says so, and its time is what the kernel could reach, not what a caller gets.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peers_blocks import block_lists, cute_mask, range_table

from raven.spans import Spans

GATHERED = ", keys gathered before"
BLOCK = 128  # queries and keys of a block; FlashAttention 4 takes no other on Hopper


@dataclass(frozen=True)
class Peer:
    """A package's call on one problem: ``[L, H, D]`` leaves q, k, v, and a function of them that returns out.

    rows, gather: which queries its q and which keys its k and v hold; ``None``: the originals.
    """

    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    forward: Callable[[], torch.Tensor]
    rows: torch.Tensor | None = None
    gather: torch.Tensor | None = None
    differentiable: bool = True

    def label(self, name: str) -> str:
        """The name of its rows, which says what is not counted."""
        return name if self.gather is None else name + GATHERED

    def grad(self, grad_out: torch.Tensor) -> torch.Tensor:
        """Of the ``[L, H, D]`` gradient of out, what the peer takes."""
        return grad_out if self.rows is None else grad_out[self.rows]

    def results(self, grad_out: torch.Tensor | None, q_len: int, kv_len: int) -> list[torch.Tensor]:
        """Out, and dq, dk, dv with ``grad_out``, of the original tokens: ``[1, L, H, D]`` float32."""
        out = self.forward()
        found = [out]
        if grad_out is not None:
            found += torch.autograd.grad(out, self.leaves, self.grad(grad_out))
        places = ((self.rows, q_len), (self.rows, q_len), (self.gather, kv_len), (self.gather, kv_len))
        return [_scattered(x.detach().float(), *place)[None] for x, place in zip(found, places, strict=False)]


def _scattered(x: torch.Tensor, index: torch.Tensor | None, length: int) -> torch.Tensor:
    return x if index is None else x.new_zeros(length, *x.shape[1:]).index_add_(0, index, x)


class InTorch:
    """PyTorch's own attentions, which take ``[B, H, L, D]``, contiguous as they like it best."""

    differentiable = True

    def __init__(self, inputs: Sequence[torch.Tensor], function: Callable, options: Mapping[str, object]) -> None:
        self.leaves = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs)
        self._call = partial(function, *self.leaves, **options)

    def forward(self) -> torch.Tensor:
        return self._call()

    def label(self, name: str) -> str:
        """As of ``Peer``: everything is counted."""
        return name

    def grad(self, grad_out: torch.Tensor) -> torch.Tensor:
        return grad_out.transpose(1, 2).contiguous()

    def results(self, grad_out: torch.Tensor | None, q_len: int, kv_len: int) -> list[torch.Tensor]:
        """As of ``Peer``, ``[B, L, H, D]`` in the dtype of the inputs."""
        out = self.forward()
        grads = () if grad_out is None else torch.autograd.grad(out, self.leaves, self.grad(grad_out))
        return [x.detach().transpose(1, 2) for x in (out, *grads)]


def _first(result: object) -> torch.Tensor:
    """Out, from functions that return it alone or before its log-sum-exp."""
    return result[0] if isinstance(result, (tuple, list)) else result


def _dense(spans: Spans) -> bool:
    """Every query sees every key."""
    return spans.pairs == spans.q_end * spans.kv_end and len(spans.q_ranges) == len(spans.kv_ranges) == 1


def _leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().contiguous().requires_grad_() for x in tensors)


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans):
    """Leaves of one sequence per query range, the indices behind them, and the ends and longest of q and of k."""
    rows = [(query, keys) for query, keys in spans.rows() if query[0] < query[1]]
    query = torch.cat([torch.arange(*r) for r, _ in rows]).to(q.device)
    key = torch.cat([torch.arange(*r) for _, keys in rows for r in keys]).to(q.device)
    lengths = [[e - b for (b, e), _ in rows], [sum(e - b for b, e in keys) for _, keys in rows]]
    ends = [torch.tensor([0, *x]).cumsum(0).to(torch.int32).to(q.device) for x in lengths]
    leaves = _leaves(q[query], k[key], v[key])
    return leaves, query, key, ends, [max(x) for x in lengths]


def _flash(module: str):
    """FlashAttention 3 and 4: the same arguments. Without a mask their dense call, which schedules its tiles better."""

    def make(q, k, v, spans: Spans, deterministic: bool) -> Peer:
        package = importlib.import_module(module)
        options = {"causal": False, "deterministic": deterministic}
        if _dense(spans):
            leaves = _leaves(q, k, v)
            return Peer(leaves, lambda: _first(package.flash_attn_func(*(x[None] for x in leaves), **options))[0])
        leaves, rows, gather, ends, longest = _gathered(q, k, v, spans)
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options |= dict(zip(names, (*ends, *longest), strict=True))
        return Peer(leaves, lambda: _first(package.flash_attn_varlen_func(*leaves, **options)), rows, gather)

    return make


def _fa4_blocks(q, k, v, spans: Spans, deterministic: bool) -> Peer:
    """FlashAttention 4 with the mask itself: lists of blocks, and a function for those that are seen in part."""
    if deterministic:
        raise NotImplementedError("on Hopper its backward with blocks has no deterministic form")
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    lists = importlib.import_module("flash_attn.cute.block_sparsity")
    table = range_table(spans, BLOCK).to(q.device)
    forward, backward = (
        lists.BlockSparseTensorsTorch(
            mask_block_cnt=partly[0],
            mask_block_idx=partly[1],
            full_block_cnt=wholly[0],
            full_block_idx=wholly[1],
            block_size=(BLOCK, BLOCK),
        )
        for partly, wholly in (block_lists(table, spans.kv_end, BLOCK, by_keys) for by_keys in (False, True))
    )
    options = {
        "causal": False,
        "mask_mod": cute_mask(table.shape[1] // 2),
        "aux_tensors": [table],
        "block_sparse_tensors": forward,
        "block_sparse_tensors_bwd": backward,
    }
    leaves = _leaves(q, k, v)
    return Peer(leaves, lambda: _first(function(*(x[None] for x in leaves), **options))[0])


def _magi(q, k, v, spans: Spans, deterministic: bool) -> Peer:
    """MagiAttention takes the ranges as they are. Its releases differ in the names of what is optional."""
    function = importlib.import_module("magi_attention.functional").flex_flash_attn_func
    known = inspect.signature(function).parameters
    pairs = [(query, key) for query, keys in spans.rows() for key in keys]
    ranges = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in zip(*pairs, strict=True)]
    options: dict[str, object] = {"deterministic": deterministic}
    for name, longest in zip(("max_seqlen_q", "max_seqlen_k"), ranges, strict=True):
        if name in known:
            options[name] = int(longest.diff().max())
    # Partial results need no sum by atomics where each query has one list of keys: of itself, or once its ranges merge.
    single = len(spans.q_ranges) == len(pairs)
    merge = next((name for name in ("range_merge", "auto_range_merge") if name in known), None)
    if merge and not single and not deterministic:
        options[merge] = single = True
    if single and "disable_fwd_atomic_reduction" in known:
        options["disable_fwd_atomic_reduction"] = True
    leaves = _leaves(q, k, v)
    return Peer(leaves, lambda: _first(function(*leaves, *ranges, **options)))


def _flashinfer(q, k, v, spans: Spans, deterministic: bool) -> Peer:
    prefill = importlib.import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper
    leaves, rows, gather, ends, _ = _gathered(q, k, v, spans)
    if _dense(spans):
        rows = gather = None
    leaves = tuple(x.detach() for x in leaves)
    wrapper = prefill(torch.empty(2**28, dtype=torch.uint8, device=q.device), "NHD")
    heads, dim = q.shape[1], q.shape[2]
    wrapper.plan(*ends, heads, k.shape[1], dim, causal=False, q_data_type=q.dtype, kv_data_type=k.dtype)
    return Peer(leaves, lambda: wrapper.run(*leaves), rows, gather, differentiable=False)


PEERS = {
    "fa3": _flash("flash_attn_interface"),
    "fa4": _flash("flash_attn.cute"),
    "fa4-blocks": _fa4_blocks,
    "magi": _magi,
    "flashinfer": _flashinfer,
}
# What pip calls them.
PACKAGES = {
    "fa3": "flash_attn_3",
    "fa4": "flash-attn-4",
    "fa4-blocks": "flash-attn-4",
    "magi": "magi_attention",
    "flashinfer": "flashinfer-python",
}
MASKED = ("fa4-blocks",)  # they pay for a mask, so there is no use for them where there is none
