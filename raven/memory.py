"""How much GPU memory a stream takes at its peak, from sizes alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from raven.models.config import WanConfig

# cuBLAS and cuBLASLt keep a workspace of this size each for a stream; a captured graph runs on a stream of its own.
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


def cache_slots(frames: int | None, chunk_frames: int, sink: int, window: int | None) -> int:
    """Chunks for which a stream's cache has room."""
    chunks = None if frames is None else -(-frames // chunk_frames)
    if window is None:
        if chunks is None:
            raise ValueError("frames: got None, expected the length of the video (window is None as well)")
        return chunks
    return sink + window + 1


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
    raw_keys: bool = False,
    merged: bool = True,
    graphs: bool = True,
) -> Estimate:
    """Peak memory on the GPU of a ``Stream`` with these arguments, without what decodes its latents.

    ``latent_size`` is (H, W); ``frames``, ``chunk_frames`` count latent frames, ``sink``, ``window`` chunks. With
    ``guidance`` everything runs on twice the batch. ``merged``: the clean pass runs together with the next chunk's
    first step. ``raw_keys``: keys are rotated when they are read.
    """
    size = dtype.itemsize
    d, f, layers = config.dim, config.ffn_dim, config.num_layers
    rows = batch * (2 if guidance else 1)
    _, ph, pw = config.patch_size
    per_frame = (latent_size[0] // ph) * (latent_size[1] // pw)
    chunk_tokens = chunk_frames * per_frame
    stored = cache_slots(frames, chunk_frames, sink, window) * chunk_tokens * rows  # tokens of one layer

    weights = parameters(config) * size
    if fp8_linears:
        weights -= linear_weights(config) * (size - 1)
    text = 2 * layers * rows * config.text_len * d * size
    element = 1 if fp8_cache else size
    cache = 2 * layers * stored * d * element
    if fp8_cache:
        cache += 2 * layers * stored * config.num_heads * 4
    # One layer's keys (and values, when they are stored in another form) as attention reads them.
    read = stored * d * size * (2 if fp8_cache else 1 if raw_keys else 0)

    tokens = rows * chunk_tokens * (2 if merged else 1)
    # The widest moment of a block: the residual stream, the normed input, and the MLP before and after its GELU.
    activations = tokens * size * (2 * d + 2 * f)
    graph = CUBLAS_WORKSPACE * (2 if graphs else 0)
    return Estimate(
        {
            "weights": weights,
            "text": text,
            "cache": cache,
            "cache as it is read": read,
            "one forward": activations,
            "workspaces": 2 * CUBLAS_WORKSPACE + graph,
        }
    )
