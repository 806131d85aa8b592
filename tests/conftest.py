"""Shared fixtures, and the lanes: ``gpu`` tests need a GPU, ``interpret`` tests need TRITON_INTERPRET=1."""

import signal

import pytest
import torch

import raven
from raven import backends


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if "interpret" in item.keywords and not backends.interpreting():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


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
