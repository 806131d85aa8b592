"""The last two stages: sample and score every model, then write the report from what was kept."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from raven.demo import media, numbers, report, training
from raven.demo.evaluate import Plan, bidirectional_sampler, evaluate, kept_videos, stream_sampler
from raven.demo.numbers import LABELS, METRICS
from raven.layout import ChunkLayout
from raven.schedule import sampling_levels

if TYPE_CHECKING:
    from raven.demo.stages import Demo

PROMPT_SEED = 990_000  # prompts of the evaluation; training draws its own from other seeds
FPS = 8
PICTURE_TOKENS = 16  # tokens of one frame in the mask pictures: enough to see the structure


def plans(demo: Demo) -> dict[str, list[Plan]]:
    """What is sampled for each model."""
    amount = demo.size.evaluation
    seeds = tuple(demo.seed * 100 + 1 + i for i in range(amount.seeds))
    short, long = demo.size.frames, demo.size.long_frames
    causal = [Plan(long, (short, long), amount.prompts, seeds, amount.shown)]
    teacher = [
        Plan(short, (short,), amount.prompts, seeds, amount.shown),
        Plan(long, (long,), min(amount.prompts, amount.teacher_long_prompts), seeds, amount.shown),
    ]
    return {"teacher": teacher, "start": causal, "raven": causal, "grpo": causal}


def evaluate_all(demo: Demo) -> str:
    """Evaluate the four models; returns what was done, for the table of stages."""
    folder = demo.folder / "eval"
    folder.mkdir(exist_ok=True)
    amount, chunk = demo.size.evaluation, demo.size.raven.chunk_frames[0]
    prompts = demo.world.prompts(amount.prompts, seed=PROMPT_SEED + demo.seed)

    def encode(texts):
        return demo.world.encode(texts, device=demo.device)

    videos = 0
    for name, steps in plans(demo).items():
        model = demo.load(name)
        for plan in steps:
            if name == "teacher":
                count = amount.teacher_steps if plan.frames == demo.size.frames else amount.teacher_long_steps
                sampler = bidirectional_sampler(
                    model,
                    encode,
                    lambda n: encode([""] * n),
                    demo.size.raven.latent_shape,
                    count,
                    amount.guidance,
                    amount.shift,
                )
            else:
                levels = sampling_levels(demo.size.raven.levels, demo.size.raven.shift)
                sampler = stream_sampler(
                    model, encode, demo.size.raven.latent_shape, chunk, levels, 0, demo.size.window
                )
            evaluate(name, sampler, demo.world, prompts, plan, chunk, folder, demo.progress)
            videos += plan.prompts * len(plan.seeds)
    return f"{videos} videos, {amount.prompts} prompts, {amount.seeds} seeds"


def write_report(demo: Demo) -> str:
    """Write videos, ``metrics.json`` and ``report.html``; returns what was done."""
    metrics = build_metrics(demo)
    videos = kept_videos(demo.folder / "eval")
    fps = FPS
    target = demo.folder / "videos"
    target.mkdir(exist_ok=True)
    previews = {key: media.animated_webp(frames, fps) for key, frames in videos.items()}
    for (model, length, index), frames in videos.items():
        media.write_mp4(target / f"{model}-{length}-{index + 1}.mp4", frames, fps)
    grids = {}
    for length in metrics["lengths"].values():
        models = [m for m in LABELS if (m, length, 0) in videos]
        shown = sorted(i for m, n, i in videos if (m, n) == (models[-1], length))
        rows = [[_video(videos, m, length, i) for m in models] for i in shown]
        sheet = media.grid(rows, [LABELS[m] for m in models])
        path = media.write_mp4(target / f"all-{length}.mp4", sheet, fps)
        grids[length] = path.read_bytes()
    report.write(demo.folder, metrics, report.Pictures(previews, grids, mask_pictures(demo)))
    demo.say(plain_table(metrics["rows"]))
    return f"{len(videos)} videos"


def plain_table(rows: list[dict]) -> str:
    """The table of the report for a terminal."""
    lines = [f"{'frames':>6}  {'model':<16}" + "".join(f"{metric:>17}" for metric in METRICS) + f"{'videos':>8}"]
    for row in rows:
        cells = "".join(f"{row[m]['mean']:>9.3f} ± {row[m]['spread']:.3f}" for m in METRICS)
        lines.append(f"{row['length']:>6}  {LABELS[row['model']]:<16}{cells}{row['videos']:>8}")
    return "\n".join(lines)


def _video(videos: dict, model: str, length: int, index: int):
    """A kept video, or a grey one where the model was not sampled."""
    found = videos.get((model, length, index))
    if found is not None:
        return found
    return next(frames for (_, n, _), frames in videos.items() if n == length) * 0 + 48


def build_metrics(demo: Demo) -> dict:
    """Everything that ``metrics.json`` holds and the report shows."""
    from raven.demo.stages import MODELS, TITLES, environment

    records = []
    for name, steps in plans(demo).items():
        for plan in steps:
            records += json.loads((demo.folder / "eval" / f"{name}-{plan.frames}.json").read_text(encoding="utf-8"))
    amount, size = demo.size.evaluation, demo.size
    rows = numbers.summarise(records)
    few = f"{size.raven.levels} steps"
    for row in rows:
        many = amount.teacher_steps if row["length"] == size.frames else amount.teacher_long_steps
        row["sampling"] = f"{many} steps, guided" if row["model"] == "teacher" else few
    comparisons = [
        found
        for length in (size.frames, size.long_frames)
        for before, after in numbers.COMPARISONS
        if (found := numbers.compare(records, before, after, length))
    ]
    done = demo.state["stages"]
    total = sum(stage["seconds"] for name, stage in done.items() if name != "report")
    where = environment(demo.device)
    config = size.wan_config(demo.world.text_dim, demo.world.text_len)
    return {
        "run": {
            "title": f"raven demo: {size.name}",
            "lead": f"From a bidirectional teacher and a causal start to a student of {few}, distilled with RAVEN, "
            f"improved with CM-GRPO, and streamed {sizes_words(size.long_frames // size.frames)} longer than it was "
            "trained on.",
            "size": size.name,
            "seed": demo.seed,
            "from_scratch": demo.from_scratch,
            "trained_chunks": size.chunks,
            "seconds": round(total, 1),
            "environment": where,
            "facts": [
                ["Size", size.name],
                ["Seed", demo.seed],
                ["Video", f"{size.world['size']} x {size.world['size']} pixels, {size.frames} frames trained"],
                ["Model", f"{config.num_layers} layers, width {config.dim}"],
                ["Teacher and start", "trained in this run" if demo.from_scratch else "shipped with the package"],
                ["Device", where["device"]],
                ["Versions", f"raven {where['raven']}, PyTorch {where['torch']}, Python {where['python']}"],
                ["Time in all", duration(total)],
            ],
        },
        "lengths": {"trained": size.frames, "tripled": size.long_frames},
        "metrics": list(METRICS),
        "prompts": [r["prompt"] for r in numbers.select(records, "raven", size.frames)[: amount.shown]],
        "rows": rows,
        "comparisons": comparisons,
        "training": training.curves(demo),
        "stages": [{"title": TITLES[n], **done[n]} for n in TITLES if n in done and n != "report"],
        "settings": demo.state["settings"],
        "models": {name: demo.model_path(name).name for name in MODELS},
        "table_notes": table_notes(demo),
        "notes": [f"Settings of all stages: see metrics.json. The world: {size.world}."],
        "records": records,
    }


def table_notes(demo: Demo) -> list[str]:
    """What a reader of the table has to know."""
    amount, size = demo.size.evaluation, demo.size
    few, many = size.frames, size.long_frames
    return [
        f"The causal models stream {many} frames chunk by chunk, seeing the last {size.window} chunks; their videos of "
        f"{few} frames are the beginnings of these, since a later chunk never changes an earlier one.",
        f"The teacher samples the whole video at once with guidance {amount.guidance:g}, {amount.teacher_steps} steps "
        f"at {few} frames; at {many} frames, a length it never saw in training, {amount.teacher_long_steps} steps and "
        f"{min(amount.prompts, amount.teacher_long_prompts) * amount.seeds} videos.",
    ]


def mask_pictures(demo: Demo) -> list[tuple[str, str, bytes]]:
    """The masks of one training sequence of this size, drawn with fewer tokens per frame."""
    chunks = demo.size.raven.chunk_frames
    layouts = (
        ("Repacked", "Noisy chunks and their clean end points in turns: RAVEN.", ChunkLayout.repacked),
        ("Teacher forcing", "All clean chunks first, then all noisy ones; the same rule.", ChunkLayout.teacher_forcing),
        ("Blockwise", "One noisy stream, where noisy chunks are the history: CausVid.", ChunkLayout.blockwise),
    )
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for title, caption, make in layouts:
            path = Path(folder) / f"{title}.png"
            make(chunks, PICTURE_TOKENS).plot(path)
            pictures.append((title, caption, path.read_bytes()))
    return pictures


def duration(seconds: float) -> str:
    """``4 min 21 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def sizes_words(factor: int) -> str:
    """``three times``."""
    return {2: "two times", 3: "three times", 4: "four times"}.get(factor, f"{factor} times")
