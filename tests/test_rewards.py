"""Rewards of the built-in world are its metrics, behind the one-method protocol."""

import pytest
import torch

from raven.rewards import Reward, ShapesReward
from raven.worlds import Shapes


def test_shapes_reward_is_the_worlds_score():
    world = Shapes()
    batch = world.sample(4, 6, seed=1)
    video = batch.video + 0.3 * torch.randn_like(batch.video)
    reward = ShapesReward(world, chunk_frames=2)
    assert isinstance(reward, Reward)
    got = reward(video, batch.prompts)
    want = world.score(video, batch.prompts, 2)
    assert set(got) == set(reward.weights) == {"quality", "semantic", "dynamic"}
    for name, values in got.items():
        assert values.shape == (4,)
        assert torch.equal(values, getattr(want, name))


def test_rewards_order_videos_as_one_would():
    world = Shapes(max_shapes=1)
    batch = world.sample(8, 12, seed=2)
    reward = ShapesReward(world)
    good = reward(batch.video, batch.prompts)
    worse = {
        "quality": batch.video + 0.3 * torch.randn_like(batch.video),
        "semantic": batch.video.roll(1, 0),
        "dynamic": batch.video[:, :, :1].expand_as(batch.video),
    }
    for name, video in worse.items():
        bad = reward(video, batch.prompts)
        assert (bad[name] < good[name] - 0.1).float().mean() >= 0.75, name


def test_rewards_need_no_gradient_and_pass_errors_on():
    world = Shapes()
    batch = world.sample(1, 3, seed=0)
    scores = ShapesReward()(batch.video.requires_grad_(), batch.prompts)
    assert not any(values.requires_grad for values in scores.values())
    with pytest.raises(ValueError, match="'dog'"):
        ShapesReward()(batch.video, ["a red dog moves left"])
