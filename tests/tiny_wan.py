"""A Wan transformer of a few thousand parameters, and inputs for it, shared by the model tests."""

import torch

from raven.models import CausalWan, WanConfig

CONFIG = WanConfig(
    dim=64,
    ffn_dim=48,
    num_heads=2,
    num_layers=3,
    in_dim=4,
    out_dim=4,
    freq_dim=16,
    text_dim=12,
    text_len=5,
)


def tiny_model(dtype=torch.float32, config=CONFIG, seed=0):
    """Random weights everywhere: Wan starts with a zero head, under which every forward would be equal."""
    torch.manual_seed(seed)
    model = CausalWan(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
        model.head.head.weight.normal_(std=0.3)
    return model.to(dtype)


def tiny_inputs(frames, dtype=torch.float32, batch=2, channels=4, size=4, seed=1):
    """(x_t, x_0, t [B], context): latents of ``size`` x ``size``, and prompts of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    x_t, x_0 = torch.randn(2, batch, channels, frames, size, size, generator=generator, dtype=dtype)
    t = torch.linspace(0.4, 0.9, batch, dtype=dtype)
    context = [torch.randn(2 + i % 4, CONFIG.text_dim, generator=generator, dtype=dtype) for i in range(batch)]
    return x_t, x_0, t, context
