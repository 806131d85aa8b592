"""What stands around the transformer when videos are generated: where its text comes from, where its latents go."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from raven.checkpoint import load_checkpoint
from raven.errors import check_finite
from raven.generate.handover import Decode
from raven.generate.request import Request
from raven.memory import GIB, free_memory
from raven.models.config import WanConfig
from raven.worlds import Shapes
from raven.worlds.pictures import to_bytes


def read_context(path: str | Path) -> list[torch.Tensor]:
    """Text embeddings from a safetensors file: tensors ``[n, text_dim]``, or one ``[B, n, text_dim]``.

    In the order of their names, in which numbers count as such: a file of ``raven.train.PromptFile`` gives its prompts,
    one video each, and its ``"negative"`` is none of them. Raises ``ValueError`` for other shapes or dtypes, and for a
    NaN or an infinity, with the name of the tensor.
    """
    tensors = load_checkpoint(path)
    context: list[torch.Tensor] = []
    for name in sorted(tensors.keys() - {"negative"}, key=_natural):
        tensor = tensors[name]
        if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (2, 3):
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"context: got {got} for {name!r}, expected [n, text_dim] or [B, n, text_dim]")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"context: got {kind} for {name!r}, expected floating-point text embeddings")
        rows = [tensor] if tensor.ndim == 2 else list(tensor)
        for i, row in enumerate(rows):
            check_finite(f"context: prompt {i} of {name!r}" if tensor.ndim == 3 else f"context: prompt {name!r}", row)
        context += rows
    if not context:
        raise ValueError(f"context: {path} holds no tensors, expected text embeddings [n, text_dim]")
    return context


def _natural(name: object) -> list[tuple[str, int]]:
    """A key that sorts "2" before "10"."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(name))]


class Source:
    """Text from embeddings in a file; finished chunks stay latents. Others build on it."""

    fps = 8.0
    # Whether chunks can become videos, and pixels of a latent's side.
    decodes = False
    spatial = 1

    def __init__(self, context: list[torch.Tensor] | None) -> None:
        self._context = context

    def check_prompts(self, prompts: Sequence[str], later: Sequence[str]) -> None:
        """Raise ``ValueError`` for prompts, at the beginning and later, that this has no text encoder for."""
        if self._context is None:
            raise ValueError(
                "prompt: this checkpoint comes without a text encoder; give --wan FOLDER with one, or "
                "--context FILE.safetensors with embeddings"
            )
        if prompts or later:
            name = "prompt" if prompts else "switch"
            raise ValueError(f"context: got it together with {name}, expected one of them")

    def check_model(self, config: WanConfig, prompts: Sequence[str]) -> None:
        """Raise ``ValueError`` for a model, or prompts for its text length, that do not fit."""

    def batch(self, prompts: Sequence[str]) -> int:
        """How many videos there will be."""
        return len(prompts) if self._context is None else len(self._context)

    def encode(self, prompts: Sequence[str], config: WanConfig, device: torch.device) -> list[torch.Tensor]:
        """Context of the prompts, on the device."""
        return [rows.to(device) for rows in self._context or ()]

    def frames(self, latent_frames: int) -> int:
        """Video frames of so many latent frames from the beginning."""
        return latent_frames

    def decoder(self, device: torch.device) -> Decode:
        """What makes pictures ``[B, F, H, W, 3]`` uint8 of the chunks ``[B, C, f, H, W]`` of new videos, in order."""
        raise ValueError("out: got a video, expected latents: there is no decoder")

    def begin(self) -> None:
        """The next chunk decoded begins new videos."""

    def decoder_memory(self, batch: int, latent_size: tuple[int, int]) -> dict[str, int]:
        """Bytes that the decoder takes on a GPU at its peak."""
        return {}


class World(Source):
    """A built-in world: prompts have a fixed code, and its videos are their own latents."""

    decodes = True

    def __init__(self, world: Shapes, fps: float) -> None:
        super().__init__(None)
        self.world, self.fps = world, fps

    def check_prompts(self, prompts: Sequence[str], later: Sequence[str]) -> None:
        if not prompts:
            example = repr(self.world.prompts(1, seed=0)[0])
            raise ValueError(f"prompt: got none, expected at least one, such as {example}")
        for prompt in [*prompts, *later]:
            self.world.parse(prompt)

    def encode(self, prompts: Sequence[str], config: WanConfig, device: torch.device) -> list[torch.Tensor]:
        return list(self.world.encode(prompts, device=device))

    def decoder(self, device: torch.device) -> Decode:
        return to_bytes


class Wan(Source):
    """Wan's text encoder and VAE, from a folder in diffusers' layout; with ``context``, the VAE only."""

    fps = 16.0
    decodes = True

    def __init__(self, folder: str, context: list[torch.Tensor] | None, dtype: torch.dtype) -> None:
        from raven.integrations.wan_text import WanText
        from raven.integrations.wan_vae import WanVAE

        super().__init__(context)
        self._text = WanText.load(folder, dtype) if context is None else None
        self.vae = WanVAE.load(folder, dtype=dtype)
        self.spatial = self.vae.spatial

    def check_prompts(self, prompts: Sequence[str], later: Sequence[str]) -> None:
        if self._text is None:
            super().check_prompts(prompts, later)
        elif not prompts:
            raise ValueError("prompt: got none, expected at least one")

    def check_model(self, config: WanConfig, prompts: Sequence[str]) -> None:
        if self.vae.channels != config.in_dim:
            want = f"{config.in_dim} as the checkpoint has"
            raise ValueError(f"wan: got a VAE of {self.vae.channels} latent channels, expected {want}")
        if self._text is None:
            return
        if self._text.width != config.text_dim:
            want = f"{config.text_dim} as the checkpoint has"
            raise ValueError(f"wan: got a text encoder of width {self._text.width}, expected {want}")
        self._text.tokenize(prompts, config.text_len)

    def encode(self, prompts: Sequence[str], config: WanConfig, device: torch.device) -> list[torch.Tensor]:
        if self._text is None:
            return super().encode(prompts, config, device)
        where = device
        if device.type == "cuda" and (free := free_memory(device)) < self._text.nbytes + GIB:
            where = torch.device("cpu")
            need = f"needs {self._text.nbytes / GIB:.1f} GiB, {free / GIB:.1f} are free on {device}"
            print(f"the text encoder runs on the CPU ({need})", file=sys.stderr)
        print(f"encoding {len(prompts)} {'prompt' if len(prompts) == 1 else 'prompts'}", file=sys.stderr)
        rows = [row.to(device) for row in self._text.encode(prompts, config.text_len, where)]
        self._text.release()  # it is as large as all the rest
        if where.type == "cuda":
            torch.cuda.empty_cache()
        return rows

    def frames(self, latent_frames: int) -> int:
        return self.vae.frames(latent_frames)

    def decoder(self, device: torch.device) -> Decode:
        self.vae.to(device)
        return lambda latents: to_bytes(self.vae.decode(latents))

    def begin(self) -> None:
        self.vae.reset()

    def decoder_memory(self, batch: int, latent_size: tuple[int, int]) -> dict[str, int]:
        return self.vae.memory(batch, latent_size)


def pick_source(request: Request, trained: dict[str, Any], dtype: torch.dtype) -> Source:
    """Where a request's text comes from and its latents go; ``trained`` is what the checkpoint says of itself."""
    context = read_context(request.context) if request.context is not None else None
    if request.wan is not None:
        return Wan(request.wan, context, dtype)
    if context is None and "world" in trained:
        return World(Shapes(**trained["world"]), trained.get("fps", 8.0))
    return Source(context)
