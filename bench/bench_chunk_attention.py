"""Attention of Wan-1.3B in bfloat16: 12 heads of 128, latent frames of 1,560 tokens, chunks of 3 frames (4,680 tokens).

Operations are counted for visible pairs only: 4 D a pair and head forward, 10 D backward. Errors are measured on the
first and the last head against float64, every row of them, and compared with PyTorch's own attention in bfloat16, one
call per query range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import pytest
import torch
import torch._functorch.config
from harness import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from raven import explain
from raven.layout import ChunkLayout
from raven.ops import chunk_attention
from raven.spans import Spans
from raven.testing import assert_as_accurate, assert_bitwise, attention_oracle, peak_extra_bytes, tolerance

HEADS, HEAD_DIM, FRAME = 12, 128, 1560
CHUNK = 3 * FRAME
SEVEN = (3,) * 7


def _ragged() -> ChunkLayout:
    """Three samples in one row: equal chunks, a short first and last chunk, frame by frame with sink and window."""
    return ChunkLayout.concat(
        [
            ChunkLayout.repacked((3, 3, 3), FRAME),
            ChunkLayout.repacked((1, 3, 3, 2), FRAME),
            ChunkLayout.repacked((1,) * 6, FRAME, sink=1, window=2),
        ]
    )


@dataclass(frozen=True)
class Job:
    """A mask, and which peers can compute it: flex (any), cuDNN (no mask at all)."""

    layout: Callable[[], ChunkLayout | Spans]
    flex: bool = False
    cudnn: bool = False


TRAINING = {
    "repacked-60840": Job(partial(ChunkLayout.repacked, SEVEN, FRAME), flex=True),
    "repacked-60840-clean-first": Job(partial(ChunkLayout.repacked, SEVEN, FRAME, order="clean_first")),
    "repacked-60840-sink-1-window-2": Job(partial(ChunkLayout.repacked, SEVEN, FRAME, sink=1, window=2), flex=True),
    "repacked-63960-frame-wise": Job(partial(ChunkLayout.repacked, (1,) * 21, FRAME)),
    "teacher-forcing-65520": Job(partial(ChunkLayout.teacher_forcing, SEVEN, FRAME)),
    "ragged-pack-65520": Job(_ragged),
    "dense-32760": Job(partial(ChunkLayout.bidirectional, 21, FRAME), cudnn=True),
}
DECODE = {
    "decode-4680x4680": Job(partial(Spans.full, CHUNK, CHUNK), cudnn=True),
    "decode-4680x32760": Job(partial(Spans.full, CHUNK, 7 * CHUNK), flex=True, cudnn=True),
    "decode-4680x98280": Job(partial(Spans.full, CHUNK, 21 * CHUNK), cudnn=True),
}


@cache
def _compiled_flex():
    # Timing the backward alone runs it several times on one forward: its saved tensors must survive.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


class Case:
    """Inputs of one mask, and everything that its forward and its backward row share."""

    def __init__(self, job: Job, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.job, self.layout = job, job.layout()
        self.spans = getattr(self.layout, "spans", self.layout)
        lengths = (self.spans.q_end, self.spans.kv_end, self.spans.kv_end)
        self.q, self.k, self.v = (
            torch.randn(1, L, heads, head_dim, device=DEVICE, dtype=dtype).requires_grad_() for L in lengths
        )
        self.grad = torch.randn_like(self.q)
        self.flops = 4 * self.spans.pairs * heads * head_dim
        # Peers take [B, H, L, D], contiguous, as they like it best.
        self.theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in self.inputs]
        self.their_grad = self.grad.transpose(1, 2).contiguous()

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v

    def forward(self) -> torch.Tensor:
        return chunk_attention(*self.inputs, self.layout)

    @property
    def peers(self) -> dict[str, Callable[[], torch.Tensor]]:
        found = {}
        if self.job.flex and DEVICE == "cuda":
            found["flex"] = partial(_compiled_flex(), *self.theirs, block_mask=self.block_mask)
        if self.job.cudnn and DEVICE == "cuda":
            found["cudnn"] = self._cudnn
        return found

    @property
    def block_mask(self):
        return _block_mask(self.layout) if isinstance(self.layout, ChunkLayout) else None

    def _cudnn(self) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(*self.theirs)

    def backward_of(self, forward: Callable[[], torch.Tensor], theirs: bool) -> Callable[[], object]:
        """Only the backward: its forward runs once, here."""
        inputs, grad = (self.theirs, self.their_grad) if theirs else (self.inputs, self.grad)
        out = forward()
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)

    def check_forward(self) -> dict[str, float]:
        with torch.no_grad():
            out, lse = chunk_attention(*self.inputs, self.layout, return_lse=True)
            assert_bitwise(self.forward(), out, "a second run")
            heads = self._two_heads()
            want, want_lse = attention_oracle(*heads[:3], self.spans)
            limit = tolerance(self.q.dtype, "forward")
            errors = {"out": assert_as_accurate(_pick(out), want, _per_range(*heads[:3], self.spans), limit, "out")}
            errors["lse"] = float((_pick(lse, 1) - want_lse).abs().max())
            assert errors["lse"] <= 1e-3, f"lse: error {errors['lse']:.2e}, expected at most 1e-3"
        for name, peer in self.peers.items():  # that it does the same job
            errors[name] = assert_as_accurate(_pick(peer().transpose(1, 2)), want, None, limit, name)
        return errors

    def check_backward(self) -> dict[str, float]:
        got = [_pick(x) for x in torch.autograd.grad(self.forward(), self.inputs, self.grad)]
        q, k, v, grad = self._two_heads()
        _, _, *want = attention_oracle(q, k, v, self.spans, grad_out=grad)
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        baseline = torch.autograd.grad(_per_range(*leaves, self.spans, q.dtype), leaves, grad)
        limit = tolerance(q.dtype, "backward")
        return {
            name: assert_as_accurate(g, w, b, limit, name)
            for name, g, w, b in zip(("dq", "dk", "dv"), got, want, baseline, strict=True)
        }

    def _two_heads(self) -> list[torch.Tensor]:
        return [_pick(x).detach() for x in (*self.inputs, self.grad)]

    def check_memory(self) -> dict[str, float]:
        """Forward and backward hold their results and O(L) statistics; nothing of the size of a mask or of a gather."""
        run = lambda: (out := self.forward(), torch.autograd.grad(out, self.inputs, self.grad))  # noqa: E731
        run()
        extra = peak_extra_bytes(run)
        results = self.q.nbytes + sum(x.nbytes for x in self.inputs)
        statistics = 4 * 4 * self.q.shape[1] * self.q.shape[2]  # four float32 a query and head
        plan = 32 * 2**20  # tile lists, allocator rounding
        assert extra <= results + statistics + plan, (
            f"memory: {extra / 2**20:.0f} MiB beyond the inputs, expected at most the results' {results / 2**20:.0f} "
            f"and {(statistics + plan) / 2**20:.0f} MiB"
        )
        return {"peak_extra_bytes": extra, "results_bytes": results}


def _pick(x: torch.Tensor, dim: int = 2) -> torch.Tensor:
    """The first and the last head."""
    return x.index_select(dim, torch.tensor([0, x.shape[dim] - 1], device=x.device))


def _per_range(q, k, v, spans: Spans, dtype: torch.dtype | None = None) -> torch.Tensor:
    """PyTorch's own attention in ``dtype``, one call per query range; gradients of shared keys add up in k's dtype."""
    out = torch.zeros_like(q, dtype=dtype or q.dtype)
    for (begin, end), keys in spans.rows():
        ki, vi = (torch.cat([x[:, b:e] for b, e in keys], dim=1) for x in (k, v))
        parts = (x.to(out.dtype).transpose(1, 2) for x in (q[:, begin:end], ki, vi))
        out[:, begin:end] = scaled_dot_product_attention(*parts).transpose(1, 2)
    return out


@lru_cache(maxsize=1)
def _block_mask(layout: ChunkLayout):
    return layout.to_flex(DEVICE)


@lru_cache(maxsize=1)
def case_of(name: str) -> Case:
    return Case((TRAINING | DECODE)[name], HEADS, HEAD_DIM, torch.bfloat16)


def measure(bench, name, direction, case, **extra):
    backward = direction == "backward"

    def job(forward, theirs):
        # A forward is timed as training calls it, for everybody: flex would compile once more without gradients.
        return case.backward_of(forward, theirs) if backward else forward

    bench.row(
        op="chunk_attention",
        case=name,
        direction=direction,
        backend=explain("chunk_attention", *case.inputs).chosen,
        check=case.check_backward if backward else case.check_forward,
        run=job(case.forward, False),
        work=case.flops * 2.5 if backward else case.flops,
        unit="TFLOP/s",
        peers={peer: job(forward, True) for peer, forward in case.peers.items()},
        extra=extra,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", TRAINING)
def test_training(bench, name, direction):
    case = case_of(name)
    memory = case.check_memory() if direction == "backward" else {}
    measure(bench, name, direction, case, **memory)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODE)
def test_decode(bench, name):
    measure(bench, name, "forward", case_of(name))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_smoke(bench, direction):
    """Small enough for any machine, and the same code path as the others."""
    case = Case(Job(partial(ChunkLayout.repacked, (2, 1, 2), 24, sink=1, window=1)), 2, 32, torch.float32)
    measure(bench, "repacked-smoke", direction, case)
