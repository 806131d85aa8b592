"""The world ``shapes``: what it draws is what the prompt says, and the metrics see what was changed, only that."""

import re

import pytest
import torch
import torch.nn.functional as F

from raven.worlds import Shapes, pictures
from raven.worlds.shapes.prompts import COLOURS, DIRECTIONS, SHAPES, Clause, to_prompt
from raven.worlds.shapes.render import BACKGROUND, PALETTE, draw, outward, signed_distance
from raven.worlds.shapes.scenes import fold

WORLD = Shapes()


@pytest.fixture(scope="module")
def batch():
    return WORLD.sample(24, 12, seed=3)


@pytest.fixture(scope="module")
def single():
    return Shapes(max_shapes=1).sample(16, 12, seed=4)


def blurred(video, sigma):
    taps = torch.exp(-0.5 * (torch.arange(-8, 9) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    flat = F.pad(video.reshape(-1, 1, *video.shape[-2:]), (8, 8, 8, 8), mode="replicate")
    return F.conv2d(F.conv2d(flat, taps), taps.transpose(2, 3)).reshape(video.shape)


def reworded(prompts, swap):
    return [re.sub(r"\w+", lambda m: swap.get(m[0], m[0]), prompt) for prompt in prompts]


def cycle(words):
    return dict(zip(words, (*words[1:], words[0]), strict=True))


# prompts


def test_prompts_parse_to_what_they_were_written_from():
    for prompt in WORLD.prompts(50, seed=1):
        assert to_prompt(WORLD.parse(prompt)) == prompt
    parsed = WORLD.parse("A red circle moves left fast and a blue square moves up slowly.")
    assert parsed == [Clause("red", "circle", "left", "fast"), Clause("blue", "square", "up", "slowly")]
    assert WORLD.parse("") == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a rad circle moves left", r"'rad' \(did you mean 'red'\?\).*expected words of: a, and"),
        ("a red circle moves", "clause 'a red circle moves'.*expected a COLOUR SHAPE moves DIRECTION"),
        ("a circle red moves left", "expected a COLOUR SHAPE"),
        ("a red circle moves left and", "got clause ''"),
        ("a red circle moves left fast slowly", "expected a COLOUR SHAPE"),
        (" and ".join(["a red circle moves left"] * 3), "got 3 shapes.*at most 2"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        WORLD.parse(prompt)
    with pytest.raises(ValueError, match=message):
        WORLD.encode([prompt])


def test_a_prompt_that_is_no_string_is_a_type_error():
    with pytest.raises(TypeError, match="expected str"):
        WORLD.parse(3)


def test_encoding_tells_all_prompts_apart_and_has_zero_padding():
    prompts = sorted(set(WORLD.prompts(300, seed=2)))
    context = WORLD.encode(prompts)
    assert context.shape == (len(prompts), WORLD.text_len, WORLD.text_dim) and context.dtype == torch.float32
    assert len(torch.unique(context.flatten(1), dim=0)) == len(prompts)
    used = context.sum(-1)
    assert set(used.unique().tolist()) == {0.0, 2.0}  # a word and its row, or nothing
    assert not WORLD.encode([""]).any()
    slow, plain = WORLD.encode(["a red circle moves left slowly", "a red circle moves left"])
    assert torch.equal(slow, plain)
    assert WORLD.encode(["a red circle moves up"], dtype=torch.float16).dtype == torch.float16


def test_the_second_clause_is_encoded_at_the_same_rows_whatever_the_first_is():
    a = WORLD.encode(["a red circle moves left fast and a blue square moves up"])
    b = WORLD.encode(["a green circle moves left and a blue square moves up"])
    assert torch.equal(a[:, 8:], b[:, 8:]) and a[:, 8:].any()


# drawing


def test_samples_depend_on_seed_and_index_alone():
    whole = WORLD.sample(6, 5, seed=7)
    part = WORLD.sample(3, 5, seed=7, first=2)
    assert part.prompts == whole.prompts[2:5] == WORLD.prompts(3, seed=7, first=2)
    assert torch.equal(part.video, whole.video[2:5])
    assert not torch.equal(WORLD.sample(6, 5, seed=8).video, whole.video)
    assert WORLD.sample(6, 5, seed=8).prompts != whole.prompts
    draws = [WORLD.sample(2, 2, seed=torch.Generator().manual_seed(5)).video for _ in range(2)]
    assert torch.equal(*draws)
    generator = torch.Generator().manual_seed(5)
    assert WORLD.prompts(8, generator) != WORLD.prompts(8, generator)


def test_draws_cover_the_language_evenly():
    clauses = [clause for prompt in Shapes(max_shapes=3).prompts(600, seed=0) for clause in WORLD_3.parse(prompt)]
    for field, words in (("colour", COLOURS), ("shape", SHAPES), ("direction", DIRECTIONS)):
        share = torch.tensor([sum(getattr(c, field) == w for c in clauses) / len(clauses) for w in words])
        assert (share * len(words) - 1).abs().max() < 0.25, (field, share)
    sizes = torch.tensor([len(WORLD_3.parse(prompt)) for prompt in Shapes(max_shapes=3).prompts(600, seed=0)])
    assert (torch.bincount(sizes)[1:] > 150).all()


WORLD_3 = Shapes(max_shapes=3)


def test_motion_is_the_prompts_and_stays_between_the_walls():
    batch = WORLD_3.sample(40, 36, seed=1)
    scene = batch.scenes
    position = scene.positions(36)
    margin, extent = WORLD_3.walls
    assert position.min() >= margin - 1e-4 and position.max() <= margin + extent + 1e-4
    step = position[:, 1] - position[:, 0]
    for b, prompt in enumerate(batch.prompts):
        for m, clause in enumerate(WORLD_3.parse(prompt)):
            pace = WORLD_3.speeds[clause.speed == "fast"]
            sign = -1 if clause.direction in ("left", "up") else 1
            axis = 0 if clause.direction in ("left", "right") else 1
            want = torch.zeros(2)
            want[axis] = sign * pace
            torch.testing.assert_close(step[b, m], want, atol=1e-4, rtol=0)
    # Room ahead: nothing bounces in the first three frames.
    torch.testing.assert_close(position[:, 2] - position[:, 1], step, atol=1e-4, rtol=0)
    assert scene.present.sum(1).tolist() == [len(WORLD_3.parse(p)) for p in batch.prompts]


def test_fold_reflects():
    path = torch.tensor([-1.0, 0.0, 3.0, 5.0, 6.0, 10.0, 11.0])
    torch.testing.assert_close(fold(path, 5.0), torch.tensor([1.0, 0.0, 3.0, 5.0, 4.0, 0.0, 1.0]))


def test_prompts_can_be_given():
    prompts = ["a red circle moves left", "a cyan triangle moves up fast"]
    batch = WORLD.sample(2, 4, seed=1, prompts=prompts)
    assert batch.prompts == prompts
    assert torch.equal(batch.video, WORLD.sample(2, 4, seed=1, prompts=prompts).video)
    with pytest.raises(ValueError, match="got 2, expected n = 3"):
        WORLD.sample(3, 4, prompts=prompts)


def test_later_shapes_cover_earlier_ones():
    position = torch.full((1, 2, 2), 16.0)
    args = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool)
    middle = draw(position, *args, 32, 5.0)[0, :, 16, 16]
    torch.testing.assert_close(middle, torch.tensor(PALETTE[2]))
    only = draw(position, *args[:2], torch.tensor([[True, False]]), 32, 5.0)[0]
    torch.testing.assert_close(only[:, 16, 16], torch.tensor(PALETTE[0]))
    assert (only[:, 0, 0] == BACKGROUND).all()


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_outward_is_the_gradient_of_the_signed_distance(shape):
    dx, dy = (torch.randn(200, dtype=torch.float64) * 5).requires_grad_(), torch.randn(200, dtype=torch.float64) * 5
    dy.requires_grad_()
    wanted = torch.autograd.grad(signed_distance(shape, dx, dy, 5.0).sum(), (dx, dy))
    for got, want in zip(outward(shape, dx, dy, 5.0), wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(got, dtype=torch.float64).detach(), want)


def test_images():
    video = WORLD.sample(2, 3, seed=0).video
    assert video.min() >= -1 and video.max() <= 1 and video.dtype == torch.float32 and video.is_contiguous()
    images = WORLD.to_uint8(video)
    assert images.shape == (2, 3, 32, 32, 3) and images.dtype == torch.uint8
    assert (images[1, 2, 5, 6].float() / 127.5 - 1 - video[1, :, 2, 5, 6]).abs().max() < 0.005
    assert pictures.contact_sheet(video, gap=1, zoom=2).shape == (2 * 33 * 2, 3 * 33 * 2, 3)


# metrics


@pytest.mark.parametrize(("max_shapes", "seed"), [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)])
def test_real_videos_score_one(max_shapes, seed):
    world = Shapes(max_shapes=max_shapes)
    batch = world.sample(16, 24, seed=seed)
    scores = world.score(batch.video, batch.prompts, 3)
    for name in ("quality", "semantic", "dynamic"):
        values = getattr(scores, name)
        assert values.shape == (16,) and values.dtype == torch.float32
        assert values.mean() > 0.98, (name, values)
        assert scores.per_chunk[name].shape == (16, 8)
        torch.testing.assert_close(scores.per_chunk[name].mean(1), values)
    assert all(values.mean() > 0.97 for values in scores.attributes.values()), scores.attributes


@pytest.mark.parametrize("size", [16, 48])
def test_other_sizes_score_one_too(size):
    world = Shapes(size=size)
    batch = world.sample(6, 12, seed=0)
    scores = world.score(batch.video, batch.prompts, (3, 4, 5))
    assert min(scores.quality.mean(), scores.semantic.mean(), scores.dynamic.mean()) > 0.97


def test_the_fit_finds_what_was_drawn(single):
    fit = Shapes(max_shapes=1).fit(single.video)
    scene = single.scenes
    assert fit.found.all()
    assert (fit.position - scene.positions(12)).abs().max() < 0.1
    assert (fit.colour == scene.colour[:, None]).all() and (fit.shape == scene.shape[:, None]).all()
    assert (fit.draw().transpose(1, 2) - single.video).abs().mean() < 1e-3


def test_the_fit_sorts_out_overlaps():
    batch = WORLD.sample(40, 12, seed=9)
    gap = (batch.scenes.positions(12)[:, :, 0] - batch.scenes.positions(12)[:, :, 1]).norm(dim=-1)
    overlapping = (gap < 8) & (gap > 3) & batch.scenes.present.all(1)[:, None]
    assert overlapping.sum() > 20
    fit = WORLD.fit(batch.video)
    assert fit.found[overlapping].all(-1).float().mean() > 0.97
    assert fit.quality[overlapping].mean() > 0.98
    assert (fit.colour.sort(-1).values == batch.scenes.colour[:, None].sort(-1).values)[
        overlapping
    ].float().mean() > 0.97


def test_quality_falls_with_blur_and_with_noise(batch):
    video = batch.video[:6, :, ::3]
    noise = torch.randn_like(video)
    for ladder in (
        [video, *(blurred(video, s) for s in (0.5, 1.0, 1.5, 2.0, 3.0))],
        [video + s * noise for s in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)],
        [(video - BACKGROUND) * s + BACKGROUND for s in (1.0, 0.9, 0.8, 0.65)],
    ):
        quality = torch.stack([WORLD.fit(step).quality.mean() for step in ladder])
        assert quality[0] > 0.98
        assert (quality.diff() < -0.005).all(), quality
        assert quality[-1] < 0.75


def test_nothing_and_noise_have_no_quality(batch):
    shape, prompts = batch.video.shape, batch.prompts
    for video in (torch.full(shape, BACKGROUND), torch.full(shape, -1.0), torch.full(shape, float("nan"))):
        scores = WORLD.score(video, prompts)
        assert scores.quality.max() == 0 and scores.semantic.max() == 0 and scores.dynamic.max() == 0
    assert WORLD.score(torch.randn(shape), prompts).quality.max() < 0.2
    assert WORLD.score(torch.ones(shape), prompts).quality.max() < 0.2


def test_the_fit_is_not_brittle(batch):
    dull = (0.85 * blurred(batch.video, 0.7) + 0.05 + 0.1 * torch.randn_like(batch.video)).clamp(-1, 1)
    scores = WORLD.score(dull, batch.prompts)
    assert 0.3 < scores.quality.mean() < 0.95
    assert scores.semantic.mean() > 0.95 and scores.dynamic.mean() > 0.93


@pytest.mark.parametrize(
    ("attribute", "swap"),
    [
        ("colour", cycle(COLOURS)),
        ("shape", cycle(SHAPES)),
        ("direction", {"left": "right", "right": "left", "up": "down", "down": "up"}),
        ("direction", {"left": "up", "right": "down", "up": "left", "down": "right"}),
    ],
)
def test_a_wrong_word_costs_its_attribute_only(batch, single, attribute, swap):
    if swap.get("left") == "up":  # with two shapes, another assignment may then explain the prompt as well
        batch = single
    scores = WORLD.score(batch.video, reworded(batch.prompts, swap))
    for name, values in scores.attributes.items():
        if name == attribute:
            assert values.mean() < 0.03, values
        else:
            assert values.mean() > 0.97, (name, values)
    assert 0.7 < scores.semantic.mean() < 0.85
    assert scores.dynamic.mean() > 0.97 and scores.quality.mean() > 0.98


def test_wrong_speed(batch):
    prompts = [prompt.replace(" fast", "") for prompt in batch.prompts]
    fast = torch.tensor(["fast" in prompt for prompt in batch.prompts])
    one = ~batch.scenes.present[:, 1]
    scores = WORLD.score(batch.video, prompts)
    assert (fast & one).any() and (~fast).any()
    torch.testing.assert_close(
        scores.dynamic[fast & one], torch.full_like(scores.dynamic[fast & one], 0.5), atol=0.03, rtol=0
    )
    assert scores.attributes["speed"][fast & one].max() < 0.01 and scores.dynamic[~fast].mean() > 0.98


def test_still_and_slowed_videos(single):
    world, prompts = Shapes(max_shapes=1), single.prompts
    frozen = world.score(single.video[:, :, :1].expand_as(single.video), prompts)
    assert frozen.dynamic.max() < 0.02 and frozen.attributes["direction"].max() == 0 and frozen.quality.min() > 0.97
    assert frozen.attributes["colour"].min() == 1 and frozen.semantic.max() <= 0.6 + 1e-6
    slowed = world.score(single.video[:, :, torch.arange(12) // 2], prompts, [12])
    assert (slowed.dynamic - 0.5).abs().max() < 0.12


def test_jitter_is_not_motion(single):
    shifts = torch.randint(-1, 2, (24, 2)).tolist()
    video = torch.stack([torch.roll(single.video[:, :, 0], shift, (-1, -2)) for shift in shifts], 2)
    assert Shapes(max_shapes=1).score(video, single.prompts).dynamic.mean() < 0.4


def test_missing_and_extra_shapes():
    two = ["a red circle moves left and a blue square moves up"]
    one = ["a red circle moves left"]
    shown_one = WORLD.score(WORLD.sample(1, 12, prompts=one).video, two)
    assert shown_one.attributes["count"].max() == 0
    torch.testing.assert_close(shown_one.attributes["colour"], torch.full((1, 4), 0.5))
    torch.testing.assert_close(shown_one.dynamic, torch.full((1,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(shown_one.semantic, torch.full((1,), 4 / 9), atol=0.01, rtol=0)
    shown_two = WORLD.score(WORLD.sample(1, 12, prompts=two, seed=1).video, one)
    assert shown_two.attributes["count"].max() == 0 and shown_two.attributes["colour"].min() == 1


def test_the_order_of_clauses_does_not_matter():
    batch = Shapes(min_shapes=2).sample(6, 12, seed=2)
    turned = [" and ".join(reversed(prompt.split(" and "))) for prompt in batch.prompts]
    a, b = WORLD.score(batch.video, batch.prompts), WORLD.score(batch.video, turned)
    torch.testing.assert_close(a.semantic, b.semantic)
    torch.testing.assert_close(a.dynamic, b.dynamic)


def test_chunks_are_scored_on_their_own(single):
    world = Shapes(max_shapes=1)
    video = single.video.clone()
    video[:, :, 8:10] = torch.randn_like(video[:, :, 8:10])
    clean = world.score(single.video, single.prompts, (2, 6, 2, 2)).per_chunk
    spoilt = world.score(video, single.prompts, (2, 6, 2, 2)).per_chunk
    torch.testing.assert_close(spoilt["quality"][:, [0, 1, 3]], clean["quality"][:, [0, 1, 3]])
    assert spoilt["quality"][:, 2].max() < 0.2
    torch.testing.assert_close(spoilt["semantic"][:, :2], clean["semantic"][:, :2])
    assert (spoilt["semantic"][:, 2] < clean["semantic"][:, 2] - 0.2).float().mean() > 0.9


def test_scores_do_not_depend_on_the_batch(batch):
    video = (batch.video + 0.2 * torch.randn_like(batch.video)).clamp(-1, 1)
    whole = WORLD.score(video, batch.prompts)
    part = WORLD.score(video[5:7], batch.prompts[5:7])
    for name in ("quality", "semantic", "dynamic"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[5:7], atol=1e-4, rtol=0)


def test_half_precision_videos_are_scored(batch):
    scores = WORLD.score(batch.video[:4].half(), batch.prompts[:4], 12)
    assert scores.quality.dtype == torch.float32 and scores.quality.min() > 0.97


def test_a_callers_autocast_changes_nothing(batch):
    want = WORLD.score(batch.video[:4], batch.prompts[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = WORLD.score(batch.video[:4], batch.prompts[:4])
    assert torch.equal(got.quality, want.quality) and torch.equal(got.dynamic, want.dynamic)


def test_empty_batches():
    empty = WORLD.sample(0, 6)
    assert empty.video.shape == (0, 3, 6, 32, 32) and WORLD.encode([]).shape == (0, WORLD.text_len, WORLD.text_dim)
    with pytest.raises(ValueError, match="expected at least one frame"):
        WORLD.score(empty.video, [])


def test_bad_arguments(batch):
    video, prompts = batch.video[:2], batch.prompts[:2]
    with pytest.raises(ValueError, match=r"video: got shape \(2, 3, 12, 32, 32\), expected \[1, 3, F, 32, 32\]"):
        WORLD.score(video, prompts[:1])
    with pytest.raises(ValueError, match="expected at least 2 to see motion"):
        WORLD.score(video[:, :, :1], prompts)
    with pytest.raises(ValueError, match="chunk_frames: got .*add up to 12"):
        WORLD.score(video, prompts, (3, 3))
    with pytest.raises(ValueError, match="chunk_frames: got 0"):
        WORLD.score(video, prompts, 0)
    with pytest.raises(ValueError, match="empty prompt at index 1"):
        WORLD.score(video, [prompts[0], ""])
    with pytest.raises(TypeError, match="got dtype uint8"):
        WORLD.score(video.to(torch.uint8), prompts)
    for bad in ({"size": 8}, {"max_shapes": 4}, {"max_shapes": 0}, {"min_shapes": 3}, {"text_len": 8}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Shapes(**bad)


@pytest.mark.gpu
def test_the_gpu_draws_and_scores_the_same():
    here, there = (WORLD.sample(16, 12, seed=3, device=device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.video.cpu(), here.video, atol=1e-4, rtol=0)
    a, b = WORLD.score(here.video, here.prompts), WORLD.score(there.video, there.prompts)
    for name in ("quality", "semantic", "dynamic"):
        torch.testing.assert_close(getattr(b, name).cpu(), getattr(a, name), atol=1e-2, rtol=0)
