"""Where training prompts come from: a built-in world, or a file of text embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from raven.errors import check_finite

# (number of prompts, generator) -> (prompts, context [n, text_len, text_dim] on the training device)
Prompts = Callable[[int, torch.Generator], tuple[list[str], torch.Tensor]]


def draw_seed(generator: torch.Generator) -> int:
    """A seed for something that takes an integer."""
    return int(torch.randint(2**31 - 1, (), generator=generator))


class WorldPrompts:
    """Prompts of a built-in world, made up anew at every call."""

    def __init__(self, world: Any, device: torch.device | str = "cpu") -> None:
        self.world = world
        self.device = torch.device(device)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """``count`` random prompts and their context ``[count, text_len, text_dim]``."""
        prompts = self.world.prompts(count, draw_seed(generator))
        return prompts, self.world.encode(prompts, self.device)


class PromptFile:
    """Prompts with precomputed text embeddings, drawn at random from one safetensors file (see ``save``).

    The file has tensors ``"0"``, ``"1"``, ... ``[n_i, text_dim]``, optionally ``"negative"`` ``[n, text_dim]`` (what
    classifier-free guidance contrasts with; zeros without it), and the prompts as JSON in its metadata. Raises
    ``ValueError`` for a file that is not of this form or has embeddings longer than ``text_len``, or not finite.
    """

    def __init__(self, path: str | PathLike[str], text_len: int, device: torch.device | str = "cpu") -> None:
        safe_open = _safetensors("safe_open")
        self.device = torch.device(device)
        if not Path(path).is_file():
            raise ValueError(f"path: got {path}, which is not a file; expected prompt embeddings (.safetensors)")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except _safetensors("SafetensorError") as error:
            raise ValueError(f"path: {path} is not a safetensors file ({error})") from error
        self.prompts = _prompts_of(metadata, path)
        wanted = {str(i) for i in range(len(self.prompts))}
        if not self.prompts or set(tensors) - {"negative"} != wanted:
            raise ValueError(
                f"path: {path} lists {len(self.prompts)} prompts in its metadata and holds {len(tensors)} tensors, "
                'expected prompts, and one tensor "0", "1", ... for each'
            )
        self.embeddings = [_padded(tensors[str(i)], text_len, self.prompts[i]) for i in range(len(self.prompts))]
        width = self.embeddings[0].shape[1]
        self.negative = _padded(tensors.get("negative", torch.zeros(0, width)), text_len, "negative").to(self.device)
        _check_widths([*self.prompts, "negative"], [*self.embeddings, self.negative])

    def __len__(self) -> int:
        return len(self.prompts)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """``count`` prompts drawn with replacement, and their context ``[count, text_len, text_dim]`` float32."""
        picks = torch.randint(len(self.prompts), (count,), generator=generator).tolist()
        return [self.prompts[i] for i in picks], torch.stack([self.embeddings[i] for i in picks]).to(self.device)

    @staticmethod
    def save(
        path: str | PathLike[str],
        prompts: Sequence[str],
        embeddings: Sequence[torch.Tensor],
        negative: torch.Tensor | None = None,
    ) -> None:
        """Write a prompt file, whole or not at all, from prompts and their embeddings ``[n_i, text_dim]``.

        Raises ``ValueError`` for embeddings that a ``PromptFile`` would refuse.
        """
        from raven.checkpoint import write_safetensors

        if len(prompts) != len(embeddings) or not prompts:
            raise ValueError(f"embeddings: got {len(embeddings)} for {len(prompts)} prompts, expected one for each")
        names, rows = [*prompts], [*embeddings]
        if negative is not None:
            names, rows = [*names, "negative"], [*rows, negative]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: got {str(list(prompts))[:60]}, expected texts")
        for name, embedding in zip(names, rows, strict=True):
            if not isinstance(embedding, torch.Tensor):
                raise TypeError(f"embedding of {name!r}: got {type(embedding).__name__}, expected a tensor")
            if embedding.ndim == 0 or not embedding.is_floating_point():
                got = f"{str(embedding.dtype).removeprefix('torch.')} of shape {tuple(embedding.shape)}"
                raise ValueError(f"embedding of {name!r}: got {got}, expected floating-point [n, text_dim]")
            _padded(embedding, len(embedding), name)
        _check_widths(names, rows)
        tensors = {str(i): embedding.contiguous() for i, embedding in enumerate(embeddings)}
        if negative is not None:
            tensors["negative"] = negative.contiguous()
        write_safetensors(path, tensors, {"prompts": json.dumps(list(prompts))})


def _safetensors(name: str) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError("safetensors is not installed; pip install 'raven-kernels[train]'") from error
    return getattr(safetensors, name)


def _prompts_of(metadata: Mapping[str, str], path: str | PathLike[str]) -> list[str]:
    try:
        prompts = json.loads(metadata.get("prompts", "[]"))
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {path} has prompts in its metadata that are not JSON ({error})") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"path: {path} has {str(prompts)[:60]!r} for prompts in its metadata, expected a list of texts"
        )
    return prompts


def _check_widths(names: Sequence[str], rows: Sequence[torch.Tensor]) -> None:
    for name, embedding in zip(names, rows, strict=True):
        if embedding.shape[1] != rows[0].shape[1]:
            want = f"{rows[0].shape[1]} as that of {names[0]!r}"
            raise ValueError(f"embedding of {name!r}: got text_dim {embedding.shape[1]}, expected {want}")


def _padded(rows: torch.Tensor, text_len: int, prompt: str) -> torch.Tensor:
    if rows.ndim != 2 or len(rows) > text_len:
        raise ValueError(
            f"embedding of {prompt!r}: got shape {tuple(rows.shape)}, expected [at most {text_len}, text_dim]"
        )
    check_finite(f"embedding of {prompt!r}", rows)
    return torch.nn.functional.pad(rows.float(), (0, 0, 0, text_len - len(rows)))
