"""How much GPU memory a stream takes at its peak, from sizes alone, before anything is allocated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raven.models.config import WanConfig

# Of cuBLAS for a stream, on Hopper; graphs are captured on a stream of their own.
CUBLAS_WORKSPACE = 32 * 2**20
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """The parts of a peak, in bytes, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(self.parts.values())

    def plus(self, parts: Mapping[str, int]) -> Estimate:
        """With more parts."""
        return Estimate({**self.parts, **parts})

    def __str__(self) -> str:
        inside = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size >= 0.005 * GIB)
        return f"{self.total / GIB:.2f} GiB ({inside})"


def linear_weights(config: WanConfig) -> int:
    """How many numbers the matrices of all blocks hold that ``--fp8 linears`` stores in one byte each."""
    # Self-attention q, k, v, o; cross-attention q and o (its k and v run once a prompt); the MLP's two.
    return config.num_layers * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)


def parameters(config: WanConfig) -> int:
    """How many numbers the transformer of this config holds."""
    d, f = config.dim, config.ffn_dim
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    linears = 8 * (d * d + d) + d * f + f + f * d + d
    norms = (4 * d if config.qk_norm else 0) + (2 * d if config.cross_attn_norm else 0)
    text = config.text_dim * d + d + d * d + d
    time = config.freq_dim * d + d + d * d + d + d * 6 * d + 6 * d
    ends = config.in_dim * patch * d + d + d * config.out_dim * patch + config.out_dim * patch + 2 * d
    return config.num_layers * (linears + norms + 6 * d) + text + time + ends


def cache_slots(
    frames: int | None, chunk_frames: int, sink: int, window: int | None, merged: bool = True, recache: int = 0
) -> int:
    """Chunks for which a stream's cache has room."""
    if window is None:
        if frames is None:
            raise ValueError("frames: got None, expected the length of the video (window is None as well)")
        return -(-frames // chunk_frames)
    # Merged passes need a slot more than the ring, and what is encoded anew may reach further back than the window.
    return sink + window + 1 + max(int(merged), recache - window - 1)


def stream_memory(
    config: WanConfig,
    *,
    latent_size: tuple[int, int],
    batch: int = 1,
    chunk_frames: int = 3,
    frames: int | None = None,
    sink: int = 0,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    guidance: bool = False,
    fp8_cache: bool = False,
    fp8_linears: bool = False,
    keys: str = "rotated",
    ema: float | None = None,
    recache: int = 0,
    graphs: bool = True,
) -> Estimate:
    """Peak memory on the GPU of a ``Stream`` with these arguments, without what decodes its latents.

    ``latent_size`` is (H, W); ``frames``, ``chunk_frames`` count latent frames, ``sink``, ``window`` chunks. With
    ``guidance`` everything runs on twice the batch. Other arguments as in ``Stream``.
    """
    size = dtype.itemsize
    merged = keys == "rotated"  # the clean pass of a chunk runs together with the next chunk's first step
    d, f, layers = config.dim, config.ffn_dim, config.num_layers
    rows = batch * (2 if guidance else 1)
    _, ph, pw = config.patch_size
    per_frame = (latent_size[0] // ph) * (latent_size[1] // pw)
    chunk_tokens = chunk_frames * per_frame
    slots = cache_slots(frames, chunk_frames, sink, window, merged, recache)
    stored = slots * chunk_tokens * rows  # tokens of one layer

    weights = parameters(config) * size
    if fp8_linears:
        weights -= linear_weights(config) * (size - 1)
    text = 2 * layers * rows * config.text_len * d * size
    element = 1 if fp8_cache else size
    cache = 2 * layers * stored * d * element
    if fp8_cache:
        cache += 2 * layers * stored * config.num_heads * 4
    if ema is not None and size == 2:  # what rounding takes from the blended sink
        cache += 2 * layers * sink * chunk_tokens * rows * d * size
    # One layer's keys (and values, when they are stored in another form) as attention reads them.
    read = stored * d * size * (2 if fp8_cache else int(not merged))

    tokens = rows * chunk_tokens * (2 if merged else 1)
    # The widest moment of a block, in its MLP: seven tensors of the model's width (the block's input, the attention's
    # output, two sums, the normed input, the MLP's output, the result), and the hidden layer. In half precision the
    # GELU is part of a product; float8 products read a second hidden layer, of a byte a number.
    hidden = f * (size + 1) if fp8_linears else f * size * (1 if size == 2 else 2)
    activations = tokens * (7 * d * size + hidden)
    return Estimate(
        {
            "weights": weights,
            "text": text,
            "cache": cache,
            "cache as it is read": read,
            "one forward": activations,
            # What a captured forward works in cannot be used by anything else, such as the eager one before it.
            "graphs": activations if graphs else 0,
            "workspaces": CUBLAS_WORKSPACE * (2 if graphs else 1),
        }
    )


def training_memory(
    config: WanConfig,
    *,
    latent_size: tuple[int, int],
    chunk_frames: Sequence[int] = (3,) * 7,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: str = "selective",
) -> Estimate:
    """Peak of the repacked forward and its backward, gradients present, without masters and an optimizer's state.

    ``checkpointing``: "selective" or "full". ``latent_size`` is (H, W), ``chunk_frames`` counts latent frames. Raises
    ``ValueError`` for another mode.
    """
    if checkpointing not in ("selective", "full"):
        raise ValueError(f"checkpointing: got {checkpointing!r}, expected selective or full")
    size, d, f = dtype.itemsize, config.dim, config.ffn_dim
    _, ph, pw = config.patch_size
    frames = 2 * sum(chunk_frames) - chunk_frames[-1]  # the last chunk has no clean copy
    tokens = batch * frames * (latent_size[0] // ph) * (latent_size[1] // pw)
    kept = d * size  # a token's input of every block; selective: the output and statistics of its attention as well
    if checkpointing == "selective":
        kept += d * size + config.num_heads * 4
    weights = parameters(config) * size
    return Estimate(
        {
            "weights": weights,
            "gradients": weights,
            "kept for the backward": config.num_layers * tokens * kept,
            "one block's backward": tokens * (16 * d + 3 * f) * size,
            "workspaces": CUBLAS_WORKSPACE,
        }
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still allocate on a GPU."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def require(needed: Callable[..., Estimate], free: int, ignore: bool = False, **asked: Any) -> None:
    """Say on stderr how much memory a stream needs; ``MemoryError`` with what would help when less is ``free``.

    ``needed(**changes)`` is the estimate with arguments of ``stream_memory`` changed; ``asked`` the present ones that
    could be smaller. ``ignore``: say it and go on.
    """
    estimate = needed()
    text = f"needs about {estimate} of GPU memory; {free / GIB:.2f} GiB are free"
    if estimate.total <= free:
        print(text, file=sys.stderr)
        return
    if ignore:
        print(f"{text}; going on all the same", file=sys.stderr)
        return
    changes: dict[str, dict[str, Any]] = {}
    if asked.get("window") is None or asked["window"] > 2:
        changes["--window 2"] = {"window": 2}
    if not asked.get("fp8_cache"):
        changes["--fp8 cache"] = {"fp8_cache": True}
        if not asked.get("fp8_linears"):
            changes["--fp8 cache,linears"] = {"fp8_cache": True, "fp8_linears": True}
    if asked.get("batch", 1) > 1:
        changes["one prompt at a time"] = {"batch": 1}
    if len(changes) > 1:
        together: dict[str, Any] = {}
        for change in changes.values():
            together |= change
        changes["all of these"] = together
    totals = {name: needed(**change).total for name, change in changes.items()}
    helps = [f"{name} ({total / GIB:.2f} GiB)" for name, total in totals.items() if total <= free]
    advice = f"it would fit with {', or '.join(helps)}" if helps else "a smaller --size or --chunk-frames would help"
    raise MemoryError(f"{text}; {advice}; --ignore-memory tries it all the same")
