"""Advantages by hand, replay against the rollout, and updates that move probability and reward the right way."""

import pytest
import torch

from raven.grpo import (
    chunk_elements,
    cm_grpo_loss,
    draw_steps,
    group_advantages,
    prompt_ids,
    replay,
    sde_rollout,
    step_log_prob,
    transition,
)
from raven.losses import policy_ratio, reinforce_loss
from raven.models import CausalWan, WanConfig
from raven.rollout import rollout
from raven.schedule import consistency_kernel, euler_maruyama_kernel, sampling_levels

CHUNKS = (1, 2, 2)
SHAPE = (2, 4, 4)
LEVELS = sampling_levels(4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CausalWan(
        WanConfig(
            dim=32, ffn_dim=32, num_heads=2, num_layers=2, in_dim=2, out_dim=2, freq_dim=16, text_dim=6, text_len=3
        )
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    return model


def play(model, batch=4, seed=1, **visible):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, 3, 6, generator=generator)
    return rollout(model, context, SHAPE, CHUNKS, LEVELS, generator=generator, **visible), context


def test_advantages_by_hand():
    rewards = {"a": torch.tensor([1.0, 3.0, 10.0, 10.0]), "b": torch.tensor([0.0, 0.0, 2.0, 4.0])}
    got = group_advantages(rewards, ["p", "p", "q", "q"], {"a": 2.0, "b": 1.0})
    unit = 1 / (1 + 1e-5)  # both groups of "a" and "b" that vary have std 1
    sums = torch.tensor([-2 * unit, 2 * unit, -unit, unit])
    stds = torch.tensor([2 * unit, 2 * unit, unit, unit])
    torch.testing.assert_close(got, sums / (stds + 1e-5))


def test_advantages_are_zero_for_single_and_for_constant_groups():
    rewards = torch.tensor([[0.1, 0.1, 0.1, 7.0, 1.0, 2.0]])
    got = group_advantages(rewards, ["same", "same", "same", "alone", "pair", "pair"])
    assert got[:4].tolist() == [0, 0, 0, 0]
    assert got[4] < 0 < got[5]


def test_advantages_have_zero_mean_and_unit_spread_per_prompt():
    ids = prompt_ids([f"p{i % 3}" for i in range(24)])
    rewards = torch.randn(2, 24) * torch.tensor([[1000.0], [1e-2]]) + 5
    got = group_advantages(rewards, ids, [1.0, 0.5])
    for each in ids.unique():
        part = got[ids == each]
        assert part.mean().abs() < 1e-5
        assert part.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


def test_advantages_do_not_depend_on_the_order_of_samples():
    rewards, ids = torch.randn(2, 12), prompt_ids([f"p{i % 3}" for i in range(12)])
    order = torch.randperm(12)
    torch.testing.assert_close(group_advantages(rewards[:, order], ids[order]), group_advantages(rewards, ids)[order])


def test_advantages_are_clipped():
    rewards = torch.zeros(1, 64)
    rewards[0, 0] = 1
    assert group_advantages(rewards, ["p"] * 64).max() == 5
    assert group_advantages(rewards, ["p"] * 64, clip=100.0).max() > 7


def test_second_normalisation_spans_ranks():
    """Rank 0's two rewards agree (their sum is wide), rank 1's cancel in part (narrow): only together they are unit."""
    pairs = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    ids = prompt_ids(["p"] * 3)

    def normalised(row):
        return (row - row.mean()) / (row.std(unbiased=False) + 1e-5)

    totals = [sum(normalised(row) for row in pair.double()) for pair in pairs]
    everyone = normalised(torch.cat(totals)).float()
    for rank in range(2):

        def gather(values, rank=rank):
            if values.dtype == torch.int64:
                return torch.cat([ids, ids])
            torch.testing.assert_close(values, totals[rank])
            return torch.cat(totals)

        got = group_advantages(pairs[rank], ids, gather=gather, rank=rank)
        torch.testing.assert_close(got, everyone[3 * rank : 3 * rank + 3])
    assert group_advantages(pairs[1], ids).std() > 1.5 * everyone[3:].std()


def test_advantages_refuse():
    with pytest.raises(ValueError, match="nan for 'a' of sample 1"):
        group_advantages({"a": torch.tensor([0.0, float("nan")])}, ["p", "p"])
    with pytest.raises(ValueError, match="weights"):
        group_advantages({"a": torch.zeros(2)}, ["p", "p"], {"b": 1.0})
    with pytest.raises(ValueError, match="prompts: got shape"):
        group_advantages({"a": torch.zeros(2)}, ["p"])
    with pytest.raises(ValueError, match="at least one"):
        group_advantages({}, [])


def test_last_step_takes_no_part(model):
    steps = draw_steps(1000, len(LEVELS), torch.Generator().manual_seed(0))
    assert sorted(steps.unique().tolist()) == [0, 1, 2]
    played, _ = play(model)
    with pytest.raises(ValueError, match=r"steps: got \[0, 0, 0, 3\]"):
        transition(played, torch.tensor([0, 0, 0, 3]))
    with pytest.raises(ValueError, match="levels: got 1"):
        draw_steps(2, 1)


def drawn_noise(batch, seed):
    """The noise of ``play``, in its order: for every chunk its first state, then one draw a step but the last."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(batch, 3, 6, generator=generator)  # the context
    chunks = [
        torch.stack([torch.randn(batch, SHAPE[0], frames, *SHAPE[1:], generator=generator) for _ in LEVELS])
        for frames in CHUNKS
    ]
    return torch.cat(chunks, dim=3)  # [K, B, C, F, H, W]; the first is the noise at level 1


@pytest.mark.parametrize("visible", [{}, {"sink": 1, "window": 1}, {"window": 0}])
def test_replay_recovers_the_noise_that_the_rollout_drew(model, visible):
    """The packed replay has the mean of the cached rollout: (x_s - mean) / std is the drawn noise, and its density."""
    played, context = play(model, **visible)
    steps = torch.tensor([0, 1, 2, 1])
    step = transition(played, steps)
    log_prob, v = replay(model, step, context, CHUNKS, **visible)
    noise = drawn_noise(4, seed=1)[steps + 1, torch.arange(4)]
    mean, std = consistency_kernel(v, step.x_t, step.t, step.s)
    torch.testing.assert_close((step.x_s - mean) / std, noise, rtol=1e-4, atol=1e-4)
    density = torch.distributions.Normal(0, 1).log_prob(noise) - std.log()
    want = torch.stack([part.sum(dim=(1, 2, 3, 4)) for part in density.split(CHUNKS, dim=2)], dim=1)
    torch.testing.assert_close(log_prob, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", ["consistency", "euler_maruyama"])
def test_ratio_is_exactly_one_before_the_first_update(model, kernel):
    played, context = play(model)
    step = transition(played, torch.tensor([2, 0, 1, 1]))
    with torch.no_grad():
        old, _ = replay(model, step, context, CHUNKS, kernel=kernel)
    new, _ = replay(model, step, context, CHUNKS, kernel=kernel)
    assert new.requires_grad
    assert torch.equal(new, old)
    assert (policy_ratio(new, old, chunk_elements(step.x_t, CHUNKS)) == 1).all()
    _, metrics = cm_grpo_loss(model, step, torch.ones(4), context, CHUNKS, clip=1e-4, old_log_prob=old, kernel=kernel)
    assert metrics["ratio"] == 1 and metrics["clipped"] == 0


def test_gradient_is_advantage_times_the_score(model):
    """d loss / d v = scale * advantage * w * t A(s) (x_s - A(s) x0) / B(s)^2 / elements, by the paper's formula."""
    played, context = play(model)
    step = transition(played, torch.tensor([0, 1, 2, 2]))
    v = torch.randn_like(step.x_t).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0])
    from raven.losses import chunk_weights

    elements = chunk_elements(step.x_t, CHUNKS)
    reinforce_loss(step_log_prob(v, step, CHUNKS), advantages, elements).backward()
    t, s = (level.reshape(-1, 1, 1, 1, 1) for level in (step.t, step.s))
    score = -t * (1 - s) * (step.x_s - (1 - s) * (step.x_t - t * v.detach())) / s**2
    weights = chunk_weights(CHUNKS, -1).repeat_interleave(torch.tensor(CHUNKS))[:, None, None]
    want = -100 * advantages.reshape(-1, 1, 1, 1, 1) * weights * score / v[0].numel() / len(v)
    torch.testing.assert_close(v.grad, want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("alpha", [-1.0, 0.0])
def test_fused_loss_is_the_composition(model, alpha):
    """The update's loss, metric and gradients are those of replay and ``reinforce_loss``."""
    played, context = play(model)
    step = transition(played, torch.tensor([0, 1, 2, 2]))
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0])
    elements = chunk_elements(step.x_t, CHUNKS)
    log_prob, _ = replay(model, step, context, CHUNKS)
    want = reinforce_loss(log_prob, advantages, elements, alpha)
    loss, metrics = cm_grpo_loss(model, step, advantages, context, CHUNKS, alpha=alpha)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["log_prob"], (log_prob.detach().sum(1) / sum(elements)).mean())
    weight = model.head.head.weight
    got, expected = (torch.autograd.grad(x * 0.25, weight)[0] for x in (loss, want))
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", ["consistency", "euler_maruyama"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_update_raises_good_samples_and_lowers_bad_ones(kernel, clip):
    torch.manual_seed(3)
    student = CausalWan(
        WanConfig(
            dim=32, ffn_dim=32, num_heads=2, num_layers=1, in_dim=2, out_dim=2, freq_dim=16, text_dim=6, text_len=3
        )
    )
    torch.nn.init.normal_(student.head.head.weight, std=0.2)
    generator = torch.Generator().manual_seed(5)
    context = torch.randn(2, 3, 6, generator=generator)
    roll = rollout if kernel == "consistency" else sde_rollout
    step = transition(roll(student, context, SHAPE, CHUNKS, LEVELS, generator=generator), torch.tensor([2, 2]))
    with torch.no_grad():
        before, _ = replay(student, step, context, CHUNKS, kernel=kernel)
    loss, _ = cm_grpo_loss(
        student,
        step,
        torch.tensor([1.0, -1.0]),
        context,
        CHUNKS,
        kernel=kernel,
        clip=clip,
        old_log_prob=None if clip is None else before,
    )
    loss.backward()
    with torch.no_grad():
        for weight in student.parameters():
            if weight.grad is not None:
                weight -= 1e-5 * weight.grad
        change = (replay(student, step, context, CHUNKS, kernel=kernel)[0] - before).sum(dim=1)
    assert change[0] > 0 > change[1]


def test_sde_rollout_samples_its_own_kernel(model):
    context = torch.randn(4, 3, 6)
    played = sde_rollout(model, context, SHAPE, CHUNKS, LEVELS, generator=torch.Generator().manual_seed(2))
    assert played.x_t.shape == (4, 4, SHAPE[0], sum(CHUNKS), *SHAPE[1:])
    step = transition(played, torch.tensor([0, 1, 2, 0]))
    _, v = replay(model, step, context, CHUNKS, kernel="euler_maruyama")
    mean, std = euler_maruyama_kernel(v, step.x_t, step.t, step.s, 0.7)
    noise = ((step.x_s - mean) / std).flatten(1)
    assert noise.std().item() == pytest.approx(1, abs=0.15)


def test_kl_to_itself_is_zero_and_to_another_is_positive_with_gradient(model):
    import copy

    played, context = play(model)
    step = transition(played, torch.tensor([0, 1, 2, 1]))
    reference = copy.deepcopy(model)
    advantages = torch.zeros(4)
    _, metrics = cm_grpo_loss(model, step, advantages, context, CHUNKS, kl=0.1, reference=reference)
    assert metrics["kl"] == 0
    with torch.no_grad():
        reference.head.head.weight.add_(0.1)
    model.zero_grad()
    loss, metrics = cm_grpo_loss(model, step, advantages, context, CHUNKS, kl=0.1, reference=reference)
    loss.backward()
    assert metrics["kl"] > 0
    assert model.head.head.weight.grad.abs().sum() > 0
    assert reference.head.head.weight.grad is None
    model.zero_grad()


def test_loss_refuses_half_a_ratio_and_a_kl_to_nothing(model):
    played, context = play(model)
    step = transition(played, torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match="old_log_prob: got None with clip"):
        cm_grpo_loss(model, step, torch.zeros(4), context, CHUNKS, clip=1e-4)
    with pytest.raises(ValueError, match="kl: got 0.1"):
        cm_grpo_loss(model, step, torch.zeros(4), context, CHUNKS, kl=0.1)
    with pytest.raises(ValueError, match="kernel: got 'ode'"):
        replay(model, step, context, CHUNKS, kernel="ode")
