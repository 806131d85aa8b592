"""The loop around a trainer: resume, progress bar, metrics on disk, checkpoints, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from raven.train import checkpointing, distributed

CHECKPOINT = "checkpoint.pt"


class Trainer(Protocol):
    """What ``run`` needs; everything that decides the next step is in ``state_dict``."""

    steps_done: int

    def step(self) -> Mapping[str, float | torch.Tensor]:
        """Take one optimizer step; returns metrics as numbers or 0-d tensors, read back only when they are logged."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C (or SIGTERM) after the step under way; the same call resumes it."""


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """While inside, the first SIGINT or SIGTERM sets the event; a second one acts as usual.

    Stopping between steps, not within one, is what makes the resumed run equal to the uninterrupted one.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: object) -> None:
        requested.set()
        signal.signal(number, previous[number] or signal.SIG_DFL)

    for number in previous:
        signal.signal(number, request)
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _PlainProgress:
    """A line now and then, for when tqdm is not installed."""

    def __init__(self, total: int, initial: int, desc: str) -> None:
        self.total, self.done, self.desc = total, initial, desc
        self.every = max(1, total // 20)
        self.metrics = ""

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        self.metrics = text

    def update(self, count: int) -> None:
        self.done += count
        if self.done % self.every == 0 or self.done == self.total:
            print(f"{self.desc}: {self.done}/{self.total} {self.metrics}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is held open."""


def _progress_bar(total: int, initial: int, desc: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _PlainProgress(total, initial, desc)
    return tqdm(total=total, initial=initial, desc=desc, dynamic_ncols=True, file=sys.stderr)


def _numbers(metrics: Mapping[str, float | torch.Tensor], step: int, device: torch.device) -> dict[str, float]:
    """Means over all ranks: they say what one process with every rank's batch would, and all ranks stop at the same."""
    numbers = distributed.average(metrics, device)
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {step}; lower the learning rate or clip gradients")
    return numbers


def read_metrics(path: str | os.PathLike[str], until: int | None = None) -> list[dict[str, float]]:
    """The records of a metrics file, at most up to step ``until``; a last line cut off by a crash is left out.

    Raises ``ValueError`` that names the file and the line for anything else that is not a record.
    """
    records = []
    path = Path(path)
    if path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            record = _record(line)
            if record is None:
                raise ValueError(
                    f"path: {path}, line {number}: got {line[:60]!r}, expected metrics as JSON with a step"
                )
            if until is None or record["step"] <= until:
                records.append(record)
    return records


def _record(line: str) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _rewind_log(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``: the resumed run takes them again."""
    if not path.exists():
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in read_metrics(path, step)), encoding="utf-8")
    os.replace(partial, path)


def run(
    trainer: Trainer,
    steps: int,
    directory: str | os.PathLike[str],
    save_every: int = 100,
    progress: bool = True,
    log: str = "metrics.jsonl",
    log_every: int = 1,
    desc: str = "train",
) -> list[dict[str, float]]:
    """Train until ``trainer.steps_done == steps``, resuming from ``directory`` if a run was stopped there.

    A resumed run takes the same steps as one that was never stopped. ``directory`` gets ``checkpoint.pt`` (every
    ``save_every`` steps, at the end, and on Ctrl-C or SIGTERM) and ``log``, one JSON record of metrics per
    ``log_every`` steps, averaged over the ranks. Returns the records of the whole run.

    Under ``torchrun`` rank 0 writes; the others wait for it. Raises ``Interrupted`` after a clean stop, ``OSError``
    when something cannot be written (an earlier checkpoint stays intact), ``ValueError`` when the checkpoint found is
    damaged or belongs to a run with other settings, ``FloatingPointError`` when a logged metric is not finite.
    """
    if min(steps, save_every, log_every) < 1:
        raise ValueError(
            f"steps, save_every, log_every: got {(steps, save_every, log_every)}, expected at least 1 each"
        )
    directory = Path(directory)
    checkpoint, log_path = directory / CHECKPOINT, directory / log
    main = distributed.is_main()
    device = getattr(trainer, "device", torch.device("cpu"))
    if main:
        directory.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    if checkpoint.exists():
        trainer.load_state_dict(checkpointing.load(checkpoint))
    same = distributed.average({"step": trainer.steps_done}, device)["step"]
    if distributed.any_rank(same != trainer.steps_done, device):
        raise ValueError(
            f"directory: got a run at step {trainer.steps_done} in {directory}, expected the same on every rank "
            "(they must see the same files)"
        )
    if main:
        _rewind_log(log_path, trainer.steps_done)
    saved_at = trainer.steps_done if checkpoint.exists() else -1

    def save() -> None:
        nonlocal saved_at
        if saved_at != trainer.steps_done and main:
            checkpointing.save_atomic(trainer.state_dict(), checkpoint)
        saved_at = trainer.steps_done
        distributed.barrier()

    bar = _progress_bar(steps, trainer.steps_done, desc) if progress and main else None
    log_file = open(log_path, "a", encoding="utf-8") if main else None  # noqa: SIM115 (closed below)
    try:
        with _stop_requests() as stop:
            while trainer.steps_done < steps:
                metrics = trainer.step()
                done = trainer.steps_done
                if done % log_every == 0 or done == steps:
                    numbers = _numbers(metrics, done, device)
                    if log_file:
                        log_file.write(json.dumps({"step": done, **numbers}) + "\n")
                        log_file.flush()
                    if bar:
                        bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in numbers.items()), refresh=False)
                if bar:
                    bar.update(1)
                if done % save_every == 0 or done == steps:
                    save()
                if distributed.any_rank(stop.is_set(), device) and done < steps:
                    save()
                    raise Interrupted(f"stopped at step {done} of {steps}; run the same command again to continue")
    finally:
        if bar:
            bar.close()
        if log_file:
            log_file.close()
    return read_metrics(log_path) if main else []
