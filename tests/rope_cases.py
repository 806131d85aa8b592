"""Arguments of qk_norm_rope, which kv_append shares, and its results held against the reference in float64."""

import torch

from raven.ops import qk_norm_rope
from raven.reference import qk_norm_rope as reference

# Unit roundoff of each dtype, and room for the float32 arithmetic before that one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

ARITHMETIC = 2e-6


def make(B=2, L=5, H=4, Hk=2, D=16, dtype=torch.float32, per_head=False, weights=True, device="cpu", frames=40):
    """Arguments of the op; positions are not in order and reach ``frames``."""
    q = torch.randn(B, L, H, D, dtype=dtype, device=device)
    k = torch.randn(B, L, Hk, D, dtype=dtype, device=device)
    dtype = torch.float32 if dtype != torch.float64 else dtype
    q_weight = torch.rand(D if per_head else H * D, dtype=dtype, device=device) + 0.5 if weights else None
    k_weight = torch.rand(D if per_head else Hk * D, dtype=dtype, device=device) + 0.5 if weights else None
    sizes = torch.tensor([frames, 30, 52])
    positions = (torch.rand(B, L, 3) * sizes).int().to(device)
    return [q, k, q_weight, k_weight, positions]


def in_double(arguments):
    return [x.detach().double() if x is not None and x.is_floating_point() else x for x in arguments]


def assert_rounded(got, want):
    """``got`` is the float64 ``want``, computed in float32 and rounded once to its own dtype."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    slack = 1.01 * ROUNDING[got.dtype] * want.abs() + ARITHMETIC * want.abs().max() + 2.0**-25
    excess = (got.double() - want).abs() - slack
    assert excess.max() <= 0, f"error above the rounding of {got.dtype} by {excess.max():.2e}"


def with_gradients(arguments, per_head=False):
    """Outputs and the gradients of every float argument, for fixed gradients of the outputs."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
    outputs = qk_norm_rope(*leaves, per_head=per_head)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, grads)), grads


def expected_with_gradients(arguments, grads, per_head=False):
    leaves = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in in_double(arguments)]
    outputs = reference.qk_norm_rope(*leaves, per_head=per_head)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, wanted, [g.double() for g in grads]))


def check_empty(shape):
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in make(**shape)]
    q, k = qk_norm_rope(*leaves)
    assert q.shape == leaves[0].shape and k.shape == leaves[1].shape
    (q.sum() + k.sum()).backward()
    assert torch.equal(leaves[2].grad, torch.zeros_like(leaves[2]))


def check_against_reference(arguments, per_head=False):
    outputs, gradients, grads = with_gradients(arguments, per_head)
    expected, expected_gradients = expected_with_gradients(arguments, grads, per_head)
    for got, want in zip(outputs + gradients, expected + expected_gradients, strict=True):
        assert_rounded(got, want)
