"""Reading and writing Wan checkpoints: one set of parameter names out of the many wrappings that are in use.

Files are read with safetensors, or with ``torch.load(weights_only=True)``; nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
except ImportError as missing:
    hint = "checkpoints need safetensors: pip install raven-kernels[train]"
    raise ModuleNotFoundError(hint, name="safetensors") from missing

from raven.errors import DAMAGED
from raven.models.config import WanConfig, read_object
from raven.models.wan import CausalWan

# Which model of a training checkpoint is taken when it holds several, the first that is there.
PARTS = ("generator_ema", "generator", "model", "state_dict", "critic")
_PREFIXES = ("model.", "net.", "module.", "diffusion_model.", "transformer.")
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_DIFFUSERS = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^(blocks\.\d+\.)scale_shift_table$", r"\1modulation"),
    (r"^(blocks\.\d+\.)attn1\.", r"\1self_attn."),
    (r"^(blocks\.\d+\.)attn2\.", r"\1cross_attn."),
    (r"^(blocks\.\d+\.(?:self|cross)_attn\.)to_([qkv])\.", r"\1\2."),
    (r"^(blocks\.\d+\.(?:self|cross)_attn\.)to_out\.0\.", r"\1o."),
    # Of the three norms of a block only the one before cross-attention has weights; diffusers numbers it 2.
    (r"^(blocks\.\d+\.)norm2\.", r"\1norm3."),
    (r"^(blocks\.\d+\.)ffn\.net\.0\.proj\.", r"\1ffn.0."),
    (r"^(blocks\.\d+\.)ffn\.net\.2\.", r"\1ffn.2."),
)
_DIFFUSERS_RULES = tuple((re.compile(pattern), name) for pattern, name in _DIFFUSERS)


@dataclass(frozen=True)
class NormalizedState:
    """A state dict under Wan's own names, and what did not match.

    ``state``: the tensors that the model of ``config`` has. ``missing``: its parameters that were not given.
    ``unused``: keys as given that it has no place for. ``part``: which top-level entry was taken, if there were any.
    """

    state: dict[str, torch.Tensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    config: WanConfig
    part: str | None

    def require_complete(self) -> None:
        """Raise ``ValueError`` that names the missing and the unused keys, if there are any."""
        problems = [
            f"{len(keys)} {what} ({', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
            for what, keys in (("missing", self.missing), ("unused", self.unused))
            if keys
        ]
        if problems:
            raise ValueError(f"state dict: got {' and '.join(problems)} keys, expected those of {self.config}")


def _open(state: Mapping[str, Any], part: str | None) -> tuple[Mapping[str, Any], str | None]:
    """Descend into the top-level entry that holds the model."""
    nested = [name for name in PARTS if isinstance(state.get(name), Mapping)]
    if part is not None:
        if not isinstance(state.get(part), Mapping):
            raise ValueError(f"part: got {part!r}, expected one of {', '.join(nested) or 'none: it is a flat file'}")
        return _open(state[part], None)[0], part
    if not nested:
        return state, None
    return _open(state[nested[0]], None)[0], nested[0]


def plain_name(key: str) -> str:
    """Wan's own name of a parameter that may be wrapped, prefixed or named as in diffusers."""
    for infix in _INFIXES:
        key = key.replace(infix, "")
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    for pattern, name in _DIFFUSERS_RULES:
        key = pattern.sub(name, key)
    return key


def infer_config(state: Mapping[str, torch.Tensor], head_dim: int = 128, text_len: int = 512) -> WanConfig:
    """The sizes of a model from the shapes of its parameters (plain names).

    Head dim and text length leave no trace in the shapes: Wan's own are assumed. Raises ``ValueError`` when a
    parameter that tells a size is not there.
    """
    telling = (
        "patch_embedding.weight",
        "blocks.0.ffn.0.weight",
        "head.head.weight",
        "time_embedding.0.weight",
        "text_embedding.0.weight",
    )
    for name in telling:
        if name not in state:
            some = ", ".join(list(state)[:4])
            raise ValueError(f"state dict: got no {name!r} (keys such as {some}), expected a Wan transformer")
    patch, ffn, head, time, text = (tuple(state[name].shape) for name in telling)
    dim, in_dim, *patch_size = patch
    layers = {int(m.group(1)) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    if len(patch_size) != 3 or dim % head_dim:
        raise ValueError(
            f"patch_embedding.weight: got shape {patch}, expected [n x {head_dim}, C, 1, ph, pw]; "
            "give a config for another head dim"
        )
    return WanConfig(
        dim=dim,
        ffn_dim=ffn[0],
        num_heads=dim // head_dim,
        num_layers=max(layers) + 1,
        in_dim=in_dim,
        out_dim=head[0] // (patch_size[1] * patch_size[2]),
        freq_dim=time[1],
        text_dim=text[1],
        text_len=text_len,
        patch_size=tuple(patch_size),
        qk_norm="blocks.0.self_attn.norm_q.weight" in state,
        cross_attn_norm="blocks.0.norm3.weight" in state,
    )


def normalize_state_dict(
    state: Mapping[str, Any], config: WanConfig | None = None, part: str | None = None
) -> NormalizedState:
    """Bring a state dict to Wan's own names.

    Accepts a top-level entry (``generator_ema``, ``generator``, ``model``, ``state_dict``, ``critic``: the first that
    is there, or the one named by ``part``), the prefixes and infixes of DDP, FSDP, checkpointing and ``torch.compile``,
    and the names of diffusers. Without ``config`` the sizes are inferred. Raises ``ValueError`` when two keys become
    the same name, or a shape differs from the config's; missing and unused keys are reported, not raised.
    """
    flat, taken = _open(state, part)
    named: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    unused = []
    for key, value in flat.items():
        if not isinstance(value, torch.Tensor):
            unused.append(str(key))
            continue
        name = plain_name(key)
        if name in named:
            raise ValueError(f"state dict: got {origin[name]!r} and {key!r}, expected only one key for {name!r}")
        named[name], origin[name] = value, key
    config = infer_config(named) if config is None else config
    with torch.device("meta"):
        expected = CausalWan(config).state_dict()
    for name, want in expected.items():
        if name in named and named[name].shape != want.shape:
            got = tuple(named[name].shape)
            raise ValueError(f"{origin[name]}: got shape {got}, expected {tuple(want.shape)} for this config")
    return NormalizedState(
        state={name: named[name] for name in expected if name in named},
        missing=tuple(name for name in expected if name not in named),
        unused=(*unused, *(origin[name] for name in named if name not in expected)),
        config=config,
        part=taken,
    )


def load_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read the tensors of a file: ``.safetensors``, its ``.index.json`` with shards, or a torch file.

    Torch files are read with ``weights_only=True``. Raises ``FileNotFoundError`` when there is no file, and
    ``ValueError`` that names the file when it cannot be read or holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: got {path}, expected a checkpoint file")
    try:
        if path.suffix == ".json":
            index = json.loads(path.read_text(encoding="utf-8"))
            shards = sorted({path.parent / Path(shard).name for shard in index["weight_map"].values()})
            if any(shard.suffix == ".json" for shard in shards):
                raise ValueError("an index names an index")
        elif path.suffix == ".safetensors":
            return load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(f"path: {path} cannot be read as a checkpoint of weights ({error})") from error
    if path.suffix == ".json":
        return {name: tensor for shard in shards for name, tensor in load_checkpoint(shard).items()}
    if not isinstance(loaded, Mapping):
        raise ValueError(f"path: {path} holds a {type(loaded).__name__}, expected a state dict")
    return dict(loaded)


def load_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The text in a safetensors file's header; ``ValueError`` that names the file when it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"path: {path} cannot be read as a checkpoint of weights ({error})") from error


def _is_zip(path: Path) -> bool:
    """Torch files since 1.6 are zip archives, which can be mapped instead of read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def load_model(
    path: str | PathLike[str],
    config: WanConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    part: str | None = None,
) -> CausalWan:
    """A model with the weights of a checkpoint file, or of a folder with one and its ``config.json``.

    Without ``config``, the file's own (as ``save_checkpoint`` writes it), else a ``config.json`` beside it is used if
    it is ours or Wan's, else the sizes are inferred from the shapes. ``dtype`` defaults to that of the file.
    Raises ``ValueError`` that names the first key that does not fit, or the missing and unused keys.
    """
    path = Path(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if config is None:
        config = _config_of(path)
    found = normalize_state_dict(load_checkpoint(path), config, part)
    found.require_complete()
    with torch.device("meta"):
        model = CausalWan(found.config)
    model.load_state_dict(found.state, assign=True)
    kind = dtype if dtype is not None else found.state["patch_embedding.weight"].dtype
    return model.to(device=device, dtype=kind).requires_grad_(True)


def _checkpoint_in(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt", "*.pth"):
        if files := sorted(folder.glob(pattern)):
            if len(files) > 1:
                raise ValueError(f"path: {folder} holds {', '.join(f.name for f in files)}, expected one checkpoint")
            return files[0]
    raise FileNotFoundError(f"path: {folder} holds no .safetensors, .pt or .pth file")


def _config_of(path: Path) -> WanConfig | None:
    """The config stored in a safetensors file, or in a ``config.json`` of Wan's form beside the checkpoint."""
    if path.suffix == ".safetensors" and path.is_file() and "config" in (metadata := load_metadata(path)):
        return WanConfig.from_dict(read_object(metadata["config"], f"the config in {path}"))
    beside = path.with_name("config.json")
    if beside.is_file() and "dim" in (values := read_object(beside.read_bytes(), str(beside))):
        return WanConfig.from_dict(values)
    return None


def write_safetensors(
    path: str | PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all; ``OSError`` that names it when it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask gives any new file; safetensors leaves its owner only
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        partial.chmod(mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # the latter is what safetensors makes of a full disk
        raise OSError(f"could not write {path} ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(
    path: str | PathLike[str],
    model: CausalWan,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model and its config to a safetensors file, whole or not at all.

    ``dtype`` converts the weights on the way (float16 halves a small model that is shipped). ``metadata`` is kept in
    the file's header; ``raven generate`` reads how the model was trained to sample from its entry ``"raven"`` (JSON).
    Raises ``OSError`` when it cannot be written.
    """
    state = {
        name: value.detach().to(dtype=dtype or value.dtype).contiguous().cpu()
        for name, value in model.state_dict().items()
    }
    header = {**(metadata or {}), "format": "pt", "config": json.dumps(model.config.to_dict())}
    write_safetensors(path, state, header)
