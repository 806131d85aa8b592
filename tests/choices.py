"""What the ops of a test chose to run on."""

from contextlib import contextmanager

import pytest
import torch

from raven import backends


@contextmanager
def kernels_alone(device="cuda"):
    """Fails where an op on ``device`` fell back to plain PyTorch by itself: the test meant its kernels.

    float64 is the reference's own, and a backend that was asked for by name is no fallback.
    """
    select, plain = backends.select, set()

    def watched(op, *args):
        name = select(op, *args)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name == "reference" and backends.get_backend() is None and any(x.device.type == device for x in tensors):
            if all(x.dtype != torch.float64 for x in tensors):
                plain.add(op)
        return name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "select", watched)
        yield
    assert not plain, f"ran in plain PyTorch on {device}, and nobody asked for it: {', '.join(sorted(plain))}"
