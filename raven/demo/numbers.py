"""From scores of single videos to the table, the drift curves and one plain sentence per comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

METRICS = ("quality", "semantic", "dynamic")
LABELS = {"teacher": "Teacher", "start": "Causal start", "raven": "RAVEN", "grpo": "RAVEN + CM-GRPO"}
COMPARISONS = (("start", "raven"), ("raven", "grpo"), ("teacher", "grpo"))

# A score of one video: model, length (frames), prompt, prompt_index, seed, quality, semantic, dynamic, and
# "chunks": the three metrics per chunk. Plain dicts, because they go to metrics.json as they are.
Record = dict


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def select(records: Iterable[Record], model: str, length: int) -> list[Record]:
    """The records of one model at one length."""
    return [r for r in records if r["model"] == model and r["length"] == length]


def summarise(records: Sequence[Record]) -> list[dict]:
    """One row per model and length: for each metric the mean, and the spread of the means of the seeds.

    The same prompts are sampled with every seed, so the spread says how far the mean would move if the whole
    evaluation were run with another seed. ``chunks`` has mean and spread over all videos for each chunk.
    """
    rows = []
    for length in sorted({r["length"] for r in records}):
        for model in LABELS:
            chosen = select(records, model, length)
            if not chosen:
                continue
            seeds = sorted({r["seed"] for r in chosen})
            row: dict = {"model": model, "length": length, "videos": len(chosen), "seeds": seeds, "chunks": {}}
            for metric in METRICS:
                per_seed = [fmean(r[metric] for r in chosen if r["seed"] == seed) for seed in seeds]
                mean, spread = mean_and_spread(per_seed)
                row[metric] = {"mean": mean, "spread": spread, "per_seed": per_seed}
                columns = zip(*(r["chunks"][metric] for r in chosen), strict=True)
                pairs = [mean_and_spread(column) for column in columns]
                row["chunks"][metric] = {"mean": [m for m, _ in pairs], "spread": [s for _, s in pairs]}
            rows.append(row)
    return rows


def compare(records: Sequence[Record], before: str, after: str, length: int) -> dict | None:
    """Compare two models on the prompts and seeds that both were run on; ``None`` when there are none.

    For each metric: the mean difference per video, its standard error (videos as the unit), and a verdict:
    ``better`` or ``worse`` when the difference is more than two standard errors, else ``unclear``.
    """
    first = {(r["prompt_index"], r["seed"]): r for r in select(records, before, length)}
    second = {(r["prompt_index"], r["seed"]): r for r in select(records, after, length)}
    keys = sorted(first.keys() & second.keys())
    if not keys:
        return None
    result: dict = {"before": before, "after": after, "length": length, "videos": len(keys), "metrics": {}}
    for metric in METRICS:
        differences = [second[k][metric] - first[k][metric] for k in keys]
        mean, deviation = mean_and_spread(differences)
        error = deviation / math.sqrt(len(keys))
        verdict = "unclear"
        if len(keys) > 1 and abs(mean) > 2 * error:
            verdict = "better" if mean > 0 else "worse"
        result["metrics"][metric] = {
            "before": fmean(first[k][metric] for k in keys),
            "after": fmean(second[k][metric] for k in keys),
            "difference": mean,
            "standard_error": error,
            "verdict": verdict,
        }
    result["sentence"] = sentence(result)
    return result


def sentence(comparison: dict) -> str:
    """State in plain words whether ``after`` is better than ``before``, with the numbers."""
    parts: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    for metric, numbers in comparison["metrics"].items():
        parts[numbers["verdict"]].append(
            f"{metric} ({numbers['before']:.3f} to {numbers['after']:.3f}, "
            f"{numbers['difference']:+.3f} ± {numbers['standard_error']:.3f})"
        )
    words = {"better": "is better in", "worse": "is worse in", "unclear": "shows no clear difference in"}
    said = [f"{words[verdict]} {_and(items)}" for verdict, items in parts.items() if items]
    after, before = LABELS[comparison["after"]], LABELS[comparison["before"]]
    before = "the " + before[0].lower() + before[1:] if before[1].islower() else before
    start = f"At {comparison['length']} frames, against {before}, {after} {_and(said)}"
    return f"{start}; {comparison['videos']} pairs of videos."


def drift_sentence(row: dict, metric: str = "quality") -> str:
    """How a metric changes from the first to the last chunk of a long video."""
    means = row["chunks"][metric]["mean"]
    change = means[-1] - means[0]
    return (
        f"{LABELS[row['model']]}: {metric} goes from {means[0]:.3f} in the first chunk to {means[-1]:.3f} "
        f"in the last ({change:+.3f})."
    )


def verdict_in_short(comparison: dict) -> str:
    """``helped``, ``hurt``, ``mixed`` or ``no clear change``, from the verdicts of the three metrics."""
    verdicts = {m["verdict"] for m in comparison["metrics"].values()}
    if {"better", "worse"} <= verdicts:
        return "mixed"
    if "better" in verdicts:
        return "helped"
    return "hurt" if "worse" in verdicts else "no clear change"


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
