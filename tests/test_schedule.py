"""Noise levels and the two stochastic steps, against their formulas element by element."""

import math

import pytest
import torch

from raven.schedule import (
    add_noise,
    consistency_kernel,
    euler_maruyama_kernel,
    expand_level,
    sampling_levels,
    shift_level,
    velocity_from_x0,
    x0_from_velocity,
)

SHAPE = (2, 3, 5, 2, 4)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape or SHAPE, dtype=dtype)


def test_sampling_levels_of_the_paper():
    levels = sampling_levels(4, shift=5.0)
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx([1.0, 0.938, 0.833, 0.625], abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_sampling_levels_fall_from_one_in_thousandths(steps):
    levels = sampling_levels(steps, shift=3.0).double()
    assert len(levels) == steps and levels[0] == 1
    assert (levels[1:] < levels[:-1]).all() and (levels > 0).all()
    torch.testing.assert_close(levels * 1000, (levels * 1000).round(), atol=1e-4, rtol=0)


def test_shift_level():
    assert shift_level(0.5, 5.0) == pytest.approx(2.5 / 3)
    assert shift_level(0.3, 1.0) == pytest.approx(0.3)
    u = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(shift_level(u, 5.0), torch.tensor([0.0, 0.625, 1.0]))


def test_expand_level_takes_every_form():
    like = draw()
    assert expand_level(0.25, like).shape == (2, 1, 1, 1, 1)
    assert (expand_level(0.25, like) == 0.25).all()
    assert expand_level(torch.tensor(0.25), like).flatten().tolist() == [0.25, 0.25]
    per_sample = torch.tensor([0.25, 0.5])
    assert expand_level(per_sample, like).flatten().tolist() == [0.25, 0.5]
    assert expand_level(per_sample, like).dtype == torch.float64
    assert expand_level(per_sample, like.bfloat16()).dtype == torch.float32
    per_frame = torch.rand(2, 5)
    assert expand_level(per_frame, like).shape == (2, 1, 5, 1, 1)
    torch.testing.assert_close(expand_level(per_frame, like).squeeze().float(), per_frame, atol=0, rtol=0)
    per_chunk = torch.tensor([[0.25, 0.5, 0.75], [0.0, 0.125, 1.0]])
    spread = expand_level(per_chunk, like, chunk_frames=(1, 3, 1))
    assert spread.squeeze().tolist() == [[0.25, 0.5, 0.5, 0.5, 0.75], [0.0, 0.125, 0.125, 0.125, 1.0]]
    again = expand_level(spread, like)
    assert again.shape == spread.shape and torch.equal(again, spread)


@pytest.mark.parametrize(
    ("level", "chunk_frames", "message"),
    [
        (1.5, None, "level: got noise level 1.5"),
        (torch.tensor([0.5, -0.25]), None, "level: got noise level -0.25"),
        (float("nan"), None, "level: got noise level nan"),
        (torch.rand(3), None, r"level: got shape \(3,\), expected a number, \[2\]"),
        (torch.rand(2, 4), None, r"level: got shape \(2, 4\), expected a number, \[2\] or \[2, 5\]"),
        (torch.rand(2, 3), (2, 2), r"chunk_frames: got \(2, 2\), expected positive sizes with sum 5"),
        (torch.rand(2, 3), (5, 0), r"chunk_frames: got \(5, 0\)"),
        (torch.rand(2, 2), (1, 2, 2), r"level: got shape \(2, 2\)"),
        (torch.rand(2, 3, 1, 1, 3), None, r"level: got shape \(2, 3, 1, 1, 3\), expected one that broadcasts"),
    ],
)
def test_expand_level_refuses(level, chunk_frames, message):
    with pytest.raises(ValueError, match=message):
        expand_level(level, draw(), chunk_frames)


def test_expand_level_refuses_integers_and_other_devices():
    with pytest.raises(TypeError, match="level: got dtype int64"):
        expand_level(torch.tensor([0, 1]), draw())
    with pytest.raises(ValueError, match="level: got device meta, expected cpu"):
        expand_level(torch.rand(2, device="meta"), draw())


@pytest.mark.parametrize("level", [0.3, torch.tensor([0.3, 0.7], dtype=torch.float64)])
def test_noise_and_velocity_belong_together(level):
    x_0, noise = draw(), draw()
    x_t = add_noise(x_0, noise, level)
    torch.testing.assert_close(x0_from_velocity(noise - x_0, x_t, level), x_0)
    torch.testing.assert_close(velocity_from_x0(x_0, x_t, level), noise - x_0)


def test_levels_per_chunk():
    x_0, noise = draw(), draw()
    level = torch.tensor([[0.1, 0.9], [0.5, 0.2]], dtype=torch.float64)
    x_t = add_noise(x_0, noise, level, chunk_frames=(2, 3))
    for b in range(2):
        for n, frames in enumerate((slice(0, 2), slice(2, 5))):
            t = level[b, n].item()
            want = (1 - t) * x_0[b, :, frames] + t * noise[b, :, frames]
            torch.testing.assert_close(x_t[b, :, frames], want)
    torch.testing.assert_close(x0_from_velocity(noise - x_0, x_t, level, (2, 3)), x_0)


def test_dtype_follows_the_state_and_arithmetic_is_float32():
    x_0, noise = draw().bfloat16(), draw().bfloat16()
    x_t = add_noise(x_0, noise, 0.938)
    assert x_t.dtype == torch.bfloat16
    want = ((1 - 0.938) * x_0.double() + 0.938 * noise.double()).bfloat16()
    # One rounding at the end: where float32 and float64 round to different neighbours, one bfloat16 step apart.
    assert (x_t == want).double().mean() > 0.99


def test_velocity_from_x0_refuses_level_zero():
    with pytest.raises(ValueError, match=r"t: got noise level 0.0, expected a value in \(0, 1\]"):
        velocity_from_x0(draw(), draw(), 0.0)
    with pytest.raises(ValueError, match="v: got shape"):
        x0_from_velocity(draw(2, 3), draw(), 0.5)


def test_consistency_kernel():
    v, x_t = draw(), draw()
    t, s = torch.tensor([0.9, 0.7], dtype=torch.float64), torch.tensor([0.5, 0.0], dtype=torch.float64)
    mean, std = consistency_kernel(v, x_t, t, s)
    for b in range(2):
        want = (1 - s[b].item()) * (x_t[b] - t[b].item() * v[b])
        torch.testing.assert_close(mean[b], want)
    assert std.shape == (2, 1, 1, 1, 1) and std.flatten().tolist() == [0.5, 0.0]
    assert consistency_kernel(v.bfloat16(), x_t.bfloat16(), 0.5, 0.25)[0].dtype == torch.float32


@pytest.mark.parametrize(("t", "s", "g"), [(0.9, 0.6, 0.7), (0.625, 0.0, 0.3), (1.0, 0.938, 0.7)])
def test_euler_maruyama_kernel(t, s, g):
    v, x_t = draw(), draw()
    mean, std = euler_maruyama_kernel(v, x_t, t, s, noise_level=g)
    dt = s - t
    sigma = g * math.sqrt(t / (1 - (s if t == 1 else t)))
    want = x_t * (1 + sigma**2 * dt / (2 * t)) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    torch.testing.assert_close(mean, want)
    torch.testing.assert_close(std.flatten(), torch.full((2,), sigma * math.sqrt(-dt), dtype=torch.float64))


def test_euler_maruyama_without_noise_is_the_euler_step():
    v, x_t = draw(), draw()
    mean, std = euler_maruyama_kernel(v, x_t, torch.tensor([1.0, 0.8]), torch.tensor([0.7, 0.0]), noise_level=0.0)
    dt = torch.tensor([-0.3, -0.8]).double().view(2, 1, 1, 1, 1)
    torch.testing.assert_close(mean, x_t + v * dt, atol=1e-6, rtol=1e-6)
    assert (std == 0).all()


def test_euler_maruyama_keeps_the_marginal_to_first_order():
    """For one data point x_0 the step's mean and variance reach those of the flow at s, up to dt squared."""
    x_0, g, t = 0.8, 0.5, 0.6
    errors = []
    for dt in (-1e-2, -1e-3):
        # x_t = (1 - t) x_0 + t e is linear in e: follow the coefficients of x_0 and of e through the step.
        x = torch.tensor([[(1 - t) * x_0, t]], dtype=torch.float64)
        v = torch.tensor([[-x_0, 1.0]], dtype=torch.float64)
        mean, std = euler_maruyama_kernel(v, x, t, t + dt, noise_level=g)
        variance = mean[0, 1] ** 2 + std[0, 0] ** 2
        s = t + dt
        errors.append(max(abs(mean[0, 0].item() - (1 - s) * x_0), abs(variance.item() - s * s)))
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize(
    ("t", "s", "g", "message"),
    [
        (0.5, 0.5, 0.7, "s: got a level that is not below t"),
        (0.0, 0.0, 0.7, "t: got noise level 0.0"),
        (0.5, -0.1, 0.7, "s: got noise level -0.1"),
        (0.5, 0.2, -0.7, "noise_level: got -0.7"),
    ],
)
def test_euler_maruyama_refuses(t, s, g, message):
    with pytest.raises(ValueError, match=message):
        euler_maruyama_kernel(draw(), draw(), t, s, noise_level=g)


def test_schedule_refuses_bad_numbers():
    with pytest.raises(ValueError, match="steps: got 0"):
        sampling_levels(0)
    with pytest.raises(ValueError, match="shift: got 0"):
        shift_level(0.5, 0.0)
    with pytest.raises(ValueError, match="u: got noise level 2"):
        shift_level(2.0)
