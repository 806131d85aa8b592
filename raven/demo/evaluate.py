"""Sample every model on the same prompts and seeds, score the videos, and keep the ones that the report shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raven.demo.media import need
from raven.demo.numbers import LABELS, METRICS, Record
from raven.demo.report import write_json
from raven.sampling import sample_bidirectional
from raven.stream import Stream
from raven.worlds import Shapes
from raven.worlds.pictures import to_uint8

# (prompts, their indices, seed, frames) -> videos [B, 3, F, H, W]
Sampler = Callable[[Sequence[str], Sequence[int], int, int], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How much is sampled: ``frames`` to sample, ``lengths`` to score (prefixes of it), and on how many prompts."""

    frames: int
    lengths: tuple[int, ...]
    prompts: int
    seeds: tuple[int, ...]
    shown: int


def noise_generators(indices: Sequence[int], seed: int) -> list[torch.Generator]:
    """One generator per video, seeded by its prompt's index and the seed: every model starts from the same noise."""
    return [torch.Generator().manual_seed(1_000_003 * seed + 7919 * i + 17) for i in indices]


def stream_sampler(
    model: torch.nn.Module,
    encode: Callable[[Sequence[str]], torch.Tensor],
    latent_shape: tuple[int, int, int],
    chunk_frames: int,
    levels: torch.Tensor,
    sink: int,
    window: int | None,
) -> Sampler:
    """Chunk-by-chunk sampling of a causal few-step model."""

    def sample(prompts: Sequence[str], indices: Sequence[int], seed: int, frames: int) -> torch.Tensor:
        stream = Stream(model, encode(prompts), latent_shape, chunk_frames, sink=sink, window=window)
        chunks = stream.generate(frames, levels, generator=noise_generators(indices, seed))
        return torch.cat([chunk.float() for chunk in chunks], dim=2)

    return sample


def bidirectional_sampler(
    model: torch.nn.Module,
    encode: Callable[[Sequence[str]], torch.Tensor],
    negative: Callable[[int], torch.Tensor],
    latent_shape: tuple[int, int, int],
    steps: int,
    guidance: float,
    shift: float,
) -> Sampler:
    """Many-step sampling of the whole video at once, with classifier-free guidance."""

    def sample(prompts: Sequence[str], indices: Sequence[int], seed: int, frames: int) -> torch.Tensor:
        channels, height, width = latent_shape
        return sample_bidirectional(
            model,
            encode(prompts),
            negative(len(prompts)),
            (channels, frames, height, width),
            steps=steps,
            guidance=guidance,
            shift=shift,
            generator=noise_generators(indices, seed),
        ).float()

    return sample


def score_records(
    world: Shapes,
    video: torch.Tensor,
    model: str,
    prompts: Sequence[str],
    indices: Sequence[int],
    seed: int,
    chunk: int,
) -> Iterator[Record]:
    """One record for each video ``[B, 3, F, H, W]``, as ``raven.demo.numbers`` takes them."""
    scores = world.score(video, list(prompts), chunk)
    for b, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
        yield {
            "model": model,
            "length": video.shape[2],
            "prompt": prompt,
            "prompt_index": index,
            "seed": seed,
            **{metric: round(float(getattr(scores, metric)[b]), 5) for metric in METRICS},
            "chunks": {metric: [round(float(v), 5) for v in scores.per_chunk[metric][b]] for metric in METRICS},
        }


def evaluate(
    name: str,
    sampler: Sampler,
    world: Shapes,
    prompts: Sequence[str],
    plan: Plan,
    chunk_frames: int,
    folder: Path,
    progress: bool = True,
) -> list[Record]:
    """Sample and score one model, one batch of prompts per seed; returns the records and keeps them in ``folder``.

    Causal streaming makes the first frames before it knows the last, so the videos of the trained length are the
    beginnings of the long ones: ``plan.lengths`` are scored from one sampling run. What is in ``folder`` already is
    not sampled again.
    """
    path = folder / f"{name}-{plan.frames}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    records: list[Record] = []
    shown: dict[str, np.ndarray] = {}
    indices = list(range(plan.prompts))
    chosen = list(prompts[: plan.prompts])
    tqdm = need("tqdm", "the demo").tqdm
    desc = f"{LABELS[name]}, {plan.frames} frames"
    for seed in tqdm(plan.seeds, desc=desc, unit="seed", disable=not progress):
        video = sampler(chosen, indices, seed, plan.frames).cpu()
        for length in plan.lengths:
            part = video[:, :, :length]
            records += score_records(world, part, name, chosen, indices, seed, chunk_frames)
            if seed == plan.seeds[0]:
                shown |= {f"{length}/{i}": to_uint8(part[i]).numpy() for i in indices[: plan.shown]}
    np.savez_compressed(folder / f"{name}-{plan.frames}.npz", **shown)
    write_json(path, records)
    return records


def kept_videos(folder: Path) -> dict[tuple[str, int, int], np.ndarray]:
    """The videos that ``evaluate`` kept: ``(model, length, prompt index)`` -> frames ``[F, H, W, 3]`` uint8."""
    videos = {}
    for path in sorted(folder.glob("*.npz")):
        model = path.stem.rsplit("-", 1)[0]
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                length, index = key.split("/")
                videos[model, int(length), int(index)] = file[key]
    return videos
