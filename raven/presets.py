"""Published streaming settings by name: ``Stream(model, context, latent_shape, **PRESETS["longlive"])``.

Each is what the model's own code does with its cache, in chunks (their 3 latent frames are one):

=================== =========================================================================================
raven               every chunk sees all earlier ones; ``sink`` and ``window`` can be added (arXiv 2605.15190)
causvid             all of one clip of 21 frames (arXiv 2412.07772)
self_forcing        the last 21 frames, its own included (arXiv 2506.08009)
self_forcing_frames the same for the model of single-frame chunks
longlive            3 frames of sink and the last 9; at a new prompt the last 12 are encoded anew (arXiv 2509.22622)
longlive_inf        the same with raw keys at window-relative positions, for videos without an end
reward_forcing      raw keys; 3 frames of sink, into which what leaves the last 6 is blended (arXiv 2512.04678)
=================== =========================================================================================

Not expressed exactly, and therefore not here: CausVid's and Krea's restarts, which encode frames anew through the VAE
or at every chunk; LongLive 2's pinned shots; Rolling Forcing, which denoises five chunks at unequal levels at once;
Rolling Sink, which rewrites the past in reverse; MAGI-1, whose window depends on the noise level; windows that are no
whole number of chunks (5 + 7 frames in chunks of 3); LongLive without a global sink, where the oldest frames that are
encoded anew become the sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType(options)
        for name, options in {
            "raven": {"chunk_frames": 3},
            "causvid": {"chunk_frames": 3, "max_frames": 21},
            "self_forcing": {"chunk_frames": 3, "window": 6},
            "self_forcing_frames": {"chunk_frames": 1, "window": 20},
            "longlive": {"chunk_frames": 3, "sink": 1, "window": 2, "recache": 4},
            "longlive_inf": {"chunk_frames": 3, "sink": 1, "window": 2, "keys": "raw", "recache": 4},
            "reward_forcing": {"chunk_frames": 3, "sink": 1, "window": 1, "keys": "raw", "ema": 0.999},
        }.items()
    }
)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of ``Stream`` for a preset, with ``changes`` on top; ``ValueError`` for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return {**PRESETS[name], **changes}
