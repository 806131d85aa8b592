"""Log-density of a consistency step: value, gradients, batch independence, bad input, each on its lane."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

import raven
from raven.backends import get_backend
from raven.errors import BackendUnavailableError
from raven.ops import gaussian_log_prob
from raven.reference.gaussian_log_prob import gaussian_log_prob as reference
from raven.testing import assert_bitwise, poisoned_memory, relative_rms

EVERY_GPU_BACKEND = True

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


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_reference_in_float64(shape, chunk_frames):
    got = check(draw(shape, chunk_frames, torch.float64), chunk_frames, 1e-14, (1e-13,) * 3)
    assert got.dtype == torch.float64


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES[-3:])
def test_reference_in_float32(shape, chunk_frames):
    assert check(draw(shape, chunk_frames), chunk_frames).dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_kernel_in_float32(shape, chunk_frames, triton_backend):
    assert check(draw(shape, chunk_frames), chunk_frames).dtype == torch.float32


@pytest.mark.interpret
def test_kernel_with_half_velocity(triton_backend):
    inputs = draw((2, 2, 3, 6, 10), (1, 2), dtypes=(torch.float16, torch.float32, torch.float16))
    check(inputs, (1, 2), 1e-6, (1e-3, 1e-6, 1e-3))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "chunk_frames"), [*CASES, ((2, 16, 21, 60, 104), (3,) * 7)])
@pytest.mark.parametrize("dtypes", ["fff", "hhh", "bbb", "hff", "bff", "hfh", "bfh", "fbb"])
def test_gpu(shape, chunk_frames, dtypes):
    dtypes = [{"f": torch.float32, "h": torch.float16, "b": torch.bfloat16}[letter] for letter in dtypes]
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
    inputs = draw(shape, chunk_frames, device="cuda", dtypes=dtypes)
    assert raven.explain("gaussian_log_prob", *inputs[:3]).chosen == (get_backend() or "cuda")
    check(inputs, chunk_frames, 1e-6, [rounding[dtype] for dtype in dtypes])


@pytest.mark.gpu
def test_gpu_velocity_alone():
    """The gradient of v alone: for float32 made by the forward, and scaled by the backward."""
    for shape, chunk_frames in (((2, 3, 4, 5), None), ((2, 16, 21, 60, 104), (3,) * 7), ((2, 3, 5, 7, 9), (1, 3, 1))):
        for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
            v, x_t, x_s, t, s = draw(shape, chunk_frames, device="cuda", dtypes=(dtype, torch.float32, torch.float32))
            velocity_alone(v, x_t.detach(), x_s.detach(), t, s, chunk_frames, limit)


def velocity_alone(v, x_t, x_s, t, s, chunk_frames, limit):
    got = gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames)
    assert_bitwise(gaussian_log_prob(v.detach(), x_t, x_s, t, s, chunk_frames), got, "without a gradient")
    leaves = [x.detach().requires_grad_() for x in (v, x_t, x_s)]
    # The graph is kept: the second backward needs what the first one got.
    for grad in (torch.randn_like(got), torch.zeros_like(got), torch.ones_like(got)):
        _, (want, *_), _ = exact(*leaves, t, s, chunk_frames, grad)
        (d_v,) = torch.autograd.grad(got, v, grad, retain_graph=True)
        assert d_v.dtype == v.dtype and relative_rms(d_v, want) <= limit
    (last,) = torch.autograd.grad(got, v, torch.ones_like(got))
    assert_bitwise(last, d_v, "the backward that frees the graph")


@pytest.mark.interpret
def test_kernel_velocity_alone(triton_backend):
    for shape, chunk_frames in (((2, 3, 4, 5), None), ((2, 3, 5, 7, 9), (1, 3, 1))):
        v, x_t, x_s, t, s = draw(shape, chunk_frames)
        velocity_alone(v, x_t.detach(), x_s.detach(), t, s, chunk_frames, 1e-6)


@pytest.mark.gpu
def test_gpu_streams_and_graphs():
    """Streams side by side, and replays beside other work, have counters of their own."""
    inputs = [draw((3, 4, 6, 40, 20), (2, 4), device="cuda") for _ in range(2)]
    want = [gaussian_log_prob(*each, (2, 4)).detach() for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    graph, held = torch.cuda.CUDAGraph(), torch.empty_like(want[0])
    with torch.no_grad():
        with torch.cuda.graph(graph):
            held.copy_(gaussian_log_prob(*inputs[0], (2, 4)))
        for _ in range(50):
            held.zero_()
            graph.replay()
            got = []
            for stream, each in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    got.append(gaussian_log_prob(*each, (2, 4)))
            torch.cuda.synchronize()
            for g, w in zip([*got, held], [*want, want[0]], strict=True):
                assert_bitwise(g, w)


@pytest.mark.gpu
def test_gpu_after_inference_mode():
    """What a first call leaves behind serves training too."""
    v, x_t, x_s, t, s = (x.detach() for x in draw((2, 3, 7, 11, 5), (2, 5), device="cuda"))
    with torch.inference_mode():
        want = gaussian_log_prob(v, x_t, x_s, t, s, (2, 5))
    got = gaussian_log_prob(v.requires_grad_(), x_t, x_s, t, s, (2, 5))
    got.sum().backward()
    assert_bitwise(got, want)
    assert v.grad.isfinite().all()


@pytest.mark.gpu
def test_gpu_graph_of_forward_and_backward():
    v, x_t, x_s, t, s = (x.detach() for x in draw((2, 4, 6, 40, 20), (2, 4), device="cuda"))
    v.requires_grad_()
    grad = torch.randn(2, 2, device="cuda")

    def both():
        value = gaussian_log_prob(v, x_t, x_s, t, s, (2, 4))
        return value, torch.autograd.grad(value, v, grad)[0]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = both()
    for seed in range(3):
        with torch.no_grad():
            v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for got, want in zip(held, both(), strict=True):
            assert_bitwise(got, want)


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


def test_same_bits_alone_or_in_a_batch():
    batch_independence("cpu")


@pytest.mark.interpret
def test_kernel_same_bits_alone_or_in_a_batch(triton_backend):
    batch_independence("cpu")


@pytest.mark.gpu
def test_gpu_same_bits_alone_or_in_a_batch():
    batch_independence("cuda")


def only_wanted_gradients():
    v, x_t, x_s, t, s = draw((2, 2, 3, 4, 5))
    everything = torch.autograd.grad(gaussian_log_prob(v, x_t, x_s, t, s).sum(), (v, x_t, x_s))
    for i in range(3):
        parts = [x.detach().requires_grad_(i == j) for j, x in enumerate((v, x_t, x_s))]
        (got,) = torch.autograd.grad(gaussian_log_prob(*parts, t, s).sum(), parts[i])
        assert_bitwise(got, everything[i])


def test_only_wanted_gradients():
    only_wanted_gradients()


@pytest.mark.interpret
def test_kernel_only_wanted_gradients(triton_backend):
    only_wanted_gradients()


def test_gradient_of_v_is_the_policy_gradient():
    """RAVEN, arXiv 2605.15190: d log pi / d v = -t (1 - s)(x_s - (1 - s) x_0) / s^2."""
    v, x_t, x_s, _, _ = draw((2, 3, 4), dtype=torch.float64)
    t, s = 0.9, 0.6
    (got,) = torch.autograd.grad(gaussian_log_prob(v, x_t, x_s, t, s).sum(), v)
    want = -t * (1 - s) * (x_s - (1 - s) * (x_t - t * v)) / s**2
    torch.testing.assert_close(got, want.detach())


def levels_and_strides(device):
    v, x_t, x_s, t, s = draw((2, 3, 4, 6, 5), device=device)
    plain = gaussian_log_prob(v, x_t, x_s, t, s)
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


def test_levels_and_strides():
    levels_and_strides("cpu")


@pytest.mark.interpret
def test_kernel_levels_and_strides(triton_backend):
    levels_and_strides("cpu")


@pytest.mark.gpu
def test_gpu_levels_and_strides():
    levels_and_strides("cuda")


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


def test_empty_inputs():
    empty_inputs("cpu")


@pytest.mark.interpret
def test_kernel_empty_inputs(triton_backend):
    empty_inputs("cpu")


@pytest.mark.gpu
def test_gpu_empty_inputs():
    empty_inputs("cuda")


@pytest.mark.parametrize(("shape", "chunk_frames"), [((3, 7), None), ((2,), None), ((2, 2, 4, 2), (1, 3))])
def test_gradcheck(shape, chunk_frames):
    v, x_t, x_s, t, s = draw(shape, chunk_frames, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: gaussian_log_prob(*x, t, s, chunk_frames), (v, x_t, x_s))


@pytest.mark.parametrize("chunk_frames", [None, (1, 2)])
def test_opcheck(chunk_frames):
    v, x_t, x_s, t, s = draw((2, 2, 3, 2, 2), chunk_frames)
    t, s = (x.reshape(2, -1) for x in (t, s))
    torch.library.opcheck(torch.ops.raven.gaussian_log_prob.default, (v, x_t, x_s, t, s, chunk_frames))
    fixed = [x.detach() for x in (v, x_t, x_s)]
    grad = torch.randn(2) if chunk_frames is None else torch.randn(2, 2)
    for needs in ((True, False, False), (True, True, True), (False, False, False)):
        arguments = (grad, *fixed, t, s, chunk_frames, *needs)
        torch.library.opcheck(torch.ops.raven.gaussian_log_prob_backward.default, arguments)


@pytest.mark.parametrize("chunk_frames", [None, (1, 2)])
def test_compiles_without_graph_breaks(chunk_frames):
    v, x_t, x_s, t, s = draw((2, 2, 3, 2, 2), chunk_frames)

    def loss(v, x_t):
        return (gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames) * 1e-2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(v, x_t), loss(v, x_t)
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x, (v, x_t)) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


def test_a_dispatch_mode_sees_the_op():
    """Nobody else does: the call goes straight to its backend, with the same result."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names, inputs = [], draw((2, 3))
    plain = gaussian_log_prob(*inputs)
    (want,) = torch.autograd.grad(plain.sum(), inputs[0])
    with Seen():
        got = gaussian_log_prob(*inputs)
    assert "raven::gaussian_log_prob" in names
    assert_bitwise(got, plain)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), inputs[0])[0], want)


def test_second_derivative_is_an_error():
    v, x_t, x_s, t, s = draw((2, 3))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(gaussian_log_prob(v, x_t, x_s, t, s).sum(), v, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"s": 0.0}, ValueError, r"s: got noise level 0.0, expected a value in \(0, 1\]"),
        ({"s": torch.tensor([0.5, 0.0])}, ValueError, r"s: got noise level 0.0"),
        ({"s": 1.25}, ValueError, "s: got noise level 1.25"),
        ({"t": -0.5}, ValueError, r"t: got noise level -0.5, expected a value in \[0, 1\]"),
        ({"t": torch.tensor([0.5, float("nan")])}, ValueError, "t: got noise level nan"),
        ({"t": torch.rand(3)}, ValueError, r"t: got shape \(3,\), expected a number, \[2\]"),
        ({"t": torch.rand(2, 2)}, ValueError, r"t: got shape \(2, 2\)"),
        ({"t": torch.tensor([1, 0])}, TypeError, "t: got dtype int64"),
        ({"t": torch.rand(2, device="meta")}, ValueError, "t: got device meta"),
        ({"t": torch.rand(2).requires_grad_()}, ValueError, "t: got a tensor that requires a gradient"),
        (
            {"x_t": torch.rand(2, 3, 4, 5, 5)},
            ValueError,
            r"x_t: got shape \(2, 3, 4, 5, 5\), expected \[2, 3, 4, 5, 6\]",
        ),
        ({"x_s": torch.zeros(2, 3, 4, 5, 6, dtype=torch.int32)}, TypeError, "x_s: got dtype int32"),
        ({"x_s": [1.0]}, TypeError, "x_s: got list, expected a tensor"),
        ({"x_s": torch.rand(2, 3, 4, 5, 6, device="meta")}, ValueError, "x_s: got device meta, expected cpu like v"),
        ({"chunk_frames": (2, 3)}, ValueError, r"chunk_frames: got \(2, 3\), expected positive sizes with sum 4"),
        ({"chunk_frames": ()}, ValueError, r"chunk_frames: got \(\)"),
    ],
)
def test_bad_input(changes, error, message):
    v, x_t, x_s, t, s = draw((2, 3, 4, 5, 6))
    arguments = {"v": v, "x_t": x_t, "x_s": x_s, "t": t, "s": s} | changes
    with pytest.raises(error, match=message):
        gaussian_log_prob(**arguments)


def test_chunks_need_frames():
    with pytest.raises(ValueError, match=r"chunk_frames: got \(1,\) for a tensor of shape \(2, 3\)"):
        gaussian_log_prob(*draw((2, 3)), chunk_frames=(1,))


def kernel_level_out_of_range(device):
    """What a Triton kernel does with levels that only the device knows."""
    from raven.kernels import gaussian_log_prob as kernels

    v, x_t, x_s = (torch.randn(5, 6, device=device) for _ in range(3))
    t = torch.tensor([0.5, 0.5, 1.5, -0.1, 0.5], device=device)
    s = torch.tensor([[0.5], [0.0], [0.5], [0.5], [1.1]], device=device)
    got, unit = torch.empty(5, device=device), torch.empty_like(v)
    kernels.forward(v, x_t, x_s, t, s, None, got, unit)
    assert got.isnan().tolist() == [False, True, True, True, True]
    grads = [torch.empty_like(v) for _ in range(3)]
    kernels.backward(torch.ones(5, device=device), v, x_t, x_s, t, s, None, *grads)
    for grad in (unit, *grads):
        assert grad.isnan().all(1).tolist() == [False, True, True, True, True]
        assert grad[0].isfinite().all()


@pytest.mark.interpret
def test_kernel_bad_levels_give_nan():
    kernel_level_out_of_range("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("alone", [False, True])
def test_gpu_bad_levels_give_nan(alone):
    inputs = [torch.randn(5, 6, device="cuda") for _ in range(3)]
    leaves = [x.requires_grad_() for x in (inputs[:1] if alone else inputs)]
    t = torch.tensor([0.5, 0.5, 1.5, -0.1, 0.5], device="cuda")
    s = torch.tensor([0.5, 0.0, 0.5, 0.5, 1.1], device="cuda")
    got = gaussian_log_prob(*inputs, t, s)
    assert got.isnan().tolist() == [False, True, True, True, True]
    for grad in torch.autograd.grad(got, leaves, torch.ones_like(got)):
        assert grad.isnan().all(1).tolist() == [False, True, True, True, True]
        assert grad[0].isfinite().all()


def test_float64_is_not_run_on_triton(triton_backend):
    with pytest.raises(BackendUnavailableError, match="float64 is only computed by the reference"):
        gaussian_log_prob(*draw((2, 3), dtype=torch.float64))


def test_reference_is_differentiable_in_the_levels():
    v, x_t, x_s, t, s = (x.detach() for x in draw((2, 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda t, s: reference(v, x_t, x_s, t, s), (t.requires_grad_(), (0.3 + 0.5 * s).requires_grad_())
    )
