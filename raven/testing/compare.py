"""How right is right: errors, and the assertions that know the tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Relative RMS errors of attention against float64, (forward, backward). bfloat16 keeps 8 bits, float16 11.
_RMS = {
    torch.bfloat16: (6e-3, 1e-2),
    torch.float16: (1e-3, 2e-3),
    torch.float32: (1e-5, 2e-5),
    torch.float64: (1e-12, 1e-11),
}


@dataclass(frozen=True)
class Tolerance:
    """A result passes when its relative RMS error is at most ``rms`` and at most ``factor`` times the baseline's."""

    rms: float
    factor: float = 2.0


def tolerance(dtype: torch.dtype, direction: str = "forward") -> Tolerance:
    """The tolerance of attention in ``dtype``; ``direction`` is "forward" or "backward"."""
    if dtype not in _RMS:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _RMS))}")
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction: got {direction!r}, expected forward or backward")
    return Tolerance(_RMS[dtype][direction == "backward"])


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|`` (2-norms, in float64); NaN or infinity in ``got`` gives infinity, never a pass.

    Both empty, or both all zero, is 0; a wrong value where all of ``want`` is zero is infinity.
    """
    if got.shape != want.shape:
        raise ValueError(f"got: got shape {tuple(got.shape)}, expected {tuple(want.shape)} like want")
    got, want = got.detach().double(), want.detach().double()
    error, size = float((got - want).norm()), float(want.norm())
    if not bool(got.isfinite().all()):
        return float("inf")
    if size == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / size


def assert_as_accurate(
    got: torch.Tensor,
    want: torch.Tensor,
    baseline: torch.Tensor | None,
    limit: Tolerance,
    name: str = "result",
    noise: float = 0.0,
) -> float:
    """Assert ``limit`` for ``got`` against the float64 ``want``; returns the relative RMS error.

    ``baseline`` is the same computation by PyTorch in ``got``'s dtype: an error above ``limit.factor`` times its error
    fails, however small both are. ``None`` leaves only ``limit.rms``.

    noise: 2-norm of an error that is allowed beyond those, for results whose terms cancel: what float32 sums of the
    terms leave is no measure of an implementation when nothing else is left.
    """
    error = relative_rms(got, want)
    allowed = noise / size if (size := float(want.detach().double().norm())) else 0.0
    if size == 0.0 and float(got.detach().double().norm()) <= noise:  # NaN is not
        return 0.0
    assert error <= limit.rms + allowed, f"{name}: relative RMS error {error:.3e}, expected at most {limit.rms:.1e}"
    if baseline is not None:
        reached = relative_rms(baseline, want)
        assert error <= limit.factor * reached + allowed, (
            f"{name}: relative RMS error {error:.3e}, expected at most {limit.factor:g} times "
            f"the baseline's {reached:.3e}"
        )
    return error


def assert_bitwise(got: torch.Tensor, want: torch.Tensor, name: str = "result") -> None:
    """Assert equal shape, dtype and bits: -0 differs from 0, and a NaN equals itself."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = got.detach().contiguous().view(bits) != want.detach().contiguous().view(bits)
    count = int(different.sum())
    assert count == 0, f"{name}: {count} of {got.numel()} elements differ, first at {different.nonzero()[0].tolist()}"
