"""Which implementation of an op runs: ``cuda`` (Hopper), ``triton`` (sm_80 and newer), ``reference`` (everything).

Every op registers, per backend, a function that looks at the arguments and returns ``None`` (it can run) or the
reason why it cannot. ``select`` takes the first that can; ``explain`` shows all of them. A backend that was asked
for by name is never replaced by another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module

import torch

from raven.errors import BackendUnavailableError

BACKENDS = ("cuda", "triton", "reference")
WhyNot = Callable[..., "str | None"]

_registry: dict[str, dict[str, WhyNot]] = {}
_remarks: dict[tuple[str, str], WhyNot] = {}
_forced: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What would run for given arguments, and why each other backend would not (``None``: it could).

    ``remarks``: what a backend that could run says about how it would.
    """

    op: str
    chosen: str | None
    reasons: dict[str, str | None]
    remarks: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can run this'}"]
        for name, reason in self.reasons.items():
            remark = f" ({self.remarks[name]})" if name in self.remarks else ""
            lines.append(f"  {name:<9} {'available' + remark if reason is None else 'not used: ' + reason}")
        return "\n".join(lines)


def register(op: str, **why_not: WhyNot) -> None:
    """Register the backends of ``op``: ``register("my_op", triton=triton_reason, reference=always)``."""
    unknown = set(why_not) - set(BACKENDS)
    if unknown:
        raise ValueError(f"backend: got {sorted(unknown)}, expected some of {BACKENDS}")
    _registry[op] = dict(why_not)


def remark(op: str, backend: str, about: WhyNot) -> None:
    """What ``explain`` adds where ``backend`` can run: ``about(*args)`` gives a phrase, or ``None`` for nothing."""
    _remarks[op, backend] = about


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def set_backend(name: str | None) -> None:
    """Use one backend for every op from now on; ``None`` returns to the automatic choice.

    Raises ``ValueError`` for an unknown name. An op that cannot run on it raises ``BackendUnavailableError``.
    """
    global _forced
    _forced = _checked(name, "name")


def get_backend() -> str | None:
    """The backend asked for by ``set_backend`` or ``RAVEN_BACKEND``, or ``None`` when the choice is automatic."""
    return _forced or _checked(os.environ.get("RAVEN_BACKEND") or None, "RAVEN_BACKEND")


def operators() -> tuple[str, ...]:
    """Names of all ops, which register themselves when ``raven.ops`` is imported."""
    import_module("raven.ops")
    return tuple(sorted(_registry))


def explain(op: str, *args: object) -> Explanation:
    """Say which backend would run ``op(*args)`` and why the others would not."""
    if op not in (known := operators()):
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(known)}")
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        why_not = _registry[op].get(name)
        reasons[name] = f"{op} has no {name} implementation" if why_not is None else why_not(*args)
    forced = get_backend()
    if forced is not None:
        chosen = forced if reasons[forced] is None else None
    else:
        chosen = next((name for name, reason in reasons.items() if reason is None), None)
    able = [name for name, reason in reasons.items() if reason is None and (op, name) in _remarks]
    remarks = {name: text for name in able if (text := _remarks[op, name](*args))}
    return Explanation(op, chosen, reasons, remarks)


def select(op: str, *args: object) -> str:
    """Name of the backend that runs ``op(*args)``.

    Raises ``BackendUnavailableError`` when none can, or when the one asked for by name cannot.
    """
    forced = get_backend()
    candidates = _registry[op]
    for name in BACKENDS if forced is None else (forced,):
        why_not = candidates.get(name)
        if why_not is not None and why_not(*args) is None:
            return name
    raise BackendUnavailableError(str(explain(op, *args)))


def always(*args: object) -> str | None:
    """For a backend that runs everything."""
    return None


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """Version of the installed Triton, or ``None``."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU, by its number."""
    return torch.cuda.get_device_capability(index)


def interpreting() -> bool:
    """Whether Triton's CPU interpreter is switched on (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_reason(*args: object) -> str | None:
    """Why Triton kernels cannot run on these tensors, or ``None``."""
    if triton_version() is None:
        return "triton is not installed"
    for arg in args:
        if not isinstance(arg, torch.Tensor):
            continue
        if arg.dtype == torch.float64:
            return "float64 is only computed by the reference"
        if not arg.is_cuda:
            if not interpreting():
                return f"the tensors are on {arg.device.type}, and TRITON_INTERPRET is not 1"
            if arg.dtype == torch.bfloat16:
                return "Triton's interpreter does not compute bfloat16"
        elif capability(arg.device.index) < (8, 0):
            return f"compute capability {capability(arg.device.index)} is below (8, 0)"
    return None
