"""The command ``raven``. Sub-commands import what they need when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# Exit codes: 0 done, 2 the user's input cannot be used (one line says why), 130 interrupted.
BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args, rest) or 0
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'Interrupted.'}", file=sys.stderr)
        return INTERRUPTED
    except _user_errors() as error:
        if getattr(args, "traceback", False) or os.environ.get("RAVEN_TRACEBACK") == "1" or _is_a_bug(error):
            raise
        print(f"raven {args.command}: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _user_errors() -> tuple[type[Exception], ...]:
    """What one line explains; looked up when something was raised, because it brings torch."""
    from raven.errors import BackendUnavailableError

    return ValueError, TypeError, OSError, MemoryError, FloatingPointError, BackendUnavailableError, ModuleNotFoundError


def _is_a_bug(error: BaseException) -> bool:
    """A missing module is the user's affair only when it is an optional package, whose message names the extra."""
    return isinstance(error, ModuleNotFoundError) and "raven-kernels[" not in str(error)


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="raven", description="Kernels, training and streaming for chunk-causal video diffusion."
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    _add_traceback(parser)
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_demo(commands)
    _add_passed_on(commands, "distill", "train a few-step causal student with RAVEN", "raven.train.distill")
    _add_passed_on(commands, "grpo", "improve a student with CM-GRPO", "raven.train.policy")
    _add_generate(commands)
    _add_passed_on(commands, "bench", "measure the kernels and print the table", "raven.bench")
    _add_passed_on(commands, "env", "versions, GPUs, and which backend is available or why not", "raven.env")
    return parser


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    # Suppressed defaults: a sub-command that was not given the option must not undo the one before it.
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show where an error arose instead of one line (also: RAVEN_TRACEBACK=1)",
    )


class _Version(argparse.Action):
    """Reads the version only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        import raven

        print(f"raven {raven.__version__}")
        parser.exit()


def _add_passed_on(commands: argparse._SubParsersAction, name: str, help: str, module: str) -> None:
    """A command whose own module reads its arguments: ``module.main(argv) -> int``."""

    def run(args: argparse.Namespace, rest: list[str]) -> int:
        from importlib import import_module

        return import_module(module).main(rest)

    command = commands.add_parser(name, help=help, add_help=False)
    command.set_defaults(run=run, passes_on=True)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="distil, improve and stream a small video model, and write a report",
        description="From a bidirectional teacher and a causal start to a few-step student (RAVEN), improved with "
        "CM-GRPO, on the built-in world. Writes report.html and metrics.json. Interrupt it at any time: the same "
        "command goes on where it stopped.",
    )
    _add_traceback(demo)
    demo.add_argument("--size", default="tiny", help="tiny (2 CPU cores, 5 minutes; default) or small (one GPU)")
    demo.add_argument("--out", help="output folder (default: runs/demo-SIZE)")
    demo.add_argument("--seed", type=int, default=0, help="all randomness comes from here (default: 0)")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    demo.add_argument("--from-scratch", action="store_true", help="train the teacher and the causal start too")
    demo.add_argument("--stages", help="comma-separated stages to run (default: all that are not done)")
    demo.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="STAGE.SETTING=VALUE",
        help="change one setting of a stage, such as raven.steps=200 (repeatable)",
    )
    demo.add_argument("--restart", action="store_true", help="forget what an earlier run left in the output folder")
    demo.add_argument("--export-assets", metavar="DIR", help="write teacher and start in fp16 into DIR (to ship them)")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace, rest: list[str]) -> int:
    from raven.demo import stages

    demo = stages.Demo.open(
        size=args.size,
        out=args.out,
        seed=args.seed,
        device=args.device,
        from_scratch=args.from_scratch,
        restart=args.restart,
        changes=args.changes,
    )
    demo.run(None if args.stages is None else args.stages.split(","))
    if args.export_assets:
        demo.export_assets(args.export_assets)
    return 0


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        help="stream a video from a checkpoint, chunk by chunk",
        description="Stream videos from a causal few-step checkpoint. The file grows while the video is made.",
    )
    _add_traceback(generate)
    add = generate.add_argument
    add("--checkpoint", required=True, help="weights (.safetensors, .pt, or a folder)")
    add("--prompt", action="append", help="what to show; repeat it for several videos")
    add("--prompts", metavar="FILE", help="prompts from a text file, one a line, instead of --prompt")
    add(
        "--switch",
        action="append",
        metavar="'FRAME: PROMPT'",
        help="another prompt from this latent frame on, the first of a chunk (repeatable)",
    )
    add("--context", help="text embeddings (.safetensors) instead of prompts")
    add("--wan", metavar="FOLDER", help="Wan's VAE and text encoder in diffusers' layout (pip extra: wan)")
    add("-o", "--out", default="out.mp4", help=".mp4, or .safetensors for latents")
    add("--config", help="model config (.json), for checkpoints that do not carry one")
    add("--preset", help="a published model's chunks, sink and window, such as longlive (see raven.presets)")
    add("--frames", type=int, help="latent frames (default: as trained, else 21)")
    add("--chunk-frames", type=int, help="latent frames of one chunk (default: as trained, else 3)")
    add("--size", help="HEIGHTxWIDTH of the video in pixels, such as 480x832")
    add("--latent-size", help="HEIGHTxWIDTH of the latent (default: as trained, else 60x104)")
    add("--sink", type=int, help="first chunks that stay visible (default: as trained, else 0)")
    add("--window", type=int, help="past chunks that stay visible (default: as trained, else all)")
    add("--steps", type=int, help="sampling steps of one chunk (default: as trained, else 4)")
    add("--fp8", metavar="PARTS", help="keep cache, linears or cache,linears in float8 (default: neither)")
    add("--eager", action="store_true", help="run without CUDA graphs")
    add("--seed", type=int, default=0, help="video i is drawn from seed + i (default: 0)")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32)")
    add("--fps", type=float, help="frames per second of the mp4 (default: as trained, 16 with --wan)")
    add("--ignore-memory", action="store_true", help="start even when the GPU's memory looks too small")
    generate.set_defaults(run=_generate)


def _generate(args: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import fields

    from raven import generate

    options = {field.name: getattr(args, field.name) for field in fields(generate.Request)}
    generate.generate(generate.Request(**options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
