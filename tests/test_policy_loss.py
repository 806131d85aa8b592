"""The fused policy loss: the composition it stands for, its gradient, batches, graphs, bad input."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import raven
from raven.backends import get_backend
from raven.errors import BackendUnavailableError
from raven.losses import chunk_weights, reinforce_loss
from raven.ops import gaussian_log_prob, policy_loss
from raven.reference.policy_loss import policy_loss as reference
from raven.testing import assert_bitwise, poisoned_memory, relative_rms

EVERY_GPU_BACKEND = True

# (shape, chunk_frames): no chunks, equal and ragged chunks, odd sizes, sizes beyond one piece of a kernel.
CASES = [
    ((3, 7), None),
    ((2,), None),
    ((2, 2, 4, 3, 5), (2, 2)),
    ((4, 3, 5, 2, 4), (1, 3, 1)),
    ((2, 2, 3, 61, 53), None),
    ((3, 2, 3, 61, 53), (1, 2)),
    ((2, 1, 5, 64, 40), (1, 2, 2)),
]
WAN = ((5, 16, 21, 60, 104), (3,) * 7)


def draw(shape, chunk_frames, device="cpu", dtypes=(torch.float32,) * 3):
    v, x_t, x_s = (torch.randn(shape, device=device).to(dtype) for dtype in dtypes)
    table = shape[:1] if chunk_frames is None else (shape[0], len(chunk_frames))
    level = torch.float64 if torch.float64 in dtypes else torch.float32
    t = torch.rand(table, device=device, dtype=level)
    s = 0.2 + 0.8 * torch.rand(table, device=device, dtype=level)
    return v.requires_grad_(), x_t, x_s, t, s, torch.randn(shape[0], device=device, dtype=level)


def weights_of(chunk_frames):
    return None if chunk_frames is None else chunk_weights(chunk_frames, -1).tolist()


def composition(v, x_t, x_s, t, s, advantages, chunk_frames, scale):
    """What the op stands for, by the unfused op and the loss of ``raven.losses``, in float64."""
    v, x_t, x_s, t, s, advantages = (x.double() for x in (v, x_t, x_s, t, s, advantages))
    log_prob = gaussian_log_prob(v, x_t, x_s, t, s, chunk_frames)
    sizes = [v[0].numel()] if chunk_frames is None else [v[0].numel() * f // v.shape[2] for f in chunk_frames]
    return reinforce_loss(log_prob.reshape(len(v), -1), advantages, sizes, -1, scale), log_prob


def check(inputs, chunk_frames, limit=1e-6, rounding=1e-6, scale=100.0):
    v, advantages = inputs[0], inputs[-1]
    weights = weights_of(chunk_frames)
    leaf = v.detach().double().requires_grad_()
    chosen = get_backend()
    raven.set_backend("reference")
    want, want_log_prob = composition(leaf, *inputs[1:], chunk_frames, scale)
    raven.set_backend(chosen)
    # The terms of the loss have either sign: its error is measured against the sum of their sizes.
    shares = torch.ones(1) if weights is None else torch.tensor(weights)
    size = (advantages.double()[:, None] * want_log_prob.detach().reshape(len(v), -1) * shares.to(v.device)).abs()
    size = scale * size.sum() / v.numel()
    # float16 holds a gradient of this loss only if the loss is scaled, as it is in training.
    usual = 1.0 if v.dtype != torch.float16 else v.numel() / 64
    for factor in (usual, usual / 4):
        (want_grad,) = torch.autograd.grad(want * factor, leaf, retain_graph=True)
        with poisoned_memory():
            loss, log_prob = policy_loss(*inputs, chunk_frames, weights, scale)
            (grad,) = torch.autograd.grad(loss * factor, v)
        assert loss.shape == () and log_prob.shape == want_log_prob.shape and not log_prob.requires_grad
        assert (loss - want).abs() <= limit * size
        assert grad.dtype == v.dtype and grad.shape == v.shape
        assert relative_rms(grad, want_grad) <= rounding
    other = gaussian_log_prob(v, *inputs[1:-1], chunk_frames).detach()
    if v.is_cuda and get_backend() == "triton":  # whose compiler may round two kernels differently
        torch.testing.assert_close(log_prob, other, rtol=1e-6, atol=1e-6 * v.numel() / other.numel())
    else:
        assert_bitwise(log_prob, other, "log-density of the other op")
    with torch.no_grad():
        for got, want in zip(policy_loss(*inputs, chunk_frames, weights, scale), (loss, log_prob), strict=True):
            assert_bitwise(got, want.detach(), "without a gradient")
    return loss


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_is_the_composition_in_float64(shape, chunk_frames):
    # 1e-7: the losses keep chunk weights in float32.
    loss = check(draw(shape, chunk_frames, dtypes=(torch.float64,) * 3), chunk_frames, 1e-7, 1e-7)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_is_the_composition(shape, chunk_frames):
    assert check(draw(shape, chunk_frames), chunk_frames, scale=3.0).dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_kernel(shape, chunk_frames, triton_backend):
    check(draw(shape, chunk_frames), chunk_frames)


@pytest.mark.interpret
def test_kernel_with_half_velocity(triton_backend):
    inputs = draw((2, 2, 3, 6, 10), (1, 2), dtypes=(torch.float16, torch.float32, torch.float16))
    check(inputs, (1, 2), 1e-6, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "chunk_frames"), [*CASES, WAN])
@pytest.mark.parametrize("dtypes", ["fff", "hhh", "bbb", "hff", "bff", "bfb"])
def test_gpu(shape, chunk_frames, dtypes):
    dtypes = [{"f": torch.float32, "h": torch.float16, "b": torch.bfloat16}[letter] for letter in dtypes]
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtypes[0]]
    inputs = draw(shape, chunk_frames, "cuda", dtypes)
    assert raven.explain("policy_loss", *inputs[:3]).chosen == (get_backend() or "cuda")
    check(inputs, chunk_frames, 1e-6, rounding)


def gradient_of_a_tiny_weight_survives_float16(device):
    v, x_t, x_s, t, s, _ = draw((2, 3, 4, 5), None, device, (torch.float16, torch.float32, torch.float32))
    advantages = torch.full((2,), 1e-7, device=device)
    loss, _ = policy_loss(v, x_t, x_s, t, s, advantages)
    (got,) = torch.autograd.grad(loss * 2.0**20, v)
    leaf = v.detach().double().requires_grad_()
    double = [x.double() for x in (x_t, x_s, t, s, advantages)]
    (want,) = torch.autograd.grad(reference(leaf, *double)[0] * 2.0**20, leaf)
    assert relative_rms(got, want) <= 1e-3


def test_gradient_of_a_tiny_weight_survives_float16():
    gradient_of_a_tiny_weight_survives_float16("cpu")


@pytest.mark.gpu
def test_gpu_gradient_of_a_tiny_weight_survives_float16():
    gradient_of_a_tiny_weight_survives_float16("cuda")


def levels_strides_and_kept_graphs(device):
    v, x_t, x_s, t, s, advantages = draw((2, 3, 4, 6, 5), None, device)
    weights = (0.5, 1.5)
    plain, log_prob = policy_loss(v, x_t, x_s, t, s, advantages, (1, 3), weights)
    (grad,) = torch.autograd.grad(plain, v, retain_graph=True)
    (again,) = torch.autograd.grad(3 * plain, v, retain_graph=True)
    torch.testing.assert_close(again, 3 * grad)
    assert plain != 0 and log_prob.all() and grad.any()
    (last,) = torch.autograd.grad(plain, v)
    assert_bitwise(last, grad, "the backward that frees the graph")
    tables = [x[:, None].expand(2, 2) for x in (t, s)]
    assert_bitwise(policy_loss(v, x_t, x_s, *tables, advantages, [1, 3], torch.tensor(weights))[1], log_prob, "tables")
    strange = v.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
    wide = torch.stack([advantages, t, s], dim=1)
    got, _ = policy_loss(strange, x_t, x_s, wide[:, 1], wide[:, 2], wide[:, 0], (1, 3), weights)
    assert_bitwise(got, plain, "non-contiguous inputs")
    assert_bitwise(torch.autograd.grad(got, strange)[0], grad, "gradient of non-contiguous inputs")
    number, _ = policy_loss(v, x_t, x_s, 0.75, torch.tensor(0.5), advantages)
    full, _ = policy_loss(v, x_t, x_s, torch.full_like(t, 0.75), torch.full_like(s, 0.5), advantages)
    assert_bitwise(number, full, "numbers")


def test_levels_strides_and_kept_graphs():
    levels_strides_and_kept_graphs("cpu")


@pytest.mark.interpret
def test_kernel_levels_strides_and_kept_graphs(triton_backend):
    levels_strides_and_kept_graphs("cpu")


@pytest.mark.gpu
def test_gpu_levels_strides_and_kept_graphs():
    levels_strides_and_kept_graphs("cuda")


def log_prob_does_not_depend_on_the_batch(device):
    inputs = draw((3, 2, 4, 40, 20), (1, 3), device)
    loss, whole = policy_loss(*inputs, (1, 3))
    assert loss != 0 and whole.all()
    for again in policy_loss(*inputs, (1, 3))[:1]:
        assert_bitwise(again, loss, "a second run")
    for b in range(3):
        one = [x[b : b + 1].detach() for x in inputs]
        assert_bitwise(policy_loss(*one, (1, 3))[1], whole[b : b + 1], "a sample alone")


def test_log_prob_does_not_depend_on_the_batch():
    log_prob_does_not_depend_on_the_batch("cpu")


@pytest.mark.interpret
def test_kernel_log_prob_does_not_depend_on_the_batch(triton_backend):
    log_prob_does_not_depend_on_the_batch("cpu")


@pytest.mark.gpu
def test_gpu_log_prob_does_not_depend_on_the_batch():
    log_prob_does_not_depend_on_the_batch("cuda")


@pytest.mark.gpu
def test_gpu_graph():
    v, x_t, x_s, t, s, advantages = draw((3, 4, 6, 40, 20), (2, 4), "cuda")

    def both():
        loss, log_prob = policy_loss(v, x_t, x_s, t, s, advantages, (2, 4))
        return loss, log_prob, torch.autograd.grad(loss * 0.5, v)[0]

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = both()
    for _ in range(20):
        with torch.no_grad():
            v.normal_()
            advantages.normal_()
        graph.replay()
        for got, want in zip(held, both(), strict=True):
            assert_bitwise(got, want)
            assert got.any()


@pytest.mark.gpu
def test_gpu_bad_levels_give_nan():
    v, x_t, x_s = (torch.randn(3, 6, device="cuda") for _ in range(3))
    t = torch.tensor([0.5, 1.5, 0.5], device="cuda")
    s = torch.tensor([0.5, 0.5, 0.0], device="cuda")
    loss, log_prob = policy_loss(v.requires_grad_(), x_t, x_s, t, s, torch.ones(3, device="cuda"))
    assert loss.isnan() and log_prob.isnan().tolist() == [False, True, True]
    (grad,) = torch.autograd.grad(loss, v)
    assert grad.isnan().all(1).tolist() == [False, True, True] and grad[0].isfinite().all()


def empty_inputs(device):
    for shape, chunk_frames in (((0, 2, 3, 2, 2), None), ((0, 2, 3, 2, 2), (1, 2)), ((2, 0, 3, 2, 2), (1, 2))):
        inputs = draw(shape, chunk_frames, device)
        loss, log_prob = policy_loss(*inputs, chunk_frames)
        assert loss == 0 and (log_prob == 0).all()
        assert log_prob.shape == (shape[:1] if chunk_frames is None else (shape[0], len(chunk_frames)))
        assert torch.autograd.grad(loss, inputs[0])[0].shape == shape


def test_empty_inputs():
    empty_inputs("cpu")


@pytest.mark.gpu
def test_gpu_empty_inputs():
    empty_inputs("cuda")


@pytest.mark.parametrize(("shape", "chunk_frames"), [((3, 7), None), ((2, 2, 4, 2), (1, 3))])
def test_gradcheck(shape, chunk_frames):
    v, *constants = draw(shape, chunk_frames, dtypes=(torch.float64,) * 3)
    weights = None if chunk_frames is None else (0.5, 1.5)
    assert torch.autograd.gradcheck(lambda v: policy_loss(v, *constants, chunk_frames, weights)[0], v)


@pytest.mark.parametrize("chunk_frames", [None, (1, 2)])
def test_opcheck(chunk_frames):
    v, x_t, x_s, t, s, advantages = draw((2, 2, 3, 2, 2), chunk_frames)
    t, s = (x.reshape(2, -1) for x in (t, s))
    weights = [1.0] if chunk_frames is None else [0.5, 1.5]
    for need in (True, False):
        arguments = (v, x_t, x_s, t, s, advantages, weights, 10.0, chunk_frames, need)
        torch.library.opcheck(torch.ops.raven.policy_loss.default, arguments)


@pytest.mark.parametrize("chunk_frames", [None, (1, 2)])
def test_compiles_without_graph_breaks(chunk_frames):
    v, x_t, x_s, t, s, advantages = draw((2, 2, 3, 2, 2), chunk_frames)

    def both(v, advantages):
        loss, log_prob = policy_loss(v * 2, x_t, x_s, t, s, advantages, chunk_frames)
        return loss * 0.5, log_prob

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, want = compiled(v, advantages), both(v, advantages)
    torch.testing.assert_close(got, want)
    assert not got[1].requires_grad
    torch.testing.assert_close(torch.autograd.grad(got[0], v), torch.autograd.grad(want[0], v))


def test_a_dispatch_mode_sees_the_op():
    """Nobody else does: the call goes straight to its backend, with the same result."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names, inputs = [], draw((2, 3), None)
    plain = policy_loss(*inputs)[0]
    (want,) = torch.autograd.grad(plain.sum(), inputs[0])
    with Seen():
        got = policy_loss(*inputs)[0]
    assert "raven::policy_loss" in names
    assert_bitwise(got, plain)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), inputs[0])[0], want)


def test_second_derivative_is_an_error():
    v, *others = draw((2, 3), None)
    loss, _ = policy_loss(v, *others)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(loss, v, create_graph=True)
    registered = torch.ops.raven.policy_loss.default(v, *(x[:, None] if x.dim() == 1 else x for x in others[:4]),
                                                     others[4], [1.0], 1.0, None, True)[0]  # fmt: skip
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(registered, v, create_graph=True)


def test_advantages_are_constants():
    v, x_t, x_s, t, s, advantages = draw((2, 3), None)
    loss, _ = policy_loss(v, x_t, x_s, t, s, advantages.requires_grad_())
    loss.backward()
    assert advantages.grad is None and v.grad is not None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"s": 0.0}, ValueError, r"s: got noise level 0.0, expected a value in \(0, 1\]"),
        ({"t": torch.rand(3)}, ValueError, r"t: got shape \(3,\), expected a number, \[2\]"),
        ({"t": torch.rand(2).requires_grad_()}, ValueError, "t: got a tensor that requires a gradient"),
        ({"x_t": torch.rand(2, 3, 4, 5, 6).requires_grad_()}, ValueError, "x_t: got a tensor that requires a gradient"),
        ({"x_s": torch.rand(2, 3, 4, 5, 5)}, ValueError, r"x_s: got shape \(2, 3, 4, 5, 5\)"),
        ({"v": torch.zeros(2, 3, 4, 5, 6, dtype=torch.int32)}, TypeError, "v: got dtype int32"),
        ({"advantages": torch.rand(3)}, ValueError, r"advantages: got shape \(3,\), expected \[2\]"),
        ({"advantages": torch.tensor([1, 2])}, TypeError, "advantages: got dtype int64"),
        ({"advantages": torch.rand(2, device="meta")}, ValueError, "advantages: got device meta, expected cpu like v"),
        ({"chunk_frames": (2, 3)}, ValueError, r"chunk_frames: got \(2, 3\)"),
        ({"chunk_weights": (1.0, 1.0)}, ValueError, r"chunk_weights: got \(1.0, 1.0\), expected 1 finite numbers"),
        ({"chunk_frames": (1, 3), "chunk_weights": (1.0, float("nan"))}, ValueError, "expected 2 finite numbers"),
        ({"chunk_weights": torch.ones(1, device="meta")}, ValueError, "chunk_weights: got a tensor on meta"),
        ({"scale": float("inf")}, ValueError, "scale: got inf"),
    ],
)
def test_bad_input(changes, error, message):
    v, x_t, x_s, t, s, advantages = draw((2, 3, 4, 5, 6), None)
    arguments = {"v": v, "x_t": x_t, "x_s": x_s, "t": t, "s": s, "advantages": advantages} | changes
    with pytest.raises(error, match=message):
        policy_loss(**arguments)


def test_float64_is_not_run_on_triton(triton_backend):
    with pytest.raises(BackendUnavailableError, match="float64 is only computed by the reference"):
        policy_loss(*draw((2, 3), None, dtypes=(torch.float64,) * 3))


def test_reference_is_differentiable_by_autograd():
    v, x_t, x_s, t, s, advantages = draw((2, 3, 4), None, dtypes=(torch.float64,) * 3)
    got, want = (f(v, x_t, x_s, t, s, advantages)[0] for f in (policy_loss, reference))
    torch.testing.assert_close(torch.autograd.grad(got, v), torch.autograd.grad(want, v))
