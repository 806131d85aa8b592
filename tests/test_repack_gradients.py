"""Gradients of the repacked forward: into the history, as slopes, and with checkpointing."""

import pytest
import torch
from tiny_wan import CONFIG, tiny_inputs, tiny_model

from raven.layout import ChunkLayout
from raven.models import mlp
from raven.reference import chunk_attention as reference
from raven.repack import repacked_forward


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_into_the_history(detach):
    """From the last chunk's velocity to the clean keys, values and embedded tokens of the chunks before it."""
    sizes = (1, 2, 2)
    model = tiny_model(torch.float64)
    x_t, x_0, t, context = tiny_inputs(5, torch.float64)
    x_0.requires_grad_()
    kept = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = output

        return hook

    for i, block in enumerate(model.blocks):
        block.self_attn.qkv.register_forward_hook(keep(f"qkv{i}"))
    embed = model.embed

    def embed_and_keep(patches):
        kept["tokens"] = embed(patches)
        kept["tokens"].retain_grad()
        return kept["tokens"]

    model.embed = embed_and_keep
    v = repacked_forward(model, x_t, x_0, t, context, sizes, detach_history=detach)
    v[:, :, 3:].square().sum().backward()
    assert x_0.grad is None, "the clean end points are constants"
    # Four tokens a frame; packed: noisy 0, clean 0, noisy 1, clean 1, noisy 2.
    segments = dict(zip(("z0", "x0", "z1", "x1", "z2"), ((0, 4), (4, 8), (8, 16), (16, 24), (24, 32)), strict=True))
    grads = {"tokens": kept.pop("tokens").grad}
    assert set(kept) == {"qkv0", "qkv1", "qkv2"}
    for name, tensor in kept.items():
        _, grads["k" + name], grads["v" + name] = tensor.grad.chunk(3, dim=-1)
    for grad in grads.values():
        reached = {name: bool((grad[:, a:b] != 0).any()) for name, (a, b) in segments.items()}
        assert reached == {"z0": False, "x0": not detach, "z1": False, "x1": not detach, "z2": True}


@pytest.mark.parametrize("order", ["interleaved", "clean_first"])
def test_gradient_is_the_slope(order):
    """Directional derivative over all weights, through the history as well, against a central difference."""
    sizes = (1, 2, 2)
    model = tiny_model(torch.float64)
    x_t, x_0, t, context = tiny_inputs(5, torch.float64)
    weights = list(model.parameters())
    directions = [torch.randn_like(w) * w.abs().mean() for w in weights]

    def loss():
        return repacked_forward(model, x_t, x_0, t, context, sizes, 0, 1, order)[:, :, 3:].square().mean()

    grads = torch.autograd.grad(loss(), weights)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    step, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for w, d in zip(weights, directions, strict=True):
                w.add_(d, alpha=sign * step)
            values.append(loss())
    assert slope.abs() > 1e-3
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_checkpointing_changes_nothing(detach, autocast, monkeypatch):
    """Neither the velocity nor a gradient; and how often the self-attention of a block runs forward in each mode."""
    model = tiny_model()
    x_t, x_0, t, context = tiny_inputs(6)
    x_t.requires_grad_()
    forward, runs = reference.chunk_attention_forward, []

    def counted(q, k, v, *rest):
        runs.append(k.shape[1])
        return forward(q, k, v, *rest)

    monkeypatch.setattr(reference, "chunk_attention_forward", counted)
    results, counts = [], {}
    for mode in ("none", "selective", "full"):
        model.gradient_checkpointing = mode
        model.zero_grad()
        x_t.grad = None
        runs.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            v = repacked_forward(model, x_t, x_0, t, context, 2, detach_history=detach)
            v.square().sum().backward()  # inside, where autocast's cache of casts still lives
        counts[mode] = runs.count(40) / CONFIG.num_layers  # keys of the row: 3 noisy and 2 clean chunks of 8 tokens
        results.append([v, x_t.grad, *(w.grad.clone() for w in model.parameters())])
    assert counts == {"none": 1, "selective": 1, "full": 2}
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(g.abs().max() > 0 for g in results[0]), "every parameter, text and last layer included, is trained"


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_a_recomputation_without_the_output_of_the_mlp(sizes, dtype, tolerance, monkeypatch):
    """Long segments: gradients follow from products by segment. Under autocast too, where bfloat16 is meant."""
    autocast = dtype == torch.bfloat16
    model = tiny_model(torch.float32 if autocast else dtype)
    x_t, x_0, t, context = tiny_inputs(6, torch.float64 if dtype == torch.float64 else torch.float32)
    x_t.requires_grad_()
    grads = []
    monkeypatch.setattr(mlp, "GROUP", 2)
    for mode, segment in (("none", mlp.SEGMENT), ("full", 1)):
        monkeypatch.setattr(mlp, "SEGMENT", segment)
        model.gradient_checkpointing = mode
        model.zero_grad()
        x_t.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            v = repacked_forward(model, x_t, x_0, t, context, sizes)
        v.square().sum().backward()
        grads.append([x_t.grad, *(w.grad.clone() for w in model.parameters())])
    for got, want in zip(*reversed(grads), strict=True):
        assert (got - want).norm() <= tolerance * want.norm()
    assert not all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), "it is another way of computing them"


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("segment", [mlp.SEGMENT, 1])
def test_checkpointing_trains_what_is_trainable(mode, segment, monkeypatch):
    """Some weights frozen, gradients asked for by name, a text that is trained: as without checkpointing."""
    monkeypatch.setattr(mlp, "SEGMENT", segment)
    x_t, x_0, t, context = tiny_inputs(4, torch.float64)
    grads = []
    for chosen in ("none", mode):
        model = tiny_model(torch.float64)
        model.requires_grad_(False)
        wanted = [model.blocks[1].ffn[0].weight, model.blocks[2].self_attn.o.bias]
        for weight in wanted:
            weight.requires_grad_()
        model.gradient_checkpointing = chosen
        text = model.encode_text(context)
        keys = [k.requires_grad_() for k in text.k]
        loss = repacked_forward(model, x_t, x_0, t, text, 2).square().sum()
        grads.append(torch.autograd.grad(loss, [*wanted, *keys]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


def test_checkpointing_needs_no_gradient():
    model = tiny_model().requires_grad_(False)
    x_t, x_0, t, context = tiny_inputs(4)
    want = repacked_forward(model, x_t, x_0, t, context, 2)
    model.gradient_checkpointing = "selective"
    assert torch.equal(repacked_forward(model, x_t, x_0, t, context, 2), want)


def test_gradient_checkpointing_modes():
    model = tiny_model()
    assert model.gradient_checkpointing == "none"
    for value, mode in ((True, "full"), (False, "none"), ("selective", "selective")):
        model.gradient_checkpointing = value
        assert model.gradient_checkpointing == mode
    for wrong in ("some", None, 1):
        with pytest.raises(ValueError, match="gradient_checkpointing: got .*expected one of none, selective, full"):
            model.gradient_checkpointing = wrong


@pytest.mark.gpu
def test_training_step_on_a_gpu_matches_the_cpu():
    x_t, x_0, t, context = tiny_inputs(5, size=12)
    grads = []
    for device in ("cpu", "cuda"):
        model = tiny_model().to(device)
        inputs = (x_t.to(device), x_0.to(device), t.to(device), [c.to(device) for c in context])
        repacked_forward(model, *inputs, (1, 2, 2)).square().mean().backward()
        grads.append(torch.cat([w.grad.flatten().cpu() for w in model.parameters()]))
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 1e-3


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_refuses_weights_that_were_swapped(mode):
    model = tiny_model()
    model.gradient_checkpointing = mode
    x_t, x_0, t, context = tiny_inputs(4)
    other = {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}
    layout = ChunkLayout.repacked((2, 2), 4)
    v = torch.func.functional_call(model, other, (x_t, t, context, layout), {"x_0": x_0})
    with pytest.raises(RuntimeError, match="gradient_checkpointing: .*functional_call"):
        v.sum().backward()
