"""Every test here runs once per compiled backend; one that cannot run on this machine is skipped with its reason."""

import pytest
import torch

import raven


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """The name of the backend that every op uses for the length of one test."""
    probe = torch.empty(1, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    reason = raven.explain("chunk_attention", probe, probe, probe).reasons[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    raven.set_backend(request.param)
    yield request.param
    raven.set_backend(None)
