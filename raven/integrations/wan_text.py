"""Wan's text encoder, UMT5, through transformers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch

from raven.integrations import need, part_of


def clean(prompt: str) -> str:
    """The prompt as Wan was trained on it: broken characters mended (ftfy), HTML entities and runs of space resolved.

    Raises ``ModuleNotFoundError`` without ftfy: left out, the same prompt would be another one.
    """
    text = need("ftfy", "cleaning prompts").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(text)).split())


class WanText:
    """Prompts to rows of text embeddings. ``tokenizer``, ``encoder``: as transformers loads them."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> WanText:
        """Read ``folder/tokenizer`` and ``folder/text_encoder`` (5.7 billion weights in Wan's own).

        ``ModuleNotFoundError`` without transformers, ``OSError`` when they cannot be read.
        """
        paths = [part_of(folder, name) for name in ("tokenizer", "text_encoder")]
        transformers = need("transformers", "encoding prompts")
        tokenizer = transformers.AutoTokenizer.from_pretrained(paths[0])
        encoder = transformers.UMT5EncoderModel.from_pretrained(paths[1], dtype=dtype)
        return cls(tokenizer, encoder.to(device))

    @property
    def width(self) -> int:
        """Numbers in a row of ``encode``."""
        return self.encoder.config.d_model

    def tokenize(self, prompts: Sequence[str], text_len: int = 512) -> list[list[int]]:
        """Token ids of cleaned prompts, the end mark included; ``ValueError`` for more than ``text_len`` of them."""
        tokens = [list(self.tokenizer(clean(prompt)).input_ids) for prompt in prompts]
        for prompt, ids in zip(prompts, tokens, strict=True):
            if len(ids) > text_len:
                start = prompt[:40] + ("..." if len(prompt) > 40 else "")
                raise ValueError(f"prompt: got {len(ids)} tokens in {start!r}, expected at most text_len = {text_len}")
        return tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], text_len: int = 512) -> list[torch.Tensor]:
        """One ``[n_i, width]`` a prompt, n_i its number of tokens; rows beyond them are the transformer's zeros.

        Each prompt runs on its own: padding would change nothing but the time. Raises ``ValueError`` for a prompt of
        more than ``text_len`` tokens.
        """
        device = self.encoder.device
        return [
            self.encoder(torch.tensor([ids], device=device)).last_hidden_state[0]
            for ids in self.tokenize(prompts, text_len)
        ]
