"""Timers, and the two measured ceilings: how fast this device copies memory and multiplies matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]


def time_ms(
    run: Run | Sequence[Run],
    device: torch.device | str = "cuda",
    repeats: int = 10,
    at_least_ms: float = 2.0,
    warmup_ms: float = 20.0,
    graph: bool = False,
) -> float:
    """Milliseconds of one call of ``run``: the median of ``repeats``.

    On a GPU calls are queued back to back between two CUDA events, enough of them to last ``at_least_ms``, so the
    figure is the device's time, or the host's where that is longer. ``graph=True`` captures those calls in a CUDA graph
    and times its replays: device time alone. On a CPU it is wall time.

    Args:
        run: what to time, or several equivalent ones (same work on other memory) that take turns; give enough of them
            to exceed the cache when the job must come from memory.
        warmup_ms: calls before measuring, for compilation and clocks; at least one of each.
    """
    runs = [run] if callable(run) else list(run)
    on_gpu = torch.device(device).type == "cuda"
    measure = _events if on_gpu else _wall

    def calls(count: int) -> Run:
        def go() -> None:
            for i in range(count):
                runs[i % len(runs)]()

        return go

    calls(len(runs))()
    once = measure(calls(len(runs))) / len(runs)
    spent = 0.0
    while spent < warmup_ms:
        spent += max(measure(calls(len(runs))), 0.01)
    once = min(once, measure(calls(len(runs))) / len(runs))
    count = max(1, round(at_least_ms / max(once, 1e-4)))
    count = -(-min(count, 2000) // len(runs)) * len(runs)
    work = calls(count)
    if graph:
        work = _captured(work)
    return statistics.median(measure(work) for _ in range(repeats)) / count


def _events(work: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall(work: Run) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _captured(work: Run) -> Run:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return graph.replay


def copy_rate(device: torch.device | str = "cuda") -> float:
    """Bytes read plus bytes written per second of a device copy, in TB/s. On a GPU: 2 GiB, far beyond its caches."""
    elements = 2**29 if torch.device(device).type == "cuda" else 2**22
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_ms(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: torch.device | str = "cuda", size: int | None = None) -> float:
    """TFLOP/s of a square matrix product: bfloat16 of 8192 on a GPU, float32 of 512 on a CPU. Random data."""
    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2 * size**3 / time_ms(lambda: torch.mm(a, b, out=out), device) / 1e9


def peak_extra_bytes(run: Run, device: torch.device | str = "cuda") -> int:
    """Most bytes of GPU memory that ``run`` held at once beyond what was allocated before, its results included."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = run()
    torch.cuda.synchronize(device)
    del results
    return torch.cuda.max_memory_allocated(device) - before
