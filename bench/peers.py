"""Public attention kernels that ``raven bench --peers`` measures as well: where they are importable, or why not.

None of them takes lists of key ranges but MagiAttention. The others get keys and values that were gathered beforehand,
one list per query range, and one call over sequences of different lengths. The gather, and the sum of the gradients of
keys that several ranges read, are not counted: their times are what a kernel could reach, not what a caller gets.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from raven.spans import Spans

# What a missing, broken or unsuitable package may raise. Everything else is our own mistake.
FAILURES = (ImportError, AttributeError, AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError)


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

    def grad(self, grad_out: torch.Tensor) -> torch.Tensor:
        return grad_out.transpose(1, 2).contiguous()

    def results(self, grad_out: torch.Tensor | None, q_len: int, kv_len: int) -> list[torch.Tensor]:
        """As of ``Peer``, ``[B, L, H, D]`` in the dtype of the inputs."""
        out = self.forward()
        grads = () if grad_out is None else torch.autograd.grad(out, self.leaves, self.grad(grad_out))
        return [x.detach().transpose(1, 2) for x in (out, *grads)]


def _known(function: Callable, **options: object) -> dict[str, object]:
    """The options that this version of ``function`` has."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def _first(result: object) -> torch.Tensor:
    """Out, from functions that return it alone or before its log-sum-exp."""
    return result[0] if isinstance(result, (tuple, list)) else result


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans):
    """Leaves of one sequence per query range, the indices behind them, and the ends and longest of q and of k."""
    rows = [(query, keys) for query, keys in spans.rows() if query[0] < query[1]]
    query = torch.cat([torch.arange(*r) for r, _ in rows]).to(q.device)
    key = torch.cat([torch.arange(*r) for _, keys in rows for r in keys]).to(q.device)
    lengths = [[e - b for (b, e), _ in rows], [sum(e - b for b, e in keys) for _, keys in rows]]
    ends = [torch.tensor([0, *x]).cumsum(0).to(torch.int32).to(q.device) for x in lengths]
    leaves = tuple(x.detach()[index].requires_grad_() for x, index in ((q, query), (k, key), (v, key)))
    return leaves, query, key, ends, [max(x) for x in lengths]


def _flash(module: str):
    def make(q, k, v, spans: Spans, deterministic: bool) -> Peer:
        function = importlib.import_module(module).flash_attn_varlen_func
        leaves, rows, gather, ends, longest = _gathered(q, k, v, spans)
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options = dict(zip(names, (*ends, *longest), strict=True), causal=False)
        if deterministic:
            options["deterministic"] = True
            if "deterministic" not in inspect.signature(function).parameters:
                raise NotImplementedError("this version has no deterministic backward")
        options = _known(function, **options)
        return Peer(leaves, lambda: _first(function(*leaves, **options)), rows, gather)

    return make


def _magi(q, k, v, spans: Spans, deterministic: bool) -> Peer:
    function = importlib.import_module("magi_attention.functional").flex_flash_attn_func
    pairs = [(query, key) for query, keys in spans.rows() for key in keys]
    ranges = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in zip(*pairs, strict=True)]
    leaves = tuple(x.detach().contiguous().requires_grad_() for x in (q, k, v))
    options = _known(
        function,
        q_ranges=ranges[0],
        k_ranges=ranges[1],
        max_seqlen_q=int(ranges[0].diff().max()),
        max_seqlen_k=int(ranges[1].diff().max()),
        attn_type_map=torch.zeros(len(pairs), dtype=torch.int32, device=q.device),  # 0: everything is visible
        deterministic=deterministic,
    )
    return Peer(leaves, lambda: _first(function(*leaves, **options)))


def _flashinfer(q, k, v, spans: Spans, deterministic: bool) -> Peer:
    prefill = importlib.import_module("flashinfer").BatchPrefillWithRaggedKVCacheWrapper
    leaves, rows, gather, ends, _ = _gathered(q, k, v, spans)
    leaves = tuple(x.detach() for x in leaves)
    wrapper = prefill(torch.empty(2**28, dtype=torch.uint8, device=q.device), "NHD")
    heads, dim = q.shape[1], q.shape[2]
    wrapper.plan(*ends, heads, k.shape[1], dim, causal=False, q_data_type=q.dtype)
    return Peer(leaves, lambda: wrapper.run(*leaves), rows, gather, differentiable=False)


PEERS = {
    "fa3": _flash("flash_attn_interface"),
    "fa4": _flash("flash_attn.cute"),
    "magi": _magi,
    "flashinfer": _flashinfer,
}
