"""Linear layers in float8: the product of what was rounded, a whole model with them, and what they refuse."""

import copy

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model
from torch import nn

import raven
from raven import backends
from raven.models import WanConfig
from raven.models.fp8 import Float8Linear, Float8MLP, quantize_linears
from raven.ops import quantize_rows
from raven.stream import Stream
from raven.testing import relative_rms

FLOAT8 = torch.float8_e4m3fn


def make_linear(inputs=48, outputs=32, bias=True, dtype=torch.float32, device="cpu"):
    linear = nn.Linear(inputs, outputs, bias, device=device).requires_grad_(False)
    linear.weight *= torch.logspace(-2, 2, outputs, device=device)[:, None]  # rows of very different size
    return linear.to(dtype)


def exact_product(x, linear, gelu=False):
    """What float8 leaves of input and weight, multiplied in float64."""
    (x, x_scale), (weight, scale) = quantize_rows(x, gelu), quantize_rows(linear.weight)
    bias = None if linear.bias is None else linear.bias.double()
    x, weight = x.double() * x_scale.double().unsqueeze(-1), weight.double() * scale.double().unsqueeze(-1)
    return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)]
)
def test_product(dtype, limit, bias):
    linear = make_linear(bias=bias, dtype=dtype)
    x = torch.randn(2, 3, 48, dtype=dtype)
    got = Float8Linear(linear)(x)
    assert got.shape == (2, 3, 32) and got.dtype == dtype
    assert relative_rms(got, exact_product(x, linear)) <= limit
    error = relative_rms(got, linear(x))
    assert 1e-3 < error < 0.06  # three mantissa bits on either side


def test_mlp():
    up, down = make_linear(32, 64), make_linear(64, 32)
    x = torch.randn(2, 5, 32)
    got = Float8MLP(up, down)(x)
    assert relative_rms(got, exact_product(Float8Linear(up)(x), down, gelu=True)) <= 1e-6


def test_half_the_memory():
    linear = make_linear(256, 256, dtype=torch.bfloat16)
    layer = Float8Linear(linear)
    assert layer.nbytes == 256 * 256 + 4 * 256 + 2 * 256
    assert not list(layer.parameters()) and not linear.weight.data_ptr() == layer.weight.data_ptr()


def test_autocast_decides_the_dtype():
    layer = Float8Linear(make_linear())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 48)).dtype == torch.bfloat16


def float8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def test_swaps_the_large_layers_of_the_blocks():
    model = tiny_model()
    assert quantize_linears(model) is model
    inside = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
    assert float8_names(model) == {f"blocks.{i}.{name}" for i in range(CONFIG.num_layers) for name in inside}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_parts_and_blocks_of_choice():
    model = quantize_linears(tiny_model(), parts=("ffn",), skip_blocks=(0,))
    assert float8_names(model) == {f"blocks.{i}.ffn.{n}" for i in (1, 2) for n in "02"}


def test_a_model_changes_little():
    plain = tiny_model()
    changed = quantize_linears(copy.deepcopy(plain))
    x, _, t, context = tiny_inputs(3)
    with torch.no_grad():
        want, got = plain(x, t, context), changed(x, t, context)
    assert 1e-4 < relative_rms(got, want) < 0.06
    halves = quantize_linears(copy.deepcopy(plain).to(torch.bfloat16))
    with torch.no_grad():
        assert relative_rms(halves(x, t, context), got) < 0.03  # the same weights: bfloat16 rounds finer than float8


@torch.no_grad()
def test_streams_with_a_float8_cache():
    context = tiny_inputs(2)[3]
    videos = []
    for float8 in (False, True):
        model = tiny_model()
        if float8:
            quantize_linears(model)
        stream = Stream(
            model, context, (4, 4, 4), 2, max_frames=4, cache_dtype=FLOAT8 if float8 else None,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        videos.append(torch.cat(list(stream.generate(levels=[1.0, 0.5])), dim=2))
        assert stream.cache.k[0].dtype == (FLOAT8 if float8 else torch.float32)
    assert 1e-4 < relative_rms(videos[1], videos[0]) < 0.1


def test_moving_keeps_float8():
    model = quantize_linears(tiny_model())
    layer = model.blocks[0].self_attn.qkv
    before = layer.weight.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == FLOAT8 and layer.scale.dtype == torch.float32
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    model.to("meta", torch.float32)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", FLOAT8)


def test_cannot_be_trained():
    model = quantize_linears(tiny_model())
    with pytest.raises(ValueError, match=r"mode: got True, expected False: float8 layers.*cannot be trained"):
        model.train()
    layer = Float8Linear(make_linear())
    with pytest.raises(ValueError, match=r"x: got requires_grad=True.*no_grad"):
        layer(torch.randn(2, 48, requires_grad=True))
    with torch.no_grad():
        assert layer(torch.randn(2, 48, requires_grad=True)).shape == (2, 32)


def test_is_not_saved_without_its_scales():
    with pytest.raises(RuntimeError, match=r"blocks.0.self_attn.qkv: float8 layers are made in memory and not saved"):
        quantize_linears(tiny_model()).state_dict()


def test_loads_nothing_rather_than_half():
    """A cast to float8 without a scale would be a wrong weight, and the layers before it would have been replaced."""
    model = quantize_linears(tiny_model())
    kept = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    for state in (tiny_model(seed=3).state_dict(), {}):
        for strict in (True, False):
            with pytest.raises(ValueError, match="state_dict: got weights for a CausalWan in float8.*quantize_linears"):
                model.load_state_dict(state, strict=strict)
    layer = model.blocks[0].cross_attn.q
    for state in (make_linear(64, 64).state_dict(), {"weight": torch.zeros(3, 64), "bias": torch.zeros(64)}):
        with pytest.raises(ValueError, match="got weights for a Float8Linear"):
            layer.load_state_dict(state)
    with pytest.raises(ValueError, match="0.self_attn.qkv: got weights for a Float8Linear"):
        model.blocks.load_state_dict({})
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in kept.items())


def test_refuses_and_leaves_the_model_as_it_was():
    odd = tiny_model(config=WanConfig(**{**vars(CONFIG), "ffn_dim": 40}))
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0: got a layer from 64 to 40 channels.*multiples of 16"):
        quantize_linears(odd)
    model = tiny_model()
    with pytest.raises(ValueError, match=r"parts: got head, expected some of self_attn, cross_attn, ffn"):
        quantize_linears(model, parts=("ffn", "head"))
    with pytest.raises(TypeError, match="model: got Linear, expected a CausalWan"):
        quantize_linears(make_linear())
    with pytest.raises(ValueError, match="skip_blocks: got 3, expected 0 to 2"):
        quantize_linears(model, skip_blocks=(3,))
    assert not float8_names(odd) and not float8_names(model)
    assert odd.training and all(p.requires_grad for p in odd.parameters())
    quantize_linears(model)
    with pytest.raises(ValueError, match="model: got one with float8 layers already"):
        quantize_linears(model)


def test_names_the_width_it_takes():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 32\), expected \[..., 48\]"):
        Float8Linear(make_linear())(torch.randn(2, 32))


def test_says_which_gpu_it_needs(monkeypatch):
    from raven.models.fp8 import _check_device

    monkeypatch.setattr(backends, "capability", lambda index: (8, 6))
    with pytest.raises(raven.BackendUnavailableError, match=r"compute capability \(8, 6\), expected at least \(8, 9\)"):
        _check_device(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4680, 1536, 4608), (2, 7, 8960, 1536), (1, 1, 48, 64), (1, 0, 48, 64)], ids=str)
def test_gpu(shape, dtype, bias):
    batch, tokens, inputs, outputs = shape
    linear = make_linear(inputs, outputs, bias, dtype, "cuda")
    x = torch.randn(batch, tokens, inputs, device="cuda", dtype=dtype)
    got = Float8Linear(linear)(x)
    assert got.shape == (batch, tokens, outputs) and got.dtype == dtype
    assert relative_rms(got, exact_product(x, linear)) <= 4e-3


@pytest.mark.gpu
def test_gpu_model_and_reference_agree():
    """The same float8 numbers, multiplied by the GPU's float8 units or scaled back and multiplied in float32."""
    model = quantize_linears(tiny_model(torch.bfloat16).cuda())
    x, _, t, context = (v.cuda() if isinstance(v, torch.Tensor) else [p.cuda() for p in v] for v in tiny_inputs(3))
    with torch.no_grad():
        got = model(x, t, context)
        raven.set_backend("reference")
        try:
            want = model(x, t, context)
        finally:
            raven.set_backend(None)
    assert relative_rms(got, want) < 0.03


@pytest.mark.gpu
def test_gpu_graph():
    layer = Float8Linear(make_linear(1536, 1536, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(1, 4680, 1536, device="cuda", dtype=torch.bfloat16)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.normal_()
    graph.replay()
    assert torch.equal(out, layer(x))
