"""The language of the world: one clause a shape, out of a small fixed vocabulary.

    prompt := clause ("and" clause)*
    clause := "a" COLOUR SHAPE "moves" DIRECTION ["slowly" | "fast"]

No speed word means slowly.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLOURS = ("red", "green", "blue", "yellow", "cyan", "purple")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "fast")
VOCABULARY = ("a", "and", "moves", *COLOURS, *SHAPES, *DIRECTIONS, *SPEEDS)

GRAMMAR = "a COLOUR SHAPE moves DIRECTION [slowly|fast], clauses joined by 'and'"
CLAUSE_ROWS = 8  # rows of the encoding a clause owns, so that a word's row says which clause and which role


@dataclass(frozen=True)
class Clause:
    """One shape as a prompt describes it; every field is a word of the vocabulary."""

    colour: str
    shape: str
    direction: str
    speed: str = "slowly"

    def __str__(self) -> str:
        words = f"a {self.colour} {self.shape} moves {self.direction}"
        return f"{words} fast" if self.speed == "fast" else words

    @property
    def indices(self) -> tuple[int, int, int, int]:
        """Index of colour, shape, direction and speed in ``COLOURS``, ``SHAPES``, ``DIRECTIONS``, ``SPEEDS``."""
        return (
            COLOURS.index(self.colour),
            SHAPES.index(self.shape),
            DIRECTIONS.index(self.direction),
            SPEEDS.index(self.speed),
        )


def to_prompt(clauses: Sequence[Clause]) -> str:
    """The sentence that ``parse`` reads back as ``clauses``."""
    return " and ".join(str(clause) for clause in clauses)


def _check_words(words: list[str], prompt: str) -> None:
    for word in words:
        if word not in VOCABULARY:
            close = difflib.get_close_matches(word, VOCABULARY, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"prompt: got unknown word {word!r}{hint} in {prompt!r}, expected words of: {', '.join(VOCABULARY)}"
            )


def parse(prompt: str, max_shapes: int | None = None) -> list[Clause]:
    """Clauses of a prompt, in its order; the empty prompt has none.

    Raises ``TypeError`` for something that is no string, ``ValueError`` for an unknown word (naming it), for
    words in an order that is not a sentence, and for more than ``max_shapes`` clauses.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: got {type(prompt).__name__}, expected str")
    words = prompt.lower().replace(",", " ").rstrip(" .").split()
    _check_words(words, prompt)
    if not words:
        return []
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            groups.append([])
        else:
            groups[-1].append(word)
    roles = (("a",), COLOURS, SHAPES, ("moves",), DIRECTIONS, SPEEDS)
    clauses = []
    for group in groups:
        fits = len(group) in (5, 6) and all(word in role for word, role in zip(group, roles, strict=False))
        if not fits:
            raise ValueError(f"prompt: got clause {' '.join(group)!r} in {prompt!r}, expected {GRAMMAR}")
        clauses.append(Clause(group[1], group[2], group[4], group[5] if len(group) == 6 else "slowly"))
    if max_shapes is not None and len(clauses) > max_shapes:
        raise ValueError(f"prompt: got {len(clauses)} shapes in {prompt!r}, expected at most {max_shapes}")
    return clauses


def text_dim(text_len: int) -> int:
    """Width of an encoded row: one-hot word, one-hot row, rounded up to a multiple of 16."""
    return -(-(len(VOCABULARY) + text_len) // 16) * 16


def encode(
    prompts: Sequence[str],
    text_len: int = 24,
    max_shapes: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Context of prompts: ``[B, text_len, text_dim(text_len)]``, each row a one-hot word and a one-hot position.

    Cross-attention has no positions of its own, so they are part of the row. Clause ``i`` starts at row
    ``8 * i``; rows without a word are zero, and the empty prompt is all zeros (the negative context of
    classifier-free guidance). "slowly" encodes like no speed word at all.
    """
    context = torch.zeros(len(prompts), text_len, text_dim(text_len), dtype=dtype)
    for b, prompt in enumerate(prompts):
        clauses = parse(prompt, max_shapes)
        if len(clauses) * CLAUSE_ROWS > text_len:
            raise ValueError(f"prompt: got {len(clauses)} shapes, expected at most {text_len // CLAUSE_ROWS}")
        for i, clause in enumerate(clauses):
            words = (["and"] if i else ["a"]) + str(clause).split()[1:]
            for row, word in enumerate(words, start=i * CLAUSE_ROWS):
                context[b, row, VOCABULARY.index(word)] = 1
                context[b, row, len(VOCABULARY) + row] = 1
    return context.to(device)
