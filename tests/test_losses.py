"""Chunk weights against the paper's figures, and every loss's gradient against its formula."""

import pytest
import torch

from raven.losses import (
    chunk_weights,
    clipped_ratio_loss,
    consistency_kl,
    dmd_loss,
    flow_matching_loss,
    frame_weights,
    policy_ratio,
    reinforce_loss,
    weighted_mean,
)

CHUNKS = (1, 3, 2)
FRAMES = sum(CHUNKS)


def latents(batch=2):
    return torch.randn(batch, 2, FRAMES, 4, 6)


def test_chunk_weights_of_the_paper():
    want = [0.3857, 0.4500, 0.5399, 0.6749, 0.8999, 1.3499, 2.6997]
    assert chunk_weights([3] * 7, -1).tolist() == pytest.approx(want, abs=6e-5)


@pytest.mark.parametrize("alpha", [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("sizes", [(1,), (3, 3, 3), (1, 3, 2, 5)])
def test_chunk_weights_keep_the_total_and_lean_one_way(sizes, alpha):
    w = chunk_weights(sizes, alpha)
    m = torch.tensor(sizes, dtype=torch.float32)
    assert (w * m).sum().item() == pytest.approx(sum(sizes), rel=1e-6)
    steps = w.diff()
    assert (steps > 0).all() if alpha < 0 else (steps < 0).all() if alpha > 0 else (w == 1).all()


def test_chunk_weights_only_depend_on_ratios_of_sizes():
    torch.testing.assert_close(chunk_weights([1, 3, 2], -2), chunk_weights([10, 30, 20], -2))


@pytest.mark.parametrize("sizes, alpha", [((), -1), ((3, 0), -1), ((3, -1), 1), ((3, 3), float("nan"))])
def test_chunk_weights_refuse(sizes, alpha):
    with pytest.raises(ValueError, match="sizes|alpha"):
        chunk_weights(sizes, alpha)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.0])
@pytest.mark.parametrize("per_chunk", [False, True])
def test_dmd_gradient_is_the_formula(alpha, per_chunk):
    x0, fake, real = (latents().requires_grad_(i == 0) for i in range(3))
    dmd_loss(x0, fake, real, CHUNKS, alpha=alpha, per_chunk_norm=per_chunk).backward()

    want = torch.empty_like(x0)
    weights = chunk_weights(CHUNKS, alpha)
    for b in range(len(x0)):
        begin = 0
        for j, frames in enumerate(CHUNKS):
            part = slice(begin, begin + frames)
            over = part if per_chunk else slice(None)
            norm = (x0[b, :, over] - real[b, :, over]).abs().mean()
            want[b, :, part] = weights[j] * (fake[b, :, part] - real[b, :, part]) / norm / x0.numel()
            begin += frames
    torch.testing.assert_close(x0.grad, want.detach(), rtol=1e-4, atol=1e-9)


def test_dmd_descent_moves_away_from_the_critic_towards_the_teacher():
    x0, real = latents().requires_grad_(), latents()
    dmd_loss(x0, x0.detach(), real, CHUNKS, alpha=0).backward()
    assert ((x0.grad * (real - x0.detach())) <= 0).all()
    assert x0.grad.abs().max() > 0


def test_dmd_norm_is_floored():
    x0 = latents().requires_grad_()
    dmd_loss(x0, x0.detach() + 1, x0.detach(), CHUNKS, alpha=0, norm_min=0.5).backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, 2 / x0.numel()))


def test_dmd_gives_no_gradient_to_teacher_and_critic():
    x0, fake, real = (latents().requires_grad_() for _ in range(3))
    dmd_loss(x0, fake, real, CHUNKS).backward()
    assert fake.grad is None and real.grad is None and x0.grad is not None


def test_dmd_refuses_chunks_that_do_not_cover_the_video():
    x = latents()
    with pytest.raises(ValueError, match="x0: got shape"):
        dmd_loss(x, x, x, (3, 2))
    with pytest.raises(TypeError, match="chunk_frames: got 2, expected the frames of each chunk"):
        dmd_loss(x, x, x, 2)
    with pytest.raises(ValueError, match="real: got shape"):
        dmd_loss(x, x, x[:, :, :1], CHUNKS)


def test_flow_matching_loss_is_zero_at_the_velocity_and_weighs_frames():
    x_0, noise = latents(), latents()
    assert flow_matching_loss(noise - x_0, x_0, noise).item() == 0
    off = torch.zeros_like(x_0)
    off[:, :, -1] = 1
    weights = frame_weights(CHUNKS, -1.0)
    got = flow_matching_loss(noise - x_0 + off, x_0, noise, weights[:, None, None])
    assert got.item() == pytest.approx(chunk_weights(CHUNKS, -1)[-1].item() / FRAMES, rel=1e-5)


ELEMENTS = (48, 144, 96)


def policy_inputs():
    return torch.randn(4, 3).requires_grad_(), torch.tensor([2.0, -1.0, 0.0, 0.5])


def test_reinforce_gradient_is_the_formula():
    log_prob, advantages = policy_inputs()
    reinforce_loss(log_prob, advantages, ELEMENTS, alpha=-1, scale=100).backward()
    want = -100 * advantages[:, None] * chunk_weights(ELEMENTS, -1) / sum(ELEMENTS) / len(advantages)
    torch.testing.assert_close(log_prob.grad, want)


def test_ratio_is_exactly_one_and_its_gradient_is_reinforce_before_an_update():
    log_prob, advantages = policy_inputs()
    old = log_prob.detach().clone()
    assert (policy_ratio(log_prob, old, ELEMENTS) == 1).all()
    clipped_ratio_loss(log_prob, old, advantages, ELEMENTS).backward()
    by_ratio, log_prob.grad = log_prob.grad, None
    reinforce_loss(log_prob, advantages, ELEMENTS).backward()
    torch.testing.assert_close(by_ratio, log_prob.grad)


def test_clip_stops_the_gradient_only_on_the_side_that_already_gained():
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    moved = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 0.1  # mean log-ratio, far beyond the clip
    log_prob = (moved[:, None] * torch.tensor(ELEMENTS)).requires_grad_()
    clipped_ratio_loss(log_prob, torch.zeros_like(log_prob), advantages, ELEMENTS, clip=0.01).backward()
    assert (log_prob.grad != 0).any(dim=1).tolist() == [False, True, True, False]


def test_weighted_mean_of_equal_densities_is_that_density():
    sums = torch.tensor(ELEMENTS)[None] * 0.25
    assert weighted_mean(sums, ELEMENTS, alpha=-1).item() == pytest.approx(0.25)


def test_policy_losses_refuse():
    log_prob, advantages = policy_inputs()
    with pytest.raises(ValueError, match="log_prob: got shape"):
        reinforce_loss(log_prob, advantages[:2], ELEMENTS)
    with pytest.raises(ValueError, match="clip: got 0"):
        clipped_ratio_loss(log_prob, log_prob, advantages, ELEMENTS, clip=0)


def test_consistency_kl_is_that_of_the_two_gaussians():
    v, v_reference, x_t = (latents().double() for _ in range(3))
    t, s = torch.tensor([1.0, 0.833]), torch.tensor([0.938, 0.625])
    got = consistency_kl(v, v_reference, t, s, CHUNKS)
    level = s.reshape(-1, 1, 1, 1, 1).double()
    means = [(1 - level) * (x_t - t.reshape(-1, 1, 1, 1, 1) * each) for each in (v, v_reference)]
    density = torch.distributions.kl_divergence(*(torch.distributions.Normal(mean, level) for mean in means))
    want = torch.stack([part.sum(dim=(1, 2, 3, 4)) for part in density.split(CHUNKS, dim=2)], dim=1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
