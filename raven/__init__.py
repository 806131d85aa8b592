"""Fused GPU kernels for chunk-causal video diffusion, and the thin layer that trains and streams with them."""

from raven.backends import explain, get_backend, set_backend
from raven.errors import BackendUnavailableError

__version__ = "0.1.0"
__all__ = ["BackendUnavailableError", "__version__", "explain", "get_backend", "set_backend"]
