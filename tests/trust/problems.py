"""Attention problems on the GPU with three answers: the op's, float64's by a dense mask, and PyTorch's own."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from raven.ops import chunk_attention
from raven.reference.chunk_attention import dense_attention
from raven.testing import Tolerance, assert_as_accurate, poison_freed_memory, random_mask, relative_rms, tolerance

# dtype, head_dim, heads, heads of keys. Few, because every combination is compiled.
COMBINATIONS = ((torch.bfloat16, 128, 4, 2), (torch.float16, 64, 2, 2))
GRADS = ("dq", "dk", "dv")
FLOAT32_NOISE = 2.0**-20  # relative to the terms of a sum


class Problem:
    """Random inputs for a mask. ``draw(*shape)`` gives other than normal ones."""

    def __init__(self, mask, dtype, head_dim, heads, key_heads, batch=1, draw=None, device="cuda"):
        self.mask, self.dense = mask, mask.dense(device)
        draw = draw or (lambda *shape: torch.randn(*shape, device=device))
        shapes = ((mask.q_len, heads), (mask.kv_len, key_heads), (mask.kv_len, key_heads), (mask.q_len, heads))
        self.q, self.k, self.v, self.grad = (draw(batch, n, h, head_dim).to(dtype) for n, h in shapes)
        self.grad_lse = None

    @classmethod
    def of(cls, seed, max_tokens=700, **options):
        """Mask and inputs of a seed, in a combination of dtype and heads that takes turns."""
        torch.manual_seed(seed)
        return cls(random_mask(seed, max_tokens), *COMBINATIONS[seed // 3 % len(COMBINATIONS)], **options)

    @property
    def dtype(self):
        return self.q.dtype

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def inputs(self):
        return self.q, self.k, self.v

    def run(self, forward_only=False, **changes):
        """``{"out", "lse", "dq", "dk", "dv"}`` of the op, from memory that held NaN. ``changes``: other inputs."""
        q, k, v, grad = (changes.get(name, getattr(self, name)) for name in ("q", "k", "v", "grad"))
        leaves = [x.detach().requires_grad_(not forward_only) for x in (q, k, v)]
        poison_freed_memory((q, k, v))
        out, lse = chunk_attention(*leaves, self.mask.layout, return_lse=True)
        results = {"out": out.detach(), "lse": lse.detach()}
        if not forward_only:
            outputs = ((out,), (grad,)) if self.grad_lse is None else ((out, lse), (grad, self.grad_lse))
            poison_freed_memory((q, k, v))
            results |= zip(GRADS, torch.autograd.grad(outputs[0], leaves, outputs[1]), strict=True)
        return results

    def exact(self):
        leaves = [x.detach().double().requires_grad_() for x in self.inputs]
        out, lse = dense_attention(*leaves, self.dense, self.scale)
        outputs = (out,) if self.grad_lse is None else (out, lse)
        grads = [self.grad.double(), self.grad_lse][: len(outputs)]
        grads = torch.autograd.grad(outputs, leaves, [g.to(o) for g, o in zip(grads, outputs, strict=True)])
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(GRADS, grads, strict=True))}

    def torchs_own(self):
        """Queries that see nothing are left out: PyTorch has no answer for them, and theirs is known to be zero."""
        seeing = self.dense.any(1)
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        group = self.q.shape[2] // self.k.shape[2]
        q = leaves[0][:, seeing].transpose(1, 2)
        k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in leaves[1:])
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            part = scaled_dot_product_attention(q, k, v, attn_mask=self.dense[seeing]).transpose(1, 2)
        grads = torch.autograd.grad(part, leaves, self.grad[:, seeing])
        out = torch.zeros_like(self.q)
        out[:, seeing] = part.detach()
        return {"out": out, **dict(zip(GRADS, grads, strict=True))}

    def noise(self):
        """2-norms of what float32 sums leave where terms cancel: a query with one key has a gradient of exactly 0."""
        longest = {x: float(getattr(self, x).double().norm(dim=-1).max()) for x in "qkv"}
        total = float(self.grad.double().norm()) * FLOAT32_NOISE
        scores = longest["q"] * longest["k"] * self.scale
        return {
            "out": 0.0,
            "lse": FLOAT32_NOISE * (1 + scores) * (self.q.shape[0] * self.q.shape[1] * self.q.shape[2]) ** 0.5,
            "dq": total * longest["v"] * longest["k"] * self.scale,
            "dk": total * longest["v"] * longest["q"] * self.scale,
            "dv": total,
        }

    def check(self, got):
        """The design's rule for every result, and zeros where there is nothing to see."""
        blind, unseen = ~self.dense.any(1), ~self.dense.any(0)
        assert (got["out"][:, blind] == 0).all() and (got["lse"][:, :, blind] == float("-inf")).all()
        if "dq" in got:
            assert (got["dq"][:, blind] == 0).all()
            assert (got["dk"][:, unseen] == 0).all() and (got["dv"][:, unseen] == 0).all()
        if blind.all():
            return
        want, noise = self.exact(), self.noise()
        for x in (got, want):
            x["lse"] = x["lse"][:, :, ~blind]
        # PyTorch's attention has no log-sum-exp to differentiate, so there the fixed limit alone holds.
        theirs = self.torchs_own() if self.grad_lse is None else {}
        for name, result in got.items():
            limit = tolerance(
                torch.float32 if name == "lse" else self.dtype, "forward" if name in ("out", "lse") else "backward"
            )
            if name in theirs:
                # Few keys make errors that PyTorch's own has as well; then twice its error is the rule.
                limit = Tolerance(max(limit.rms, limit.factor * relative_rms(theirs[name], want[name])))
            assert_as_accurate(result, want[name], theirs.get(name), limit, name, noise[name])
