"""One call of each op on fixed inputs, as functions that return their results: to be repeated in adverse conditions."""

import random

import torch

import raven
from raven.cache import KVCache
from raven.layout import ChunkLayout
from raven.ops import (
    chunk_attention,
    consistency_step,
    gated_residual,
    gaussian_log_prob,
    kv_append,
    modulate,
    policy_loss,
    qk_norm_rope,
)
from raven.spans import Spans

TOKENS, HEADS, DIM = 520, 4, 128


def _draw(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def attention():
    """Forward and backward over 2,600 tokens: several tiles per range, tails, keys that many ranges read."""
    layout = ChunkLayout.repacked((2, 2, 2), TOKENS // 2 + 3, sink=1, window=1)
    leaves = [_draw(1, layout.length, heads, DIM).requires_grad_() for heads in (HEADS, 2, 2)]
    grad = _draw(1, layout.length, HEADS, DIM)

    def run():
        out, lse = chunk_attention(*leaves, layout, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)

    return "chunk_attention", leaves, run


def decode():
    """A chunk of 260 queries over 5,200 keys: so few query tiles that the keys may be shared out."""
    q, k, v = _draw(1, 260, HEADS, DIM), _draw(1, 5200, HEADS, DIM), _draw(1, 5200, HEADS, DIM)
    spans = Spans.build([((0, 260), [(0, 520), (777, 5101)])])
    return "chunk_attention", (q, k, v), lambda: chunk_attention(q, k, v, spans, return_lse=True)


def norm_rope():
    q, k = (_draw(1, TOKENS, HEADS, DIM).requires_grad_() for _ in range(2))
    weights = [torch.rand(HEADS * DIM, device="cuda").requires_grad_() for _ in range(2)]
    positions = torch.arange(3 * TOKENS, device="cuda", dtype=torch.int32).view(TOKENS, 3)
    grads = [_draw(1, TOKENS, HEADS, DIM) for _ in range(2)]

    def run():
        outputs = qk_norm_rope(q, k, *weights, positions)
        return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, (q, k, *weights), grads)

    return "qk_norm_rope", (q, k), run


def append():
    q, k, v = (_draw(1, TOKENS, HEADS, DIM) for _ in range(3))
    weights = [torch.rand(HEADS * DIM, device="cuda") for _ in range(2)]
    positions = torch.arange(3 * TOKENS, device="cuda", dtype=torch.int32).view(TOKENS, 3)
    cache = KVCache(1, 1, HEADS, DIM, TOKENS, max_chunks=2, dtype=torch.bfloat16, device="cuda")
    cache.begin(TOKENS, 0, 1)

    def run():
        with torch.no_grad():
            new = kv_append(q, k, v, *weights, positions, cache, 0)
        return new, cache.k[0][:, :TOKENS].clone(), cache.v[0][:, :TOKENS].clone()

    return "kv_append", (q, k, v), run


def modulated():
    """Segments of unequal lengths, their rows slices of one table."""
    x, grad = _draw(1, TOKENS, HEADS * DIM).requires_grad_(), _draw(1, TOKENS, HEADS * DIM)
    table = torch.randn(1, 3, 6, HEADS * DIM, device="cuda").requires_grad_()

    def run():
        y = modulate(x, table[:, :, 0], table[:, :, 1], (TOKENS - 101, 100, 1))
        return y.detach(), *torch.autograd.grad(y, (x, table), grad)

    return "modulate", (x, table), run


def residual():
    x, branch = (_draw(1, TOKENS, HEADS * DIM).requires_grad_() for _ in range(2))
    table = torch.randn(1, 4, 6, HEADS * DIM, device="cuda").requires_grad_()
    grads = [_draw(1, TOKENS, HEADS * DIM) for _ in range(2)]

    def run():
        gate, shift, scale = table.unbind(2)[2:5]
        outputs = gated_residual(x, branch, gate, shift=shift, scale=scale)
        return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, (x, branch, table), grads)

    return "gated_residual", (x, branch, table), run


def log_prob():
    v, x_t, x_s = (_draw(3, 4, 6, 13, 17, dtype=torch.float32).requires_grad_() for _ in range(3))
    t, s = torch.full((3, 2), 0.8, device="cuda"), torch.full((3, 2), 0.4, device="cuda")

    def run():
        result = gaussian_log_prob(v, x_t, x_s, t, s, (2, 4))
        return result.detach(), *torch.autograd.grad(result.sum(), (v, x_t, x_s))

    return "gaussian_log_prob", (v, x_t, x_s), run


def policy():
    v, x_t, x_s = (_draw(3, 4, 6, 13, 17, dtype=torch.float32) for _ in range(3))
    v.requires_grad_()
    t, s = torch.full((3, 2), 0.8, device="cuda"), torch.full((3, 2), 0.4, device="cuda")
    advantages = torch.tensor([1.5, -0.5, 0.25], device="cuda")

    def run():
        loss, result = policy_loss(v, x_t, x_s, t, s, advantages, (2, 4), (1.0, 0.5))
        return loss.detach(), result, *torch.autograd.grad(loss, v)

    return "policy_loss", (v, x_t, x_s), run


def step():
    v, x_t, noise = (_draw(3, 4, 6, 13, 17, dtype=torch.float32).requires_grad_() for _ in range(3))
    t, s = torch.full((3,), 0.8, device="cuda"), torch.full((3,), 0.4, device="cuda")

    def run():
        result = consistency_step(v, x_t, t, s, noise)
        return result.detach(), *torch.autograd.grad(result.sum(), (v, x_t, noise))

    return "consistency_step", (v, x_t, noise), run


JOBS = {
    "attention": attention,
    "decode": decode,
    "norm_rope": norm_rope,
    "append": append,
    "modulated": modulated,
    "residual": residual,
    "log_prob": log_prob,
    "policy": policy,
    "step": step,
}


def make(name, backend, seed=0):
    """``(inputs, run)`` of a job, or why this backend cannot run it."""
    torch.manual_seed(seed)
    op, inputs, run = JOBS[name]()
    tensors = [x.detach() for x in inputs]
    reason = raven.explain(op, *tensors).reasons[backend]
    return (tensors, run) if reason is None else f"{op} on {backend}: {reason}"


class Pressure:
    """Allocations of random size, full of NaN, that come and go; and a second stream that keeps memory busy."""

    def __init__(self, seed=0):
        self.rng = random.Random(seed)
        self.held = []
        self.stream = torch.cuda.Stream()
        self.load = torch.empty(2**25, device="cuda")

    def shift(self):
        for _ in range(self.rng.randint(0, 3)):
            size = self.rng.choice([1, 300, 2**13, 2**17 + 5, 2**20, 2**22])
            self.held.append(torch.full((size,), float("nan"), device="cuda"))
        self.rng.shuffle(self.held)
        del self.held[self.rng.randint(4, 12) :]
        if self.rng.random() < 0.1:
            with torch.cuda.stream(self.stream):
                self.load.add_(1.0)
        if self.rng.random() < 0.01:
            torch.cuda.empty_cache()
