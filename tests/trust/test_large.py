"""More than 2^31 elements in a tensor, and in its gradients."""

import pytest
import torch

import raven
from raven.ops import chunk_attention
from raven.reference.chunk_attention import dense_attention
from raven.spans import Spans
from raven.testing import relative_rms, tolerance

HEADS, DIM = 16, 128
LENGTH = 2**31 // (HEADS * DIM) + 3000


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    """Queries and keys at both ends see each other; both backends in turn, so that only one holds the memory."""
    needed = 12 * LENGTH * HEADS * DIM * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    L = LENGTH
    q, k = (torch.randn(1, L, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31
    spans = Spans.build([((0, 100), [(L - 300, L)]), ((L - 200, L), [(0, 130), (L - 77, L)])])
    rows = torch.cat([torch.arange(100), torch.arange(L - 200, L)]).cuda()
    keys = torch.cat([torch.arange(130), torch.arange(L - 300, L)]).cuda()
    mask = torch.zeros(300, 430, dtype=torch.bool, device="cuda")
    mask[:100, 130:] = mask[100:, :130] = mask[100:, -77:] = True
    leaves = [x.double().requires_grad_() for x in (q[:, rows], k[:, keys], k[:, keys])]
    want, _ = dense_attention(*leaves, mask, DIM**-0.5)
    wanted = torch.autograd.grad(want, leaves, q[:, rows].double())
    ran = 0
    try:
        for backend in ("cuda", "triton"):
            if raven.explain("chunk_attention", q, k, k).reasons[backend] is not None:
                continue
            raven.set_backend(backend)
            check(q, k, spans, rows, keys, want, wanted)
            ran += 1
    finally:
        raven.set_backend(None)
        torch.cuda.empty_cache()
    assert ran, "no compiled backend takes these tensors"


def check(q, k, spans, rows, keys, want, wanted):
    inputs = [x.detach().requires_grad_() for x in (q, k, k)]
    out = chunk_attention(*inputs, spans)
    assert relative_rms(out[:, rows], want) <= tolerance(torch.bfloat16).rms
    assert not out[:, 100:-200].any(), "queries without keys"
    grads = torch.autograd.grad(out, inputs, q)
    del out
    for name, grad, index, wish in zip(("dq", "dk", "dv"), grads, (rows, keys, keys), wanted, strict=True):
        assert relative_rms(grad[:, index], wish) <= tolerance(torch.bfloat16, "backward").rms, name
    assert not grads[0][:, 100:-200].any() and not grads[1][:, 130:-300].any() and not grads[2][:, 130:-300].any()
