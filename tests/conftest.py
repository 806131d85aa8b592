"""Shared fixtures, and the lanes: ``gpu`` tests need a GPU, ``interpret`` tests need TRITON_INTERPRET=1."""

import signal
from contextlib import nullcontext

import pytest
import torch
from choices import kernels_alone
from record import pytest_addoption, pytest_terminal_summary  # noqa: F401  pytest finds hooks here

import raven
from raven import backends, native

# Assertions of shared helpers show their values as those of a test do.
pytest.register_assert_rewrite("attention_cases", "log_prob_cases", "rope_cases")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "interpret" in item.keywords and not backends.interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


def pytest_generate_tests(metafunc):
    """The GPU tests of a module that says EVERY_GPU_BACKEND run once with the automatic choice and once on Triton."""
    if getattr(metafunc.module, "EVERY_GPU_BACKEND", False) and metafunc.definition.get_closest_marker("gpu"):
        metafunc.parametrize("gpu_backend", ["automatic", "triton"], indirect=True)


@pytest.fixture(autouse=True)  # of every test, since pytest sets up nothing that a test neither names nor inherits
def gpu_backend(request):
    """Automatic means the compiled library where it takes the tensors, so it must be there; else ``None``."""
    name = getattr(request, "param", None)
    if name == "automatic" and (reason := native.unavailable()):
        pytest.skip(reason)
    raven.set_backend("triton" if name == "triton" else None)
    yield name
    raven.set_backend(None)


@pytest.fixture(autouse=True)
def meant_kernels(request):
    """A GPU test is one of kernels, on whatever machine: none of its ops may fall back to plain PyTorch unseen."""
    with kernels_alone() if "gpu" in request.keywords else nullcontext():
        yield


@pytest.fixture
def triton_backend():
    """Every op runs its Triton kernel for the length of one test."""
    raven.set_backend("triton")
    yield
    raven.set_backend(None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C as in a terminal: a process that was started in the background ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
