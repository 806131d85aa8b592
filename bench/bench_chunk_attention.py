"""Attention of Wan-1.3B in bfloat16: 12 heads of 128, latent frames of 1,560 tokens, chunks of 3 frames (4,680 tokens).

Operations are counted for visible pairs only: 4 D a pair and head forward, 10 D backward. Errors are measured on the
first and the last head against float64, every row of them, and compared with PyTorch's own attention in bfloat16, one
call per query range. Every row has cuDNN's rate without a mask at 32,760 tokens beside it, as the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial

import pytest
import torch
import torch._functorch.config
from harness import DEVICE, failures, first_line
from peers import GATHERED, MASKED, PACKAGES, PEERS, InTorch, Peer
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
DETERMINISTIC = "backward-deterministic"


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
    """A mask; its peers: flex, cuDNN (where there is no mask at all), others (when asked for; flex is compiled anew for
    every mask); the curve that it is on, and whether it is there for that alone."""

    layout: Callable[[], ChunkLayout | Spans]
    flex: bool = False
    cudnn: bool = False
    others: bool = False
    batch: int = 1
    curve: str | None = None
    curve_only: bool = False


def _repacked(chunks: int, **options) -> Job:
    return Job(partial(ChunkLayout.repacked, (3,) * chunks, FRAME), curve="repacked", **options)


def _dense(frames: int, **options) -> Job:
    return Job(partial(ChunkLayout.bidirectional, frames, FRAME), cudnn=True, curve="dense", **options)


TRAINING = {
    "repacked-60840": _repacked(7, flex=True, others=True),
    "repacked-60840-clean-first": Job(partial(ChunkLayout.repacked, SEVEN, FRAME, order="clean_first")),
    "repacked-60840-sink-1-window-2": Job(partial(ChunkLayout.repacked, SEVEN, FRAME, sink=1, window=2), others=True),
    "repacked-60840-batch-2": Job(partial(ChunkLayout.repacked, SEVEN, FRAME), batch=2),
    "repacked-63960-frame-wise": Job(partial(ChunkLayout.repacked, (1,) * 21, FRAME)),
    "teacher-forcing-65520": Job(partial(ChunkLayout.teacher_forcing, SEVEN, FRAME)),
    "ragged-pack-65520": Job(_ragged),
    "dense-32760": _dense(21, others=True),
}
LENGTHS = {f"dense-{frames * FRAME}": _dense(frames, curve_only=True) for frames in (3, 12, 39)} | {
    f"repacked-{(2 * chunks - 1) * CHUNK}": _repacked(chunks, curve_only=True) for chunks in (2, 4, 10)
}
DECODE = {
    "decode-4680x4680": Job(partial(Spans.full, CHUNK, CHUNK), cudnn=True, others=True),
    "decode-4680x32760": Job(partial(Spans.full, CHUNK, 7 * CHUNK), flex=True, cudnn=True, others=True),
    "decode-4680x98280": Job(partial(Spans.full, CHUNK, 21 * CHUNK), cudnn=True, others=True),
}


@cache
def _compiled_flex():
    # Timing the backward alone runs it several times on one forward: its saved tensors must survive.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


@contextmanager
def _mode(direction: str):
    """The setting that a training script makes for reproducible gradients."""
    torch.use_deterministic_algorithms(direction == DETERMINISTIC)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Case:
    """Inputs of one mask, and everything that its rows share."""

    def __init__(self, job: Job, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.job, self.layout = job, job.layout()
        self.spans = getattr(self.layout, "spans", self.layout)
        lengths = (self.spans.q_end, self.spans.kv_end, self.spans.kv_end)
        self.q, self.k, self.v = (
            torch.randn(job.batch, L, heads, head_dim, device=DEVICE, dtype=dtype).requires_grad_() for L in lengths
        )
        self.grad = torch.randn_like(self.q)
        self.flops = 4 * self.spans.pairs * heads * head_dim * job.batch
        self._peers: dict[tuple[str, bool], Peer | InTorch] = {}

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v

    def forward(self) -> torch.Tensor:
        return chunk_attention(*self.inputs, self.layout)

    def backward(self) -> Callable[[], object]:
        """Only the backward: its forward runs once, here."""
        out = self.forward()
        return lambda: torch.autograd.grad(out, self.inputs, self.grad, retain_graph=True)

    def facts(self, direction: str) -> dict[str, object]:
        """What the plots need: tokens, the curve, and operations per byte of the tensors read and written once."""
        q, kv = self.q.nbytes, self.k.nbytes + self.v.nbytes
        moved, work = (2 * q + kv, 1.0) if direction == "forward" else (4 * q + 2 * kv, 2.5)
        curve = {"curve": self.job.curve, "curve_only": self.job.curve_only} if self.job.curve else {}
        return {"tokens": self.q.shape[1], "intensity": work * self.flops / moved, **curve}

    # Errors: two heads of the last batch entry, whose float64 results are computed once for all backends and peers.

    @cached_property
    def sample(self) -> list[torch.Tensor]:
        return [_pick(x).detach() for x in (*self.inputs, self.grad)]

    @cached_property
    def want(self) -> tuple[torch.Tensor, ...]:
        """Out, log-sum-exp and the three gradients in float64."""
        return attention_oracle(*self.sample[:3], self.spans, grad_out=self.sample[3])

    @cached_property
    def baseline(self) -> tuple[torch.Tensor, ...]:
        """Out and gradients of PyTorch's own attention; those of keys that several ranges read summed in float32."""
        q, k, v, grad = self.sample
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        out = _per_range(*leaves, self.spans, q.dtype)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def check(self, direction: str) -> dict[str, float]:
        return self.check_forward() if direction == "forward" else self.check_backward(direction)

    def check_forward(self) -> dict[str, float]:
        with torch.no_grad():
            out, lse = chunk_attention(*self.inputs, self.layout, return_lse=True)
            assert_bitwise(self.forward(), out, "a second run")
        limit = tolerance(self.q.dtype, "forward")
        errors = {"out": assert_as_accurate(_pick(out), self.want[0], self.baseline[0], limit, "out")}
        errors["lse"] = float((_pick(lse, 1) - self.want[1]).abs().max())
        assert errors["lse"] <= 1e-3, f"lse: error {errors['lse']:.2e}, expected at most 1e-3"
        return errors

    def check_backward(self, direction: str) -> dict[str, float]:
        grads = self.backward()()
        if direction == DETERMINISTIC:
            for name, first, second in zip(("dq", "dk", "dv"), grads, self.backward()(), strict=True):
                assert_bitwise(second, first, f"{name} of a second run")
        limit = tolerance(self.q.dtype, "backward")
        wanted = zip(("dq", "dk", "dv"), grads, self.want[2:], self.baseline[1:], strict=True)
        return {name: assert_as_accurate(_pick(g), w, b, limit, name) for name, g, w, b in wanted}

    def check_memory(self, backend: str) -> dict[str, float]:
        """Forward and backward hold their results and O(L) statistics; nothing of the size of a mask or of a gather."""
        run = lambda: (out := self.forward(), torch.autograd.grad(out, self.inputs, self.grad))  # noqa: E731
        run()
        extra = peak_extra_bytes(run)
        results = self.q.nbytes + sum(x.nbytes for x in self.inputs)
        statistics = 4 * 4 * self.q.shape[0] * self.q.shape[1] * self.q.shape[2]  # four float32 a query and head
        plan = 32 * 2**20  # tile lists, allocator rounding
        sums = 4 * self.q.numel() if backend == "cuda" else 0  # dq comes together in float32
        assert extra <= results + statistics + plan + sums, (
            f"memory: {extra / 2**20:.0f} MiB beyond the inputs, expected at most the results' {results / 2**20:.0f} "
            f"and {(statistics + plan + sums) / 2**20:.0f} MiB"
        )
        return {"peak_extra_bytes": extra, "results_bytes": results}

    # Peers.

    def peer(self, name: str, direction: str) -> Peer | InTorch:
        """Made once for all directions, but for the deterministic one."""
        key = (name, direction == DETERMINISTIC)
        if key not in self._peers:
            if name in PEERS:
                self._peers[key] = PEERS[name](*(x.detach()[0] for x in self.inputs), self.spans, key[1])
            else:
                masked = name == "flex" and isinstance(self.layout, ChunkLayout)
                options = {"block_mask": _block_mask(self.layout)} if masked else {}
                self._peers[key] = InTorch(self.inputs, _compiled_flex() if name == "flex" else _cudnn, options)
        return self._peers[key]

    def peers(self, bench, direction: str) -> dict[str, Callable[[], object]]:
        names = ["flex"] * self.job.flex + ["cudnn"] * self.job.cudnn
        if DEVICE != "cuda" or direction == DETERMINISTIC:
            names = []
        if bench.peers and self.job.others:
            masked = isinstance(self.layout, ChunkLayout) and not self.job.cudnn
            names += [name for name in PEERS if masked or name not in MASKED]
            names += ["flex"] * (masked and not self.job.flex and direction != DETERMINISTIC)
        found = {}
        for name in names:
            try:
                peer = self.peer(name, direction)
                found[peer.label(name)] = self._job(peer, direction)
                if name in PACKAGES:
                    bench.recorder.uses(PACKAGES[name])
            except failures() as failure:
                bench.recorder.leave_out(name, first_line(failure))
        return found

    def _job(self, peer: Peer | InTorch, direction: str) -> Callable[[], object]:
        if direction == "forward":
            return peer.forward
        if not peer.differentiable:
            raise NotImplementedError("it has no backward")
        out, grad = peer.forward(), peer.grad(self.grad if isinstance(peer, InTorch) else self.grad[0])
        return lambda: torch.autograd.grad(out, peer.leaves, grad, retain_graph=True)

    def check_peer(self, direction: str, name: str) -> float:
        """That it does the same job; ``name`` as its rows have it."""
        peer = self.peer(name.removesuffix(GATHERED), direction)
        forward = direction == "forward"
        grad = None if forward else self.grad if isinstance(peer, InTorch) else self.grad[0]
        got = peer.results(grad, self.q.shape[1], self.k.shape[1])
        got, want = (got, self.want[:1]) if forward else (got[1:], self.want[2:])
        limit = tolerance(self.q.dtype, direction.split("-")[0])
        return max(assert_as_accurate(_pick(g), w, None, limit, name) for g, w in zip(got, want, strict=True))


def _pick(x: torch.Tensor, dim: int = 2) -> torch.Tensor:
    """The first and the last head of the last batch entry."""
    return x[-1:].index_select(dim, torch.tensor([0, x.shape[dim] - 1], device=x.device))


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
    return Case((TRAINING | LENGTHS | DECODE)[name], HEADS, HEAD_DIM, torch.bfloat16)


_yardsticks: dict[str, float | None] = {}


def cudnn_dense_rate(bench, direction: str) -> float | None:
    """TFLOP/s of cuDNN without a mask at 32,760 tokens, measured once; ``None`` where there is no cuDNN attention."""
    direction = direction.split("-")[0]
    if direction not in _yardsticks:
        _yardsticks[direction] = None
        case = Case(TRAINING["dense-32760"], HEADS, HEAD_DIM, torch.bfloat16)
        try:
            run = case._job(case.peer("cudnn", direction), direction)
            work = case.flops * (1.0 if direction == "forward" else 2.5)
            _yardsticks[direction] = work / bench.recorder.time(run) / 1e9
        except RuntimeError as failure:
            bench.recorder.leave_out("cudnn", first_line(failure))
    return _yardsticks[direction]


def measure(bench, name, direction, case, decode=False):
    backend = explain("chunk_attention", *case.inputs).chosen
    extra = case.facts(direction)
    if direction == "backward" and DEVICE == "cuda":
        extra |= case.check_memory(backend)
    if DEVICE == "cuda" and (rate := cudnn_dense_rate(bench, direction)) is not None:
        extra["cudnn_dense_rate"] = rate

    case.want, case.baseline  # noqa: B018 - PyTorch computes them with what deterministic algorithms forbid
    with _mode(direction), torch.set_grad_enabled(not decode):
        # A forward is timed as training calls it, for everybody: flex would compile once more without gradients.
        # A decoding step is a replay of a graph without gradients.
        bench.row(
            op="chunk_attention",
            case=name,
            direction=direction,
            backend=backend,
            check=partial(_with_grad, case.check, direction),
            run=case.forward if direction == "forward" else case.backward(),
            work=case.flops * (1.0 if direction == "forward" else 2.5),
            unit="TFLOP/s",
            peers=partial(case.peers, bench, direction),
            peer_check=partial(case.check_peer, direction),
            graph=decode and DEVICE == "cuda",
            extra=extra,
        )


def _with_grad(function, *arguments):
    with torch.enable_grad():
        return function(*arguments)


TRAINING_ROWS = [(name, direction) for name in TRAINING for direction in ("forward", "backward")]
TRAINING_ROWS.insert(2, ("repacked-60840", DETERMINISTIC))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "direction"), TRAINING_ROWS)
def test_training(bench, name, direction):
    measure(bench, name, direction, case_of(name))


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODE)
def test_decode(bench, name):
    measure(bench, name, "forward", case_of(name), decode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(bench, name, direction):
    measure(bench, name, direction, case_of(name))


@pytest.mark.parametrize("direction", ["forward", "backward", DETERMINISTIC])
def test_smoke(bench, direction):
    """Small enough for any machine, and the same code path as the others."""
    case = Case(Job(partial(ChunkLayout.repacked, (2, 1, 2), 24, sink=1, window=1)), 2, 32, torch.float32)
    measure(bench, "repacked-smoke", direction, case)
