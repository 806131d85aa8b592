"""Small calls of every CUDA kernel, to be watched by compute-sanitizer; see `sanitizer.py`.

Inputs are made on the host, so that the only kernels between a tool and its verdict are ours. Lengths end inside a
tile, ranges lie apart, and results go back to the host, where they must be finite. Words on the command line choose
the cases that have one of them in their name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

import torch

import raven
from raven.cache import KVCache
from raven.layout import ChunkLayout
from raven.ops import chunk_attention, gaussian_log_prob, kv_append, policy_loss, qk_norm_rope
from raven.spans import Spans


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape).to(dtype).cuda().requires_grad_(grad)


def deterministic(on: bool) -> None:
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would hide what initcheck looks for


def attention(dtype: torch.dtype, head_dim: int, ordered: bool) -> Sequence[torch.Tensor]:
    layout = ChunkLayout.repacked((1, 2), 75, sink=1)
    heads = (2, 1, 1)
    q, k, v = (draw(1, layout.length, h, head_dim, dtype=dtype, grad=True) for h in heads)
    out, lse = chunk_attention(q, k, v, layout, return_lse=True)
    grad = draw(*q.shape, dtype=dtype)
    deterministic(ordered)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    deterministic(False)
    return out, lse, *grads


def decode(head_dim: int) -> Sequence[torch.Tensor]:
    """Few queries over many keys: shared out among blocks, and merged."""
    q, k, v = draw(1, 70, 1, head_dim), draw(1, 2100, 1, head_dim), draw(1, 2100, 1, head_dim)
    with torch.no_grad():
        return chunk_attention(q, k, v, Spans.build([((0, 70), [(0, 300), (450, 2090)])]), return_lse=True)


def rows(dtype: torch.dtype, heads: int, dim: int, per_head: bool = False) -> Sequence[torch.Tensor]:
    tokens = 37
    q, k = (draw(1, tokens, heads, dim, dtype=dtype, grad=True) for _ in range(2))
    weights = [draw(dim if per_head else heads * dim, dtype=torch.float32, grad=True) for _ in range(2)]
    positions = torch.arange(3 * tokens, dtype=torch.int32).view(tokens, 3).cuda()
    outputs = qk_norm_rope(q, k, *weights, positions, per_head=per_head)
    grads = torch.autograd.grad(outputs, (q, k, *weights), [draw(*x.shape, dtype=dtype) for x in outputs])
    return *outputs, *grads


def append(cache_dtype: torch.dtype, heads: int, dim: int) -> Sequence[torch.Tensor]:
    tokens = 37
    q, k, v = (draw(1, tokens, heads, dim) for _ in range(3))
    weights = [draw(heads * dim, dtype=torch.float32) for _ in range(2)]
    positions = torch.arange(3 * tokens, dtype=torch.int32).view(tokens, 3).cuda()
    cache = KVCache(1, 1, heads, dim, tokens, max_chunks=2, dtype=cache_dtype, device="cuda")
    cache.begin(tokens, 0, 1)
    with torch.no_grad():
        query = kv_append(q, k, v, *weights, positions, cache, 0)
    return query, cache.k[0][:, :tokens].float(), cache.v[0][:, :tokens].float()


def append_some(cache_dtype: torch.dtype, **options) -> Sequence[torch.Tensor]:
    """Through the op itself: rows in reverse, and tokens that are left out."""
    tokens, heads, dim = 37, 3, 64
    q, k, v = (draw(1, tokens, heads, dim) for _ in range(3))
    weights = [draw(heads * dim, dtype=torch.float32) for _ in range(2)]
    positions = torch.arange(3 * tokens, dtype=torch.int32).view(tokens, 3).cuda()
    slots = torch.tensor([-token if token % 3 == 1 else tokens - 1 - token for token in range(tokens)])
    caches = [torch.zeros(1, tokens, heads, dim).cuda().to(cache_dtype) for _ in range(2)]
    scales = [torch.zeros(1, tokens, heads).cuda() for _ in range(2)] if cache_dtype == torch.float8_e4m3fn else []
    op = torch.ops.raven.kv_append_float8 if scales else torch.ops.raven.kv_append
    query = op(q, k, v, *weights, positions, slots.int().cuda(), *caches, *scales, 1e-6, 1e4, False, **options)
    return query, *(x.float() for x in caches), *scales


ODD = (2, 3, 5, 7, 9)  # element by element
EVEN = (2, 2, 5, 48, 52)  # by vectors; a run is more than one piece


def states(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[torch.Tensor, ...]:
    """Of the dtypes, the first is the velocity's."""
    v, x_t, x_s = (draw(*shape, dtype=dtypes[min(i, 1)], grad=True) for i in range(3))
    return v, x_t, x_s, torch.tensor([0.8, 0.7]).cuda(), torch.tensor([0.4, 0.3]).cuda()


def log_prob(*problem) -> Sequence[torch.Tensor]:
    v, x_t, x_s, t, s = states(*problem)
    whole = gaussian_log_prob(v, x_t, x_s, t, s)
    chunks = gaussian_log_prob(v, x_t, x_s, t, s, (2, 3))
    grads = [torch.autograd.grad(x, (v, x_t, x_s), torch.ones(x.shape).cuda()) for x in (whole, chunks)]
    alone = gaussian_log_prob(v, x_t.detach(), x_s.detach(), t, s, (2, 3))
    scaled = torch.autograd.grad(alone, v, torch.tensor([[2.0, -1.0], [0.5, 3.0]]).cuda())
    return whole, chunks, *grads[0], *grads[1], alone, *scaled


def policy(*problem) -> Sequence[torch.Tensor]:
    v, x_t, x_s, t, s = states(*problem)
    x_t, x_s = x_t.detach(), x_s.detach()
    loss, log_prob = policy_loss(v, x_t, x_s, t, s, torch.tensor([1.5, -0.5]).cuda(), (2, 3), (1.0, 0.5))
    return loss, log_prob, *torch.autograd.grad(loss, v, torch.tensor(2.0).cuda())


CASES: dict[str, Callable[[], Sequence[torch.Tensor]]] = (
    {
        f"attention {dtype} {head_dim} {'deterministic' if ordered else 'fast'}": (
            lambda dtype=dtype, head_dim=head_dim, ordered=ordered: attention(dtype, head_dim, ordered)
        )
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (64, 128)
        for ordered in (False, True)
    }
    | {
        "decode 64": lambda: decode(64),
        "decode 128": lambda: decode(128),
        "qk_norm_rope bfloat16 3 heads": lambda: rows(torch.bfloat16, 3, 64),
        "qk_norm_rope bfloat16 12 heads": lambda: rows(torch.bfloat16, 12, 128),
        "qk_norm_rope float16 40 heads": lambda: rows(torch.float16, 40, 128),
        "qk_norm_rope float32 per head": lambda: rows(torch.float32, 3, 64, per_head=True),
        "kv_append bfloat16 3 heads": lambda: append(torch.bfloat16, 3, 64),
        "kv_append bfloat16 12 heads": lambda: append(torch.bfloat16, 12, 128),
        "kv_append bfloat16 40 heads": lambda: append(torch.bfloat16, 40, 128),
        "kv_append float8 3 heads": lambda: append(torch.float8_e4m3fn, 3, 64),
        "kv_append float8 12 heads": lambda: append(torch.float8_e4m3fn, 12, 128),
        "kv_append bfloat16 some rows": lambda: append_some(torch.bfloat16),
        "kv_append bfloat16 some rows, raw": lambda: append_some(torch.bfloat16, rotate_keys=False),
        "kv_append float8 some rows": lambda: append_some(torch.float8_e4m3fn),
    }
    | {
        f"{op.__name__} {how} {str(v)[6:]} {str(x)[6:]}": lambda op=op, shape=shape, dtypes=(v, x): op(shape, dtypes)
        for op in (log_prob, policy)
        for how, shape, v, x in (
            ("by elements", ODD, torch.float32, torch.float32),
            ("by elements", ODD, torch.bfloat16, torch.float16),
            ("by vectors", EVEN, torch.float32, torch.float32),
            ("by vectors", EVEN, torch.bfloat16, torch.float32),
            ("by vectors", EVEN, torch.float16, torch.float16),
        )
    }
)


def run() -> None:
    torch.manual_seed(0)
    raven.set_backend("cuda")
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    for name, case in CASES.items():
        if wanted and not any(word in name for word in wanted):
            continue
        try:
            results = case()
        except raven.BackendUnavailableError as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        for result in results:
            assert result.detach().cpu().float().isfinite().all(), f"{name}: a result is not finite"
        print(f"case: {name}", flush=True)


def kernels() -> None:
    """Print which of our kernels the cases launch, and how often."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    counts: dict[str, int] = {}
    for event in profile.key_averages():
        if found := re.search(r"raven::(?:\w+::)*\w+", event.key):
            counts[found.group()] = counts.get(found.group(), 0) + event.count
    for name, count in sorted(counts.items()):
        print(f"kernel: {name}, {count} launches")


if __name__ == "__main__":
    kernels() if "--kernels" in sys.argv else run()
