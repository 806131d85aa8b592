"""Log-density of a consistency step: the kernels, in Triton's interpreter and on a GPU."""

import pytest
import torch
from log_prob_cases import (
    CASES,
    batch_independence,
    check,
    draw,
    empty_inputs,
    exact,
    levels_and_strides,
    only_wanted_gradients,
)

import raven
from raven.backends import get_backend
from raven.ops import consistency_step, gaussian_log_prob, policy_loss
from raven.testing import assert_bitwise, relative_rms

EVERY_GPU_BACKEND = True


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
    assert all(x.all() for x in want)
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
    assert got.all() and v.grad.any() and v.grad.isfinite().all()


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


@pytest.mark.interpret
def test_kernel_same_bits_alone_or_in_a_batch(triton_backend):
    batch_independence("cpu")


@pytest.mark.gpu
def test_gpu_same_bits_alone_or_in_a_batch():
    batch_independence("cuda")


@pytest.mark.interpret
def test_kernel_only_wanted_gradients(triton_backend):
    only_wanted_gradients()


@pytest.mark.interpret
def test_kernel_levels_and_strides(triton_backend):
    levels_and_strides("cpu")


@pytest.mark.gpu
def test_gpu_levels_and_strides():
    levels_and_strides("cuda")


@pytest.mark.gpu
def test_gpu_tables_far_apart():
    """Columns of a wide table: rows further apart than 32 bits count."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    wide = torch.rand(2**31 + 8, device="cuda").as_strided((4, 3), (1, 2**30 + 1))
    results = []
    for t, s, advantages, grad in (wide, wide.contiguous()):
        v, x_t, x_s = (torch.full((3, 4), i, device="cuda", requires_grad=True) for i in (0.5, 0.75, 1.25))
        density = gaussian_log_prob(v, x_t, x_s, t, s)
        loss, _ = policy_loss(v, x_t.detach(), x_s.detach(), t, s, advantages)
        step = consistency_step(v, x_t, t, s, x_s.detach())
        found = [density, loss, step, *torch.autograd.grad(density, (v, x_t, x_s), grad)]
        found += [*torch.autograd.grad(loss, v), *torch.autograd.grad(step.sum(), (v, x_t))]
        results.append(found)
    for got, want in zip(*results, strict=True):
        assert got.any() and got.isfinite().all()
        assert_bitwise(got, want)


@pytest.mark.interpret
def test_kernel_empty_inputs(triton_backend):
    empty_inputs("cpu")


@pytest.mark.gpu
def test_gpu_empty_inputs():
    empty_inputs("cuda")


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
