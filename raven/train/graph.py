"""A whole training step as one CUDA graph: for small models the launches cost more than the work."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GraphedStep:
    """Calls ``fn(**inputs)`` and, on a GPU, replays it as one CUDA graph after a few ordinary calls.

    ``fn`` takes tensors of fixed shapes and returns a dict of 0-d tensors; it may zero gradients, run forward and
    backward, and step a capturable optimizer. It must not read values back to the host, nor draw random numbers from a
    generator (draw them outside, into the inputs). The ordinary calls are real training steps, so nothing is computed
    for the warm-up alone. Returned tensors are overwritten by the next call.
    """

    WARMUP = 3

    def __init__(self, fn: Callable[..., dict[str, torch.Tensor]], enabled: bool = True) -> None:
        self.fn = fn
        self.enabled = enabled
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.enabled or not all(tensor.is_cuda for tensor in inputs.values()):
            return self.fn(**inputs)
        if self._calls == 0:
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"inputs: got {', '.join(inputs)}, expected {', '.join(self._inputs)} as before")
        for name, tensor in inputs.items():
            held = self._inputs[name]
            if held.shape != tensor.shape or held.dtype != tensor.dtype:
                want = f"{held.dtype} {list(held.shape)} as before"
                raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {want}")
        torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])
        self._calls += 1
        if self._calls <= self.WARMUP:
            return self._on_side_stream()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self.fn(**self._inputs)
            self._graph = graph  # only now: what an error left unfinished would replay as nothing
        self._graph.replay()
        return self._outputs

    def _on_side_stream(self) -> dict[str, torch.Tensor]:
        """An ordinary call on the kind of stream that captures run on, so that lazy allocations happen before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self.fn(**self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs
