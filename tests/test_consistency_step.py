"""The consistency step: value, gradients, forms of a level, noise, bad input, each on its lane."""

import pytest
import torch

import raven
from raven.ops import consistency_step, gaussian_log_prob
from raven.schedule import consistency_kernel, expand_level
from raven.testing import assert_bitwise, poisoned_memory, relative_rms

# (shape, shape of t, shape of s): a level per sample or per frame, odd sizes, sizes beyond one program.
CASES = [
    ((3, 7), (3,), (3,)),
    ((2,), (2,), (2,)),
    ((2, 3, 5, 2, 4), (2,), (2,)),
    ((2, 3, 5, 2, 4), (2, 5), (2,)),
    ((2, 3, 5, 2, 4), (2,), (2, 5)),
    ((2, 2, 3, 61, 53), (2, 3), (2, 3)),
    ((1, 1, 2, 64, 80), (1,), (1,)),
]


def draw(shape, t_shape, s_shape, dtypes=(torch.float32,) * 3, device="cpu"):
    v, x_t, noise = (torch.randn(shape, device=device).to(d).requires_grad_() for d in dtypes)
    level = torch.float64 if torch.float64 in dtypes else torch.float32
    return v, x_t, noise, *(torch.rand(x, device=device, dtype=level) for x in (t_shape, s_shape))


def broadcast(level, like):
    shape = (len(level),) + (1,) * (like.dim() - 1)
    return level.view(shape) if level.dim() == 1 else level.view(shape[:2] + level.shape[1:] + shape[3:])


def check(inputs, limits):
    v, x_t, noise, t, s = inputs
    grad = torch.randn_like(x_t)
    with poisoned_memory():
        got = consistency_step(v, x_t, t, s, noise)
        grads = torch.autograd.grad(got, (v, x_t, noise), grad)
    assert got.dtype == x_t.dtype and got.shape == x_t.shape
    leaves = [x.detach().double().requires_grad_() for x in (v, x_t, noise)]
    t, s = (broadcast(x.double(), x_t) for x in (t, s))
    want = (1 - s) * (leaves[1] - t * leaves[0]) + s * leaves[2]
    assert relative_rms(got, want) <= limits[1]
    for g, w, x, limit in zip(grads, torch.autograd.grad(want, leaves, grad.double()), inputs, limits, strict=False):
        assert g.dtype == x.dtype and relative_rms(g, w) <= limit


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_reference(case, dtype, limit):
    check(draw(*case, (dtype,) * 3), (limit,) * 3)


@pytest.mark.interpret
@pytest.mark.parametrize("case", CASES)
def test_kernel(case, triton_backend):
    check(draw(*case), (1e-6,) * 3)


@pytest.mark.interpret
def test_kernel_with_mixed_dtypes(triton_backend):
    inputs = draw(*CASES[3], (torch.float16, torch.float32, torch.float16))
    check(inputs, (1e-3, 1e-6, 1e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, ((2, 16, 21, 60, 104), (2,), (2, 21))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(case, dtype):
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    inputs = draw(*case, (dtype, torch.float32, dtype), "cuda")
    check(inputs, (rounding, 1e-6, rounding))
    check(draw(*case, (dtype,) * 3, "cuda"), (rounding,) * 3)
    assert raven.explain("consistency_step", *inputs[:3]).chosen == "triton"


def forms_of_a_level(device):
    v, x_t, noise, t, s = draw((2, 3, 5, 2, 4), (2,), (2, 5), device=device)
    want = consistency_step(v, x_t, t, s, noise)
    assert want.any()
    ready = (expand_level(t, x_t), expand_level(s, x_t))
    assert_bitwise(consistency_step(v, x_t, *ready, noise), want, "broadcast levels")
    per_frame = t[:, None].expand(2, 5)
    assert_bitwise(consistency_step(v, x_t, per_frame, s, noise), want, "an expanded level")
    numbers = consistency_step(v, x_t, 0.75, 0.5, noise)
    tensors = consistency_step(v, x_t, torch.tensor(0.75), torch.full((2,), 0.5, device=device), noise)
    assert_bitwise(numbers, tensors, "numbers")
    strange = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in (v, x_t, noise)]
    got = consistency_step(*strange[:2], t, s, strange[2])
    assert_bitwise(got, want, "non-contiguous inputs")
    grad = torch.randn(2, 4, 2, 5, 3, device=device).permute(0, 4, 3, 2, 1)
    grads = [torch.autograd.grad(x, y, grad) for x, y in ((got, strange), (want, (v, x_t, noise)))]
    for g, w in zip(*grads, strict=True):
        assert_bitwise(g, w, "gradient of non-contiguous inputs")
        assert g.any()


def test_forms_of_a_level():
    forms_of_a_level("cpu")


@pytest.mark.interpret
def test_kernel_forms_of_a_level(triton_backend):
    forms_of_a_level("cpu")


@pytest.mark.gpu
def test_gpu_forms_of_a_level():
    forms_of_a_level("cuda")


def level_zero_gives_the_clean_video(device):
    v, x_t, _, t, _ = draw((2, 3, 5, 2, 4), (2,), (2,), device=device)
    state = torch.get_rng_state()
    got = consistency_step(v, x_t, t, 0)
    assert torch.equal(torch.get_rng_state(), state), "noise was drawn for a step without noise"
    torch.testing.assert_close(got, x_t - broadcast(t, x_t) * v)
    assert_bitwise(consistency_step(v, x_t, t, torch.zeros(2, device=device)), got, "level 0 in a tensor")
    assert len(torch.autograd.grad(got.sum(), (v, x_t))) == 2


def test_level_zero_gives_the_clean_video():
    level_zero_gives_the_clean_video("cpu")


@pytest.mark.interpret
def test_kernel_level_zero_gives_the_clean_video(triton_backend):
    level_zero_gives_the_clean_video("cpu")


def test_noise_comes_from_the_generator():
    v, x_t, _, t, _ = draw((2, 3), (2,), (2,))
    steps = [consistency_step(v, x_t, t, 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert_bitwise(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    assert_bitwise(consistency_step(v, x_t, t, 0.5, noise), steps[0])


def test_noise_has_the_policys_distribution():
    """The step samples what the log-density describes: its standardised residual is the noise."""
    v, x_t, noise, t, s = draw((2, 3, 4, 8, 8), (2,), (2,))
    s = 0.2 + 0.6 * s
    x_s = consistency_step(v, x_t, t, s, noise)
    mean, std = consistency_kernel(v, x_t, t, s)
    torch.testing.assert_close((x_s - mean) / std, noise)
    log_prob = gaussian_log_prob(v, x_t, x_s, t, s)
    want = torch.distributions.Normal(0.0, broadcast(s, x_t).double()).log_prob((broadcast(s, x_t) * noise).double())
    torch.testing.assert_close(log_prob.double(), want.flatten(1).sum(1), rtol=1e-5, atol=0)


def empty_inputs(device):
    for shape in ((0, 2, 3, 2, 2), (2, 0, 3, 2, 2), (2, 2, 3, 0, 2)):
        for columns in ((), (3,)):
            inputs = draw(shape, (shape[0], *columns), (shape[0],), device=device)
            got = consistency_step(inputs[0], inputs[1], inputs[3], inputs[4], inputs[2])
            assert got.shape == shape
            assert [g.shape for g in torch.autograd.grad(got.sum(), inputs[:3])] == [torch.Size(shape)] * 3


def test_empty_inputs():
    empty_inputs("cpu")


@pytest.mark.interpret
def test_kernel_empty_inputs(triton_backend):
    empty_inputs("cpu")


@pytest.mark.interpret
def test_kernel_bad_levels_give_nan():
    from raven.kernels import consistency_step as kernels

    v, x_t, noise = torch.randn(3, 4, 5, 6).unbind(0)
    t = torch.tensor([[0.5], [0.5], [1.5], [0.5]])
    s = torch.tensor([[0.5], [-0.1], [0.5], [1.1]])
    got = kernels.forward(v, x_t, noise, t, s)
    assert got.isnan().all(-1).all(-1).tolist() == [False, True, True, True] and got[0].isfinite().all()


@pytest.mark.parametrize("case", [CASES[0], ((2, 2, 3, 2), (2, 3), (2,))])
def test_gradcheck(case):
    v, x_t, noise, t, s = draw(*case, (torch.float64,) * 3)
    assert torch.autograd.gradcheck(lambda v, x_t, noise: consistency_step(v, x_t, t, s, noise), (v, x_t, noise))


def test_opcheck():
    v, x_t, noise, t, s = draw((2, 2, 3, 2), (2, 3), (2, 1))
    torch.library.opcheck(torch.ops.raven.consistency_step.default, (v, x_t, noise, t, s))
    torch.library.opcheck(torch.ops.raven.consistency_step.default, (v, x_t, None, t, s))
    arguments = (torch.randn(2, 2, 3, 2), t, s, torch.float32, torch.bfloat16, True, False, True)
    torch.library.opcheck(torch.ops.raven.consistency_step_backward.default, arguments)


def test_compiles_without_graph_breaks():
    v, x_t, noise, t, s = draw((2, 2, 3, 2), (2, 3), (2,))

    def step(v, x_t):
        return consistency_step(v, x_t, t, s, noise) * 2

    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(v, x_t), step(v, x_t)
    torch.testing.assert_close(got, want)
    for g, w in zip(*(torch.autograd.grad(x.sum(), (v, x_t)) for x in (got, want)), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"s": -0.5}, ValueError, r"s: got noise level -0.5, expected a value in \[0, 1\]"),
        ({"t": torch.tensor([0.5, 2.0])}, ValueError, "t: got noise level 2"),
        ({"t": torch.rand(3)}, ValueError, r"t: got shape \(3,\), expected a number, \[2\]"),
        ({"t": torch.rand(2, 4)}, ValueError, r"t: got shape \(2, 4\), expected a number, \[2\] or \[2, 5\]"),
        ({"s": torch.rand(2, 3, 1, 1, 1)}, ValueError, r"s: got shape \(2, 3, 1, 1, 1\), expected a level per sample"),
        ({"s": torch.rand(2).requires_grad_()}, ValueError, "s: got a tensor that requires a gradient"),
        ({"t": torch.tensor([0, 1])}, TypeError, "t: got dtype int64"),
        ({"noise": torch.randn(2, 3)}, ValueError, r"noise: got shape \(2, 3\)"),
        ({"noise": torch.randn(2, 3, 5, 2, 4, device="meta")}, ValueError, "noise: got device meta"),
        ({"x_t": torch.ones(2, 3, 5, 2, 4, dtype=torch.int64)}, TypeError, "x_t: got dtype int64"),
        ({"generator": torch.Generator()}, ValueError, "generator: got one together with noise"),
    ],
)
def test_bad_input(changes, error, message):
    v, x_t, noise, t, s = draw((2, 3, 5, 2, 4), (2,), (2,))
    arguments = {"v": v, "x_t": x_t, "t": t, "s": s, "noise": noise} | changes
    with pytest.raises(error, match=message):
        consistency_step(**arguments)


def test_forward_mode_derivative_is_not_dropped():
    x = torch.randn(1, 3, 2, 16)
    with pytest.raises(NotImplementedError, match="consistency_step: forward-mode derivatives"):
        torch.func.jvp(lambda x: consistency_step(x, x, 0.9, 0.5, x), (x,), (x,))
