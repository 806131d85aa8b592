"""The repacked forward: equal to the cached one, chunk by chunk."""

from dataclasses import replace

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.layout import ChunkLayout
from raven.repack import bidirectional_forward, blockwise_forward, repacked_forward, split_frames
from raven.stream import Stream

# (chunk sizes, sink, window)
HISTORIES = [
    pytest.param((2, 2, 2), 0, None, id="full"),
    pytest.param((2, 2, 2, 2, 2), 1, 1, id="sink-window"),
    pytest.param((1, 1, 1, 1, 1), 0, 2, id="frame-wise"),
    pytest.param((1, 3, 3), 0, None, id="ragged-first"),
    pytest.param((1, 2, 3, 1), 2, 0, id="ragged-sink-only"),
]


def cached_forward(model, x_t, x_0, t, context, sizes, sink, window):
    """Chunk by chunk, as at inference, with a wrong guess before every velocity that must leave no trace."""
    stream = Stream(model, context, (x_t.shape[1], *x_t.shape[3:]), sizes, sink, window)
    out = []
    for noisy, clean in zip(x_t.split(sizes, dim=2), x_0.split(sizes, dim=2), strict=True):
        stream.velocity(torch.full_like(noisy, 7.0), 1.0)
        out.append(stream.velocity(noisy, t))
        stream.commit(clean)
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("sizes, sink, window", HISTORIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_repacked_equals_cached(sizes, sink, window, dtype, tolerance):
    model = tiny_model(dtype)
    x_t, x_0, t, context = tiny_inputs(sum(sizes), dtype)
    want = cached_forward(model, x_t, x_0, t, context, sizes, sink, window)
    for order in ("interleaved", "clean_first"):
        got = repacked_forward(model, x_t, x_0, t, context, sizes, sink, window, order=order)
        assert got.dtype == dtype
        assert (got - want).abs().max() < tolerance
    assert want.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_repacked_equals_cached_in_low_precision(dtype):
    sizes = (2, 2, 2)
    exact = tiny_model()
    x_t, x_0, t, context = tiny_inputs(6)
    want = repacked_forward(exact, x_t, x_0, t, context, sizes)
    model = tiny_model(dtype)
    with torch.no_grad():
        packed = repacked_forward(model, x_t, x_0, t, context, sizes)
    cached = cached_forward(model, x_t, x_0, t, context, sizes, 0, None)
    assert packed.dtype == torch.float32, "the velocity has the dtype of the state, whatever the weights are"
    error = (packed - want).norm() / want.norm()
    assert error < 3e-2
    assert (packed - cached).norm() / want.norm() < error, "both ways are closer to each other than to the truth"


def test_history_matters_and_the_last_clean_chunk_does_not():
    sizes = (2, 2, 2)
    model = tiny_model()
    x_t, x_0, t, context = tiny_inputs(6)
    base = repacked_forward(model, x_t, x_0, t, context, sizes)
    for frames, changed in ((slice(0, 2), [False, True, True]), (slice(4, 6), [False, False, False])):
        other = x_0.clone()
        other[:, :, frames] += 1
        v = repacked_forward(model, x_t, other, t, context, sizes)
        assert [bool((a != b).any()) for a, b in zip(v.split(2, 2), base.split(2, 2), strict=True)] == changed
    other = x_t.clone()
    other[:, :, 0:2] += 1
    v = repacked_forward(model, other, x_0, t, context, sizes)
    assert (v[:, :, 2:] == base[:, :, 2:]).all(), "a noisy chunk is a key for nobody else"


def test_teacher_forcing_layout_is_the_same_forward():
    sizes = (1, 2, 2)
    model = tiny_model(torch.float64)
    x_t, x_0, t, context = tiny_inputs(5, torch.float64)
    want = repacked_forward(model, x_t, x_0, t, context, sizes, 1, 1)
    got = model(x_t, t, context, ChunkLayout.teacher_forcing(sizes, 4, 1, 1), x_0=x_0)
    assert (got - want).abs().max() < 1e-12


def test_one_level_a_chunk():
    sizes = (2, 1, 3)
    model = tiny_model()
    x_t, x_0, _, context = tiny_inputs(6)
    levels = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.8, 1.0]])
    v = repacked_forward(model, x_t, x_0, levels, context, sizes)
    for chunk, frames in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        alone = repacked_forward(model, x_t, x_0, levels[:, chunk], context, sizes)
        torch.testing.assert_close(v[:, :, frames], alone[:, :, frames], atol=1e-5, rtol=1e-5)


def test_autocast_trains_float32_weights():
    model = tiny_model()
    x_t, x_0, t, context = tiny_inputs(6)
    want = repacked_forward(model, x_t, x_0, t, context, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = repacked_forward(model, x_t, x_0, t, context, 2)
        cached = cached_forward(model, x_t, x_0, t, context, (2, 2, 2), 0, None)
    v.square().sum().backward()
    assert v.dtype == torch.float32 and model.blocks[0].self_attn.qkv.weight.grad.dtype == torch.float32
    error = (v - want).norm() / want.norm()
    assert 0 < error < 3e-2
    assert (cached - v).norm() / want.norm() < error


def test_wrapped_models_are_called_through_their_wrapper():
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel: the forward is reached by calling the wrapper
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = tiny_model()
    x_t, x_0, t, context = tiny_inputs(4)
    wrapper = Wrapper(model)
    got = repacked_forward(wrapper, x_t, x_0, t, context, 2)
    assert wrapper.calls == 1 and torch.equal(got, repacked_forward(model, x_t, x_0, t, context, 2))


def test_samples_are_independent():
    model = tiny_model(torch.float64)
    x_t, x_0, t, context = tiny_inputs(4, torch.float64, batch=3)
    together = repacked_forward(model, x_t, x_0, t, context, 2)
    for i in range(3):
        alone = repacked_forward(model, x_t[i : i + 1], x_0[i : i + 1], t[i : i + 1], context[i : i + 1], 2)
        assert (alone - together[i : i + 1]).abs().max() < 1e-12


def test_blockwise_sees_noisy_history_within_its_local_frames():
    model = tiny_model()
    x_t, _, _, context = tiny_inputs(6)
    t = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.8, 1.0]])
    base = blockwise_forward(model, x_t, t, context, 2)
    local = blockwise_forward(model, x_t, t, context, 2, local_frames=3)
    other = x_t.clone()
    other[:, :, 0] += 1
    moved = (blockwise_forward(model, other, t, context, 2) - base).abs().amax(dim=(0, 1, 3, 4))
    assert (moved > 0).all(), "the first frame is a key for everyone after it"
    first_chunk = bidirectional_forward(model, x_t[:, :, :2], t[:, 0], context)
    torch.testing.assert_close(base[:, :, :2], first_chunk, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(local[:, :, :2], first_chunk, atol=1e-5, rtol=1e-5)
    assert (local[:, :, 2:] != base[:, :, 2:]).any()


def test_one_chunk_is_bidirectional():
    model = tiny_model()
    x_t, x_0, t, context = tiny_inputs(3)
    whole = bidirectional_forward(model, x_t, t, context)
    torch.testing.assert_close(repacked_forward(model, x_t, x_0, t, context, 3), whole, atol=0, rtol=0)


@pytest.mark.parametrize("patch, size", [((1, 4, 4), 8), ((1, 1, 2), 4), ((1, 2, 1), 2)])
def test_other_patches(patch, size):
    model = tiny_model(torch.float64, replace(CONFIG, patch_size=patch, in_dim=3, out_dim=3))
    x_t, x_0, t, context = tiny_inputs(3, torch.float64, channels=3, size=size)
    got = repacked_forward(model, x_t, x_0, t, context, 1)
    want = cached_forward(model, x_t, x_0, t, context, (1, 1, 1), 0, None)
    assert got.shape == x_t.shape
    assert (got - want).abs().max() < 1e-12


def test_split_frames():
    assert split_frames(6, 3) == (3, 3)
    assert split_frames(7, [1, 3, 3]) == (1, 3, 3)
    for wrong in (4, 0, [3, 2], [6, 0], []):
        with pytest.raises(ValueError, match="chunk_frames"):
            split_frames(6, wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_frames": [2, 2]}, "chunk_frames: got .* sum to the 6 frames"),
        ({"t": torch.tensor([0.5, 1.5])}, "t: got noise level 1.5"),
        ({"t": -0.1}, "t: got noise level -0.1"),
        ({"t": torch.tensor([0.5, float("nan")])}, "t: got noise level nan"),
        ({"t": torch.rand(3)}, "t: got shape"),
        ({"t": torch.rand(2, 2)}, "t: got shape"),
        ({"x_t": torch.zeros(2, 4, 6, 4, 5)}, "x_t: got a latent of 4x5"),
        ({"x_t": torch.zeros(2, 3, 6, 4, 4)}, "x: got shape"),
        ({"x_t": torch.zeros(4, 6, 4, 4)}, "x_t: got shape"),
        ({"x_0": torch.zeros(2, 4, 4, 4, 4)}, "x_0: got shape"),
        ({"x_0": None}, "x_0: got None"),
        ({"context": [torch.zeros(6, 12)] * 2}, "context.0.: got 6 rows, expected at most text_len = 5"),
        ({"context": [torch.zeros(3, 11)] * 2}, "context.0.: got shape"),
        ({"context": [torch.zeros(3, 12)]}, "context: got 1 prompts"),
        ({"context": []}, "context: got no prompt"),
        ({"order": "sorted"}, "order: got 'sorted'"),
        ({"sink": -1}, "sink"),
    ],
)
def test_bad_input(change, message):
    x_t, x_0, t, context = tiny_inputs(6)
    arguments = {"x_t": x_t, "x_0": x_0, "t": t, "context": context, "chunk_frames": 2, **change}
    with pytest.raises(ValueError, match=message):
        repacked_forward(tiny_model(), **arguments)


def test_latents_must_be_floating_point():
    x_t, x_0, t, context = tiny_inputs(6)
    with pytest.raises(TypeError, match="x: got dtype int64, expected float32"):
        repacked_forward(tiny_model(), x_t.long(), x_0, t, context, 2)
    with pytest.raises(TypeError, match="x_0: got dtype int64, expected float32"):
        repacked_forward(tiny_model(), x_t, x_0.long(), t, context, 2)
    with pytest.raises(ValueError, match="x: got device meta, expected cpu like the model"):
        repacked_forward(tiny_model(), x_t.to("meta"), x_0, t, context, 2)


def test_text_must_be_encoded():
    x_t, x_0, t, _ = tiny_inputs(6)
    with pytest.raises(TypeError, match="context: got NoneType, expected encoded prompts"):
        repacked_forward(tiny_model(), x_t, x_0, t, None, 2)
    with pytest.raises(TypeError, match="context.0.: got str, expected an encoded prompt"):
        repacked_forward(tiny_model(), x_t, x_0, t, ["a red circle"] * 2, 2)
    with pytest.raises(TypeError, match="model: got Linear, expected a CausalWan"):
        repacked_forward(torch.nn.Linear(1, 1), x_t, x_0, t, [], 2)


@pytest.mark.interpret
def test_repacked_equals_cached_on_triton_kernels(triton_backend):
    model = tiny_model(config=replace(CONFIG, num_layers=2))
    x_t, x_0, t, context = tiny_inputs(2, batch=1)
    with torch.no_grad():
        packed = repacked_forward(model, x_t, x_0, t, context, 1)
    stream = Stream(model, context, (4, 4, 4), (1, 1))
    stream.commit(x_0[:, :, :1])
    assert (packed[:, :, 1:] - stream.velocity(x_t[:, :, 1:], t)).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("sizes, sink, window", HISTORIES)
def test_repacked_equals_cached_on_a_gpu(sizes, sink, window):
    x_t, x_0, t, context = tiny_inputs(sum(sizes), size=12)
    exact = repacked_forward(tiny_model(), x_t, x_0, t, context, sizes, sink, window)
    arguments = [x_t.cuda(), x_0.cuda(), t.cuda(), [c.cuda() for c in context], sizes, sink, window]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model = tiny_model(dtype).cuda()
        with torch.no_grad():
            packed = repacked_forward(model, *arguments)
        cached = cached_forward(model, *arguments)
        assert (packed - cached).norm() / exact.norm() < tolerance
        assert (packed.cpu() - exact).norm() / exact.norm() < max(tolerance, 1e-4)
