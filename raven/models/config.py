"""The numbers that define a Wan transformer, under the names that Wan's own ``config.json`` uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

# Keys of released config files that describe something else than the text-to-video transformer, with the values
# under which they change nothing here. ``None`` is any value.
_DESCRIPTIVE: dict[str, tuple[Any, ...] | None] = {
    "_class_name": None,
    "_diffusers_version": None,
    "_name_or_path": None,
    "model_type": ("t2v",),
    "window_size": ([-1, -1], (-1, -1)),
}


def read_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``text``; ``ValueError`` that says ``where`` it was when it is none."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {where} is not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"path: {where} holds a JSON {type(values).__name__}, expected an object")
    return values


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan2.1 text-to-video transformer; the defaults are those of the 1.3B model.

    ``patch_size`` is (frames, rows, columns) of one token; the temporal size is 1, because a chunk is made of whole
    latent frames. ``text_len`` is the number of text rows every prompt is padded to. Raises ``ValueError`` for sizes
    that do not fit each other, and for values of another kind.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True

    def __post_init__(self) -> None:
        patch = self.patch_size
        if not isinstance(patch, list | tuple) or not all(type(p) is int for p in patch):
            raise ValueError(f"patch_size: got {patch!r}, expected (1, rows, columns)")
        object.__setattr__(self, "patch_size", tuple(patch))
        if not isinstance(self.eps, int | float) or not 0 < self.eps < 1:
            raise ValueError(f"eps: got {self.eps!r}, expected a small positive number")
        for name in ("qk_norm", "cross_attn_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_dim", "text_len")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim: got {self.dim}, expected an even head dim for num_heads = {self.num_heads}")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim: got {self.freq_dim}, expected an even number")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size: got {self.patch_size}, expected (1, rows, columns)")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @classmethod
    def wan_1_3b(cls) -> WanConfig:
        """Wan2.1-T2V-1.3B."""
        return cls()

    @classmethod
    def wan_14b(cls) -> WanConfig:
        """Wan2.1-T2V-14B."""
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WanConfig:
        """Build a config from the keys of a ``config.json``; an unknown key is a ``ValueError`` that names it."""
        known = {f.name for f in fields(cls)}
        taken: dict[str, Any] = {}
        for key, value in values.items():
            if key in known:
                taken[key] = value
            elif key not in _DESCRIPTIVE:
                raise ValueError(f"config key: got {key!r}, expected one of {', '.join(sorted(known))}")
            elif (allowed := _DESCRIPTIVE[key]) is not None and value not in allowed:
                raise ValueError(f"{key}: got {value!r}, expected {allowed[0]!r}")
        return cls(**taken)

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> WanConfig:
        """Read a ``config.json`` (ours or Wan's own). ``ValueError`` when it is not JSON or has unknown keys."""
        return cls.from_dict(read_object(Path(path).read_bytes(), str(path)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "patch_size": list(self.patch_size)}

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The config as JSON text, also written to ``path`` when one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
