"""Run the demo stage by stage in one folder: what is done is skipped, what was interrupted goes on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import raven
from raven.checkpoint import load_model, save_checkpoint
from raven.demo import results, sizes, training
from raven.demo.media import need
from raven.demo.report import write_json
from raven.generate import pick_device
from raven.worlds import Shapes

TITLES = {
    "teacher": "Teacher",
    "start": "Causal start",
    "raven": "RAVEN distillation",
    "grpo": "CM-GRPO",
    "evaluate": "Evaluation",
    "report": "Report",
}
NEEDS = {
    "teacher": (),
    "start": (),
    "raven": ("teacher", "start"),
    "grpo": ("raven",),
    "evaluate": ("teacher", "start", "raven", "grpo"),
    "report": ("evaluate",),
}
MODELS = ("teacher", "start", "raven", "grpo")
SPACE = 300 * 2**20  # bytes that a run may write, with room to spare
ASSETS = Path(__file__).with_name("assets")


@dataclass
class Demo:
    """One run of the demo in ``folder``; make it with ``Demo.open``."""

    folder: Path
    size: sizes.Size
    seed: int
    device: torch.device
    from_scratch: bool
    world: Shapes
    state: dict[str, Any]
    changes: tuple[str, ...] = ()
    progress: bool = True

    @classmethod
    def open(
        cls,
        size: str = "tiny",
        out: str | os.PathLike[str] | None = None,
        seed: int = 0,
        device: str | None = None,
        from_scratch: bool = False,
        restart: bool = False,
        changes: Sequence[str] = (),
        progress: bool = True,
    ) -> Demo:
        """Prepare a new folder, or go on with one of the same size and seed.

        Raises ``ValueError`` for an unknown size or device, or when the folder belongs to another run; ``OSError``
        when it cannot be written or its disk is nearly full.
        """
        chosen = sizes.find(size, seed, changes)
        folder = Path(out) if out is not None else Path("runs") / f"demo-{size}"
        where = pick_device(device)
        from_scratch = from_scratch or not chosen.shipped
        if not from_scratch and not (ASSETS / "teacher.safetensors").is_file():
            raise FileNotFoundError(f"teacher and start of size {size} are not in this package; use --from-scratch")
        for package in ("PIL", "imageio_ffmpeg", "matplotlib", "tqdm", "safetensors"):
            need(package, "the demo")
        _check_folder(folder)
        settings = json.loads(
            json.dumps({"version": raven.__version__, "seed": seed, "from_scratch": from_scratch, **chosen.settings()})
        )
        state = {"settings": settings, "stages": {}, "spent": {}}
        path = folder / "state.json"
        if path.exists() and not restart:
            state = _read_state(path)
            differing = [key for key, value in settings.items() if state["settings"].get(key) != value]
            if differing:
                raise ValueError(
                    f"out: {folder} holds a run with another {', '.join(differing)}; "
                    "use another --out, or --restart to begin anew"
                )
        else:
            _clear(folder)
            write_json(path, state)
        return cls(folder, chosen, seed, where, from_scratch, Shapes(**chosen.world), state, tuple(changes), progress)

    def run(self, stages: Sequence[str] | None = None) -> None:
        """Run ``stages`` (default: all), skipping those that are done. The report is always written anew.

        Raises ``ValueError`` for an unknown stage or one whose inputs are missing. An interruption is passed on as
        ``KeyboardInterrupt`` with a message that says how to go on.
        """
        wanted = self._checked(stages)
        for number, name in enumerate(TITLES, start=1):
            if name not in wanted:
                continue
            label = f"[{number}/{len(TITLES)}] {TITLES[name]}"
            if name in self.state["stages"] and name != "report":
                self.say(f"{label}: done before, skipped")
                continue
            missing = [need for need in self._needs(name) if need not in self.state["stages"]]
            if missing:
                raise ValueError(f"stages: {name!r} needs {' and '.join(missing)}, not done in {self.folder}")
            self.say(label)
            self._run_one(name, number)
        if "report" in wanted:
            self._say_results()

    def _needs(self, name: str) -> tuple[str, ...]:
        return ("teacher",) if name == "start" and self.size.start_from_teacher else NEEDS[name]

    def _checked(self, stages: Sequence[str] | None) -> list[str]:
        wanted = list(TITLES) if stages is None else list(stages)
        for name in wanted:
            if name not in TITLES:
                raise ValueError(f"stages: got {name!r}, expected some of {', '.join(TITLES)}")
        return wanted

    def _run_one(self, name: str, number: int) -> None:
        begin = time.perf_counter()
        before = self.state["spent"].pop(name, 0.0)
        try:
            what = self._action(name)()
        except KeyboardInterrupt as stop:
            self.state["spent"][name] = before + time.perf_counter() - begin
            write_json(self.folder / "state.json", self.state)
            raise KeyboardInterrupt(
                f"Interrupted in stage {number} of {len(TITLES)} ({TITLES[name]}). What is done is in {self.folder}; "
                "run the same command again to go on from here."
            ) from stop
        seconds = before + time.perf_counter() - begin
        self.state["stages"][name] = {"seconds": round(seconds, 2), "what": what}
        write_json(self.folder / "state.json", self.state)

    def _action(self, name: str) -> Callable[[], str]:
        if name == "evaluate":
            return lambda: results.evaluate_all(self)
        if name == "report":
            return lambda: results.write_report(self)
        if name in ("teacher", "start") and not self.from_scratch:
            return lambda: self._take_asset(name)
        return lambda: training.STAGES[name](self)

    def model_path(self, name: str) -> Path:
        """Where the finished model of a stage is."""
        return self.folder / f"{name}.safetensors"

    def load(self, name: str) -> torch.nn.Module:
        """The finished model of a stage in float32, frozen."""
        model = load_model(self.model_path(name), device=self.device, dtype=torch.float32)
        return model.eval().requires_grad_(False)

    def save(self, name: str, model: torch.nn.Module) -> None:
        """Keep the finished model of a stage, with what ``raven generate`` needs to know."""
        save_checkpoint(self.model_path(name), model, metadata={"raven": json.dumps(self.description())})

    def description(self) -> dict[str, Any]:
        """How the models of this run are sampled."""
        config = self.size.raven
        return {
            "world": self.size.world,
            "latent_shape": list(config.latent_shape),
            "chunk_frames": sizes.CHUNK,
            "frames": self.size.frames,
            "sink": 0,
            "window": self.size.window,
        }

    def _take_asset(self, name: str) -> str:
        path = ASSETS / f"{name}.safetensors"
        model = load_model(path, dtype=torch.float32)
        if model.config != (expected := self.size.wan_config(self.world.text_dim, self.world.text_len)):
            raise ValueError(f"{path.name}: got a model of {model.config}, expected {expected}; use --from-scratch")
        self.save(name, model)
        return "shipped with the package"

    def export_assets(self, folder: str | os.PathLike[str]) -> None:
        """Write teacher and start in fp16, and how they were made, into ``folder``."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        made = {}
        for name in ("teacher", "start"):
            if name not in self.state["stages"]:
                raise ValueError(f"stages: {name!r} is not done in {self.folder}, nothing to export")
            path = target / f"{name}.safetensors"
            save_checkpoint(path, self.load(name), torch.float16, metadata={"raven": json.dumps(self.description())})
            made[name] = {"bytes": path.stat().st_size, "parameters": "float16", **self.state["stages"][name]}
        write_json(
            target / "assets.json",
            {
                "command": self._export_command(),
                "size": self.size.name,
                "seed": self.seed,
                **environment(self.device),
                "models": made,
                "settings": {name: self.state["settings"][name] for name in ("world", "model", "teacher", "start")},
            },
        )

    def _export_command(self) -> str:
        """The command that makes the shipped models, whatever folders it was run with."""
        changes = "".join(f" --set {change}" for change in self.changes)
        return (
            f"raven demo --size {self.size.name} --seed {self.seed} --from-scratch{changes} "
            "--stages teacher,start --export-assets raven/demo/assets"
        )

    def say(self, text: str) -> None:
        """Tell the user, unless the run is silent."""
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    def _say_results(self) -> None:
        model = self.model_path("grpo")
        prompt = self.world.prompts(1, seed=0)[0]
        self.say(
            f"\nReport: {self.folder / 'report.html'}\nStream more: "
            f'raven generate --checkpoint {model} --frames {self.size.long_frames} --prompt "{prompt}" -o out.mp4'
        )


def environment(device: torch.device) -> dict[str, str]:
    """Versions and device, for the report and the assets."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return {
        "device": name,
        "raven": raven.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_folder(folder: Path) -> None:
    """Raise ``OSError`` before any work when the folder cannot be written or there is no room."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(folder).free
    if free < SPACE:
        raise OSError(f"out: {folder} has {free / 2**20:.0f} MiB free, expected at least {SPACE / 2**20:.0f} MiB")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"out: {path} cannot be read ({error}); use --restart to begin anew") from error
    if not isinstance(state, dict) or not {"settings", "stages", "spent"} <= state.keys():
        raise ValueError(f"out: {path} is not the state of a demo; use another --out, or --restart to begin anew")
    return state


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the demo left, and nothing else."""
    for name in (*MODELS, "eval", "videos"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("state.json", "report.html", "metrics.json", *(f"{m}.safetensors" for m in MODELS)):
        (folder / name).unlink(missing_ok=True)
