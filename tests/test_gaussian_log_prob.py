"""Log-density of a consistency step: the reference in float64, the rules of an op, bad input."""

import pytest
import torch
from log_prob_cases import (
    CASES,
    batch_independence,
    check,
    draw,
    empty_inputs,
    levels_and_strides,
    only_wanted_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from raven.errors import BackendUnavailableError
from raven.ops import gaussian_log_prob
from raven.reference.gaussian_log_prob import gaussian_log_prob as reference
from raven.testing import assert_bitwise


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES)
def test_reference_in_float64(shape, chunk_frames):
    got = check(draw(shape, chunk_frames, torch.float64), chunk_frames, 1e-14, (1e-13,) * 3)
    assert got.dtype == torch.float64


@pytest.mark.parametrize(("shape", "chunk_frames"), CASES[-3:])
def test_reference_in_float32(shape, chunk_frames):
    assert check(draw(shape, chunk_frames), chunk_frames).dtype == torch.float32


def test_same_bits_alone_or_in_a_batch():
    batch_independence("cpu")


def test_only_wanted_gradients():
    only_wanted_gradients()


def test_gradient_of_v_is_the_policy_gradient():
    """RAVEN, arXiv 2605.15190: d log pi / d v = -t (1 - s)(x_s - (1 - s) x_0) / s^2."""
    v, x_t, x_s, _, _ = draw((2, 3, 4), dtype=torch.float64)
    t, s = 0.9, 0.6
    (got,) = torch.autograd.grad(gaussian_log_prob(v, x_t, x_s, t, s).sum(), v)
    want = -t * (1 - s) * (x_s - (1 - s) * (x_t - t * v)) / s**2
    torch.testing.assert_close(got, want.detach())


def test_levels_and_strides():
    levels_and_strides("cpu")


def test_empty_inputs():
    empty_inputs("cpu")


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


def test_float64_is_not_run_on_triton(triton_backend):
    with pytest.raises(BackendUnavailableError, match="float64 is only computed by the reference"):
        gaussian_log_prob(*draw((2, 3), dtype=torch.float64))


def test_reference_is_differentiable_in_the_levels():
    v, x_t, x_s, t, s = (x.detach() for x in draw((2, 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda t, s: reference(v, x_t, x_s, t, s), (t.requires_grad_(), (0.3 + 0.5 * s).requires_grad_())
    )
