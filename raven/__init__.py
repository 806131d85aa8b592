"""Fused GPU kernels for chunk-causal video diffusion, and the thin layer that trains and streams with them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raven.backends import explain, get_backend, set_backend
    from raven.errors import BackendUnavailableError
    from raven.native import build_config

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "__version__", "build_config", "explain", "get_backend", "set_backend"]

_HOMES = {
    "BackendUnavailableError": "raven.errors",
    "build_config": "raven.native",
    "explain": "raven.backends",
    "get_backend": "raven.backends",
    "set_backend": "raven.backends",
}


def __getattr__(name: str):
    """Import on first use: ``raven --help`` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'raven' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
