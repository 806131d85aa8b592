"""The Wan transformer: the numbers of diffusers' own, its config, its text, its time levels."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raven.cache import KVCache
from raven.checkpoint import normalize_state_dict
from raven.models import CausalWan, TextCache, WanConfig, layers
from raven.models.mlp import Mlp
from raven.repack import bidirectional_forward, repacked_forward


@pytest.fixture(scope="module")
def diffusers_pair():
    """A random transformer of diffusers, and ours with its weights."""
    transformer = pytest.importorskip("diffusers").WanTransformer3DModel
    torch.manual_seed(3)
    theirs = transformer(
        patch_size=CONFIG.patch_size,
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_dim,
        out_channels=CONFIG.out_dim,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    ).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    found = normalize_state_dict(theirs.state_dict(), CONFIG)
    found.require_complete()
    ours = CausalWan(CONFIG)
    ours.load_state_dict(found.state)
    return theirs, ours


@pytest.mark.parametrize("frames, height, width", [(1, 4, 4), (5, 4, 6), (2, 2, 8)])
@torch.no_grad()
def test_equals_diffusers(diffusers_pair, frames, height, width):
    theirs, ours = diffusers_pair
    x = torch.randn(2, CONFIG.in_dim, frames, height, width)
    text = torch.randn(2, CONFIG.text_len, CONFIG.text_dim)
    t = torch.tensor([0.637, 0.02])
    want = theirs(x, 1000 * t, text, return_dict=False)[0]
    assert want.std() > 0.1
    torch.testing.assert_close(bidirectional_forward(ours, x, t, text), want, atol=1e-4, rtol=1e-4)


def test_config_json_roundtrip(tmp_path):
    path = tmp_path / "config.json"
    CONFIG.to_json(path)
    assert WanConfig.from_json(path) == CONFIG
    assert json.loads(path.read_text())["patch_size"] == [1, 2, 2]


def test_wan_own_config_loads(tmp_path):
    path = tmp_path / "config.json"
    released = {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
        "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
        "text_len": 512, "window_size": [-1, -1],
    }  # fmt: skip
    path.write_text(json.dumps(released))
    assert WanConfig.from_json(path) == WanConfig.wan_1_3b()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"dim": 64, "n_head": 2}', "config key: got 'n_head'"),
        ('{"model_type": "i2v"}', "model_type: got 'i2v', expected 't2v'"),
        ('{"window_size": [7, 7]}', "window_size"),
        ("[1]", "holds a JSON list"),
        ("{", "is not a JSON file"),
        ('{"dim": 63}', "dim: got 63"),
        ('{"dim": "64"}', "dim: got '64'"),
        ('{"freq_dim": 7}', "freq_dim: got 7"),
        ('{"num_layers": 0}', "num_layers: got 0"),
        ('{"patch_size": [2, 2, 2]}', "patch_size: got"),
    ],
)
def test_bad_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        WanConfig.from_json(path)


def test_published_sizes():
    counts = []
    for config in (WanConfig.wan_1_3b(), WanConfig.wan_14b()):
        with torch.device("meta"):
            counts.append(sum(w.numel() for w in CausalWan(config).parameters()))
    assert counts == [1_418_996_800, 14_288_491_584]


def test_parameter_names():
    names = {name.removesuffix(".weight").removesuffix(".bias") for name in tiny_model().state_dict()}
    block = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    parts = ("q", "k", "v", "o", "norm_q", "norm_k")
    attention = {f"{kind}_attn.{part}" for kind in ("self", "cross") for part in parts}
    assert block == attention | {"norm3", "ffn.0", "ffn.2", "modulation"}
    assert {name for name in names if not name.startswith("blocks.")} == {
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
        "time_projection.1", "head.head", "head.modulation",
    }  # fmt: skip


def test_fused_projection_is_three_layers_in_a_state_dict():
    model = tiny_model()
    dim, attention = CONFIG.dim, model.blocks[0].self_attn
    assert attention.qkv.weight.shape == (3 * dim, dim)
    state = model.state_dict()
    order = [name.removeprefix("blocks.0.self_attn.") for name in state if name.startswith("blocks.0.self_attn.")]
    thirds = [f"{part}.{kind}" for kind in ("weight", "bias") for part in "qkv"]
    assert set(order) == {*thirds, "o.weight", "o.bias", "norm_q.weight", "norm_k.weight"}
    for i, part in enumerate("qkv"):
        rows = slice(i * dim, (i + 1) * dim)
        assert torch.equal(state[f"blocks.0.self_attn.{part}.weight"], attention.qkv.weight[rows])
        assert torch.equal(state[f"blocks.0.self_attn.{part}.bias"], attention.qkv.bias[rows])
    other = copy.deepcopy(tiny_model(seed=1))
    assert not other.load_state_dict(state).missing_keys
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert list(state) == list(model.state_dict()), "loading takes nothing out of the caller's dict"


def test_a_wrapped_projection_keeps_the_names_of_its_parts():
    """As adapters wrap a layer."""
    model = tiny_model()
    model.blocks[0].self_attn.qkv = torch.nn.Sequential(model.blocks[0].self_attn.qkv)
    state = model.state_dict()
    assert "blocks.0.self_attn.qkv.0.weight" in state and "blocks.1.self_attn.q.weight" in state
    assert not model.load_state_dict(state).missing_keys


def test_hooks_on_the_layers_of_an_mlp_are_called():
    model, seen = tiny_model(), []
    for layer in (model.blocks[0].ffn[0], model.blocks[0].ffn[2]):
        layer.register_forward_hook(lambda module, args, out: seen.append(module))
    x, _, t, context = tiny_inputs(2)
    bidirectional_forward(model, x, t, context).sum().backward()
    assert seen == [model.blocks[0].ffn[0], model.blocks[0].ffn[2]]


def test_fused_projection_says_what_does_not_fit():
    model, name = tiny_model(), "blocks.1.self_attn.k.weight"
    before = model.blocks[1].self_attn.qkv.weight.clone()
    state = tiny_model(seed=1).state_dict()
    whole = {**state}
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        model.load_state_dict(state)
    model.load_state_dict(tiny_model().state_dict())
    assert model.load_state_dict(state, strict=False).missing_keys == [name]
    q, k, v = model.blocks[1].self_attn.qkv.weight.chunk(3)
    assert torch.equal(k, before.chunk(3)[1]) and torch.equal(q, state[name.replace(".k.", ".q.")])
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}: got shape \(63, 64\), expected \(64, 64\)"):
        model.load_state_dict({**whole, name: whole[name][1:]})
    with torch.device("meta"):
        empty = CausalWan(CONFIG)
    assert empty.load_state_dict(state, strict=False, assign=True).missing_keys == [name]


def test_fused_projection_starts_as_three_layers():
    bound = (6 / (2 * CONFIG.dim)) ** 0.5  # Xavier's, of a square layer
    weights = torch.stack([block.self_attn.qkv.weight.detach() for block in CausalWan(CONFIG).blocks])
    for third in weights.chunk(3, dim=1):
        assert 0.98 * bound < third.abs().max() <= bound


def test_attention_to_the_text_in_parts(monkeypatch):
    q = torch.randn(2, 12, 2, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    want = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    g = torch.randn_like(q)
    wanted = torch.autograd.grad(want, (q, k, v), g)
    for parts in (1, 4):
        monkeypatch.setattr(layers, "_parts", lambda length, parts=parts: parts)
        got = layers._attend_all(q, k, v)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        for a, b in zip(torch.autograd.grad(got, (q, k, v), g), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length, parts", [(60840, 13), (32760, 7), (14040, 1), (16384, 4), (16411, 1), (1, 1)])
def test_how_queries_of_the_text_are_cut(length, parts):
    assert layers._parts(length) == parts


def test_mlp_gradients():
    torch.manual_seed(0)
    mlp = Mlp(6, 10).double()
    plain = torch.nn.Sequential(*mlp)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.equal(mlp(x), plain(x)) and torch.equal(mlp(x.detach()), plain(x.detach()))
    with torch.no_grad():
        assert torch.equal(mlp(x), plain(x))
    weights = list(mlp.parameters())
    g = torch.randn(2, 3, 6, dtype=torch.float64)
    got, want = (torch.autograd.grad(m(x), [x, *weights], g) for m in (mlp, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)
    for i in range(5):  # each alone, the others frozen
        tensors = [x, *weights]
        for j, tensor in enumerate(tensors):
            tensor.requires_grad_(i == j)
        (alone,) = torch.autograd.grad(mlp(x), [tensors[i]], g)
        assert torch.equal(alone, got[i])


def test_mlp_calls_layers_that_were_swapped():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = Mlp(6, 10)
    x = torch.randn(3, 6)
    want = mlp[2](torch.nn.functional.gelu(2 * mlp[0](x), approximate="tanh"))
    swapped = Doubled(6, 10)
    swapped.load_state_dict(mlp[0].state_dict())
    mlp[0] = swapped
    torch.testing.assert_close(mlp(x), want)


def test_patch_embedding_is_the_convolution():
    from raven.models.packing import patchify

    model = tiny_model(torch.float64)
    x = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64)
    want = model.patch_embedding(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.embed(patchify(x, CONFIG.patch_size)), want)


def test_time_embedding_is_the_sinusoid_of_a_thousand_levels():
    model = tiny_model(torch.float64, replace(CONFIG, freq_dim=256, dim=64))
    seen = []
    model.time_embedding[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.embed_levels(torch.tensor([[0.25, 0.938]], dtype=torch.float64))
    i = torch.arange(128, dtype=torch.float64)
    for row, level in zip(seen[0][0], (250.0, 938.0), strict=True):
        angle = level * 10000 ** (-i / 128)
        torch.testing.assert_close(row, torch.cat([angle.cos(), angle.sin()]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_float64_in_a_forward(dtype):
    """Not even for the few numbers of the time embedding, once its constants are there."""

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kinds = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.kinds.update(x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    model = tiny_model(dtype)
    x_t, x_0, t, context = tiny_inputs(2)
    cache = KVCache(CONFIG.num_layers, 2, CONFIG.num_heads, CONFIG.head_dim, 8, max_chunks=1, dtype=dtype)
    for _ in range(2):  # what the first one sees includes the constants
        with Seen() as seen:
            repacked_forward(model, x_t, x_0, t, context, 1)
            model(x_t, 0.5, context, cache=cache)
    assert dtype in seen.kinds and torch.float64 not in seen.kinds


def test_text_forms_agree():
    model = tiny_model(torch.float64)
    x, _, t, context = tiny_inputs(2, torch.float64)
    padded = torch.zeros(2, CONFIG.text_len, CONFIG.text_dim, dtype=torch.float64)
    for row, text in zip(padded, context, strict=True):
        row[: len(text)] = text
    want = bidirectional_forward(model, x, t, context)
    assert torch.equal(bidirectional_forward(model, x, t, padded), want)
    assert torch.equal(bidirectional_forward(model, x, t, padded[:, :4]), want), "missing rows are zeros"
    assert torch.equal(bidirectional_forward(model, x, t, model.encode_text(context)), want)
    longer = padded.clone()
    longer[:, -1] += 1
    assert (bidirectional_forward(model, x, t, longer) != want).any(), "the padding rows are attended to"


def test_text_cache_follows_groups():
    model = tiny_model()
    _, _, _, context = tiny_inputs(1, batch=3)
    text = model.encode_text(context)
    assert len(text) == 3 and len(text.k) == CONFIG.num_layers
    assert text.k[0].shape == (3, CONFIG.text_len, CONFIG.num_heads, CONFIG.head_dim)
    group = text.repeat_interleave(2)
    for i in range(6):
        assert torch.equal(group.v[1][i], text.v[1][i // 2])
    assert torch.equal(text[[2, 0]].k[2], text.k[2][[2, 0]])
    assert torch.equal(TextCache.cat([text[1:], text[:1]]).k[0], text.k[0][[1, 2, 0]])
    assert text.k[0].requires_grad and not text.detach().k[0].requires_grad


def test_without_norms():
    model = tiny_model(config=replace(CONFIG, qk_norm=False, cross_attn_norm=False))
    assert not any("norm" in name for name in model.state_dict())
    x, _, t, context = tiny_inputs(2)
    v = bidirectional_forward(model, x, t, context)
    assert v.shape == x.shape and v.isfinite().all()


def test_starts_at_velocity_zero():
    x, _, t, context = tiny_inputs(2)
    assert (bidirectional_forward(CausalWan(CONFIG), x, t, context) == 0).all()


def test_cached_forward_refuses_gradients_and_a_second_history():
    from raven.cache import KVCache
    from raven.layout import ChunkLayout

    model = tiny_model()
    x, x_0, t, context = tiny_inputs(1)
    cache = KVCache(CONFIG.num_layers, 2, CONFIG.num_heads, CONFIG.head_dim, 4, max_chunks=2)
    with pytest.raises(ValueError, match="cache: got gradients switched on"):
        model(x, t, context, cache=cache)
    packed = ChunkLayout.repacked((1, 1), 4)
    for other, what in (({"layout": packed}, "a layout"), ({"x_0": x_0, "write_only": True}, "x_0")):
        with pytest.raises(ValueError, match=f"cache: got {what} as well, expected only x"), torch.no_grad():
            model(x, t, context, cache=cache, **other)
    wrong = ChunkLayout.repacked((1, 1), 5)
    with pytest.raises(ValueError, match="layout: got 5 tokens per frame"):
        model(x, t, context, wrong, x_0=x_0)
    two = ChunkLayout.concat([ChunkLayout.bidirectional(1, 4)] * 2)
    with pytest.raises(ValueError, match="expected the noisy chunk at frame 1 of document 0"):
        model(x, t, context, two)
    with pytest.raises(ValueError, match="layout: got no noisy segment"):
        model(x, t, context, ChunkLayout.prefill((1,), 4), x_0=x_0)
    with pytest.raises(ValueError, match="x: got 1 frames, expected 2"):
        model(x, t, context, ChunkLayout.bidirectional(2, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 2}, r"patch_size: got 2, expected \(1, rows, columns\)"),
        ({"patch_size": (1, 2.5, 2)}, r"patch_size: got \(1, 2.5, 2\), expected"),
        ({"patch_size": "abc"}, "patch_size: got 'abc', expected"),
        ({"eps": float("nan")}, "eps: got nan, expected a small positive number"),
        ({"eps": "1e-6"}, "eps: got '1e-6', expected"),
        ({"qk_norm": "no"}, "qk_norm: got 'no', expected True or False"),
    ],
)
def test_config_of_other_kinds_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        WanConfig(**values)


@torch.no_grad()
def test_arguments_of_another_kind_are_named():
    model = tiny_model()
    x, _, t, context = tiny_inputs(2)
    text = model.encode_text(context)
    for error, message, arguments in (
        (TypeError, "t: got list, expected a noise level", {"t": [0.5, 0.5]}),
        (TypeError, r"context\[0\]: got dtype int64, expected float32", {"context": [p.long() for p in context]}),
        (TypeError, "layout: got str, expected a ChunkLayout or None", {"layout": "repacked"}),
        (ValueError, "context: got keys of 1 layers, expected 3", {"context": TextCache(text.k[:1], text.v[:1])}),
        (ValueError, "write_only: got True without a cache", {"write_only": True}),
    ):
        with pytest.raises(error, match=message):
            model(**{"x": x, "t": t, "context": context, **arguments})
    with pytest.raises(ValueError, match="caches: got none, expected at least one"):
        TextCache.cat([])
