"""Wan's text encoder, UMT5, through transformers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from raven.integrations import need, part_of
from raven.models.config import read_object


def clean(prompt: str) -> str:
    """The prompt as Wan was trained on it: broken characters mended (ftfy), HTML entities and runs of space resolved.

    Raises ``ModuleNotFoundError`` without ftfy: left out, the same prompt would be another one.
    """
    text = need("ftfy", "cleaning prompts").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(text)).split())


class WanText:
    """Prompts to rows of text embeddings, with the tokenizer and the encoder of a folder in diffusers' layout.

    The encoder (5.7 billion weights in Wan's own) is read at the first ``encode`` and kept until ``release``.
    """

    def __init__(self, tokenizer: Any, encoder_folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self._folder = encoder_folder
        self._encoder: Any = None

    @classmethod
    def load(cls, folder: str | PathLike[str], dtype: torch.dtype = torch.bfloat16) -> WanText:
        """Read ``folder/tokenizer`` and find ``folder/text_encoder``, whose weights will have ``dtype``.

        ``ModuleNotFoundError`` without transformers or ftfy, ``OSError`` when they cannot be read.
        """
        paths = [part_of(folder, name) for name in ("tokenizer", "text_encoder")]
        need("ftfy", "cleaning prompts")
        transformers = need("transformers", "encoding prompts")
        return cls(transformers.AutoTokenizer.from_pretrained(paths[0]), paths[1], dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoder's files: its weights', or more when they will be narrower."""
        return sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))

    @property
    def width(self) -> int:
        """Numbers in a row of ``encode``, as the encoder's ``config.json`` says."""
        return read_object((self._folder / "config.json").read_bytes(), str(self._folder / "config.json"))["d_model"]

    def encoder(self, device: torch.device | str = "cpu") -> Any:
        """The ``UMT5EncoderModel``, on the device."""
        if self._encoder is None:
            transformers = need("transformers", "encoding prompts")
            model = transformers.UMT5EncoderModel.from_pretrained(self._folder, dtype=self.dtype)
            self._encoder = model.eval().requires_grad_(False)
        return self._encoder.to(device)

    def release(self) -> None:
        """Give the encoder's memory back."""
        self._encoder = None

    def tokenize(self, prompts: Sequence[str], text_len: int = 512) -> list[list[int]]:
        """Token ids of cleaned prompts, the end mark included; ``ValueError`` for more than ``text_len`` of them."""
        tokens = [list(self.tokenizer(clean(prompt)).input_ids) for prompt in prompts]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > text_len:
                start = prompt[:40] + ("..." if len(prompt) > 40 else "")
                raise ValueError(f"prompt: got {len(ids)} tokens in {start!r}, expected at most text_len = {text_len}")
        return tokens

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], text_len: int = 512, device: torch.device | str = "cpu"
    ) -> list[torch.Tensor]:
        """One ``[n_i, width]`` a prompt, n_i its number of tokens; rows beyond them are the transformer's zeros.

        Each prompt runs on its own: padding would change nothing but the time. Raises ``ValueError`` for a prompt of
        more than ``text_len`` tokens.
        """
        tokens = self.tokenize(prompts, text_len)
        encoder = self.encoder(device)
        return [encoder(torch.tensor([ids], device=device)).last_hidden_state[0] for ids in tokens]
