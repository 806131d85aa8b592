"""Arguments of gaussian_log_prob, and what holds for it on every backend."""

import math

import torch
from torch.distributions import Normal

from raven.ops import gaussian_log_prob
from raven.testing import assert_bitwise, poisoned_memory, relative_rms

# (shape, chunk_frames): no chunks, equal and ragged chunks, odd sizes, sizes beyond one piece of a kernel.
CASES = [
    ((3, 7), None),
    ((2,), None),
    ((2, 3, 4, 5), None),
    ((2, 2, 4, 3, 5), (2, 2)),
    ((2, 3, 5, 2, 4), (1, 3, 1)),
    ((1, 1, 1, 1, 1), (1,)),
    ((2, 2, 3, 61, 53), None),
    ((2, 2, 3, 61, 53), (1, 2)),
    ((2, 1, 5, 64, 40), (1, 2, 2)),
]


def draw(shape, chunk_frames=None, dtype=torch.float32, device="cpu", dtypes=None):
    dtypes = dtypes or (dtype,) * 3
    v, x_t, x_s = (torch.randn(shape, device=device).to(d).requires_grad_() for d in dtypes)
    table = shape[:1] if chunk_frames is None else (shape[0], len(chunk_frames))
    level = torch.float64 if torch.float64 in dtypes else torch.float32
    t = torch.rand(table, device=device, dtype=level)
    s = 0.2 + 0.8 * torch.rand(table, device=device, dtype=level)
    return v, x_t, x_s, t, s


def exact(v, x_t, x_s, t, s, chunk_frames, grad):
    """Value, gradients and the sum of absolute terms, in float64 by torch.distributions and autograd."""
    leaves = [x.detach().double().requires_grad_() for x in (v, x_t, x_s)]
    pieces = [leaves] if chunk_frames is None else list(zip(*(x.split(chunk_frames, 2) for x in leaves), strict=True))
    columns, sizes = [], []
    for n, (v_n, x_t_n, x_s_n) in enumerate(pieces):
        t_n, s_n = (x.double().reshape(len(v), -1)[:, n] for x in (t, s))
        t_n, s_n = (x.reshape((-1,) + (1,) * (v.dim() - 1)) for x in (t_n, s_n))
        terms = Normal((1 - s_n) * (x_t_n - t_n * v_n), s_n).log_prob(x_s_n)
        columns.append(terms.flatten(1).sum(1) if terms.dim() > 1 else terms)
        parts = ((x_s_n - (1 - s_n) * (x_t_n - t_n * v_n)) / s_n) ** 2 / 2 + s_n.log().abs() + math.log(2 * math.pi) / 2
        sizes.append(parts.flatten(1).sum(1) if parts.dim() > 1 else parts)
    value = columns[0] if chunk_frames is None else torch.stack(columns, 1)
    size = sizes[0] if chunk_frames is None else torch.stack(sizes, 1)
    return value.detach(), torch.autograd.grad(value, leaves, grad.double()), size.detach()


def check(inputs, chunk_frames, limit=1e-6, grad_limits=(1e-6,) * 3):
    v, x_t, x_s, t, s = inputs
    with poisoned_memory():
        got = gaussian_log_prob(*inputs, chunk_frames=chunk_frames)
        grad = torch.randn_like(got)
        grads = torch.autograd.grad(got, inputs[:3], grad)
    want, want_grads, size = exact(*inputs, chunk_frames, grad)
    assert got.shape == want.shape
    assert ((got.double() - want).abs() / size).max() <= limit
    for g, w, x, grad_limit in zip(grads, want_grads, inputs, grad_limits, strict=False):
        assert g.dtype == x.dtype and g.shape == x.shape
        assert relative_rms(g, w) <= grad_limit
    return got


def batch_independence(device):
    for shape, chunk_frames in (((3, 2, 3, 31, 17), None), ((3, 2, 4, 40, 20), (1, 3)), ((3, 3, 4, 32, 64), (2, 2))):
        inputs = draw(shape, chunk_frames, device=device)
        whole = gaussian_log_prob(*inputs, chunk_frames)
        grad = torch.randn_like(whole)
        (d_v,) = torch.autograd.grad(whole, inputs[0], grad)
        assert_bitwise(gaussian_log_prob(*inputs, chunk_frames), whole, "a second run")
        for b in (0, 2):
            samples = [x[b : b + 1].detach() for x in inputs]
            # The same sample at an address that is no multiple of 16 bytes.
            shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in samples]
            for one in (samples, shifted):
                one[0].requires_grad_()
                got = gaussian_log_prob(*one, chunk_frames)
                assert_bitwise(got, whole[b : b + 1], "a sample alone")
                assert_bitwise(torch.autograd.grad(got, one[0], grad[b : b + 1])[0], d_v[b : b + 1], "its gradient")


def only_wanted_gradients():
    v, x_t, x_s, t, s = draw((2, 2, 3, 4, 5))
    everything = torch.autograd.grad(gaussian_log_prob(v, x_t, x_s, t, s).sum(), (v, x_t, x_s))
    for i in range(3):
        parts = [x.detach().requires_grad_(i == j) for j, x in enumerate((v, x_t, x_s))]
        (got,) = torch.autograd.grad(gaussian_log_prob(*parts, t, s).sum(), parts[i])
        assert_bitwise(got, everything[i])


def levels_and_strides(device):
    v, x_t, x_s, t, s = draw((2, 3, 4, 6, 5), device=device)
    plain = gaussian_log_prob(v, x_t, x_s, t, s)
    assert plain.all()
    spread = [x[:, None].expand(2, 2) for x in (t, s)]
    chunks = gaussian_log_prob(v, x_t, x_s, *spread, chunk_frames=(1, 3))
    torch.testing.assert_close(chunks.sum(1), plain)
    assert_bitwise(gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames=[1, 3]), chunks, "one level per sample")
    number = gaussian_log_prob(v, x_t, x_s, 0.75, 0.5)
    assert_bitwise(gaussian_log_prob(v, x_t, x_s, torch.full_like(t, 0.75), torch.tensor(0.5)), number, "numbers")
    # Transposed storage, channels-last storage, a level that is one column of a table.
    strange = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (v, x_t)]
    table = torch.stack([t, s], dim=1)
    got = gaussian_log_prob(*strange, x_s, table[:, 0], table[:, 1])
    assert_bitwise(got, plain, "non-contiguous inputs")
    grads = torch.autograd.grad(got.mean(), strange)
    for g, w in zip(grads, torch.autograd.grad(plain.mean(), (v, x_t)), strict=True):
        assert_bitwise(g, w, "gradient of non-contiguous inputs")
        assert g.any()


def empty_inputs(device):
    for shape, chunk_frames, result in (
        ((0, 2, 3, 2, 2), None, (0,)),
        ((0, 2, 3, 2, 2), (1, 2), (0, 2)),
        ((2, 0, 3, 2, 2), (1, 2), (2, 2)),
        ((2, 0), None, (2,)),
    ):
        inputs = draw(shape, chunk_frames, device=device)
        got = gaussian_log_prob(*inputs, chunk_frames)
        assert got.shape == result and (got == 0).all()
        assert [g.shape for g in torch.autograd.grad(got.sum(), inputs[:3])] == [torch.Size(shape)] * 3
