"""qk_norm_rope: the kernels against the reference, in Triton's interpreter and on a GPU."""

import functools
import math
import os
import subprocess
import sys

import pytest
import torch
from rope_cases import assert_rounded, check_against_reference, check_empty, in_double, make, with_gradients

import raven
from raven import native
from raven.ops import qk_norm_rope
from raven.ops.qk_norm_rope import _qk_norm_rope, _qk_norm_rope_backward
from raven.reference import qk_norm_rope as reference

EVERY_GPU_BACKEND = True

# Triton in its interpreter


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def configured():
    """Change ``CONFIGS`` for one test."""
    from raven.kernels import qk_norm_rope as kernels

    before = {kind: dict(config) for kind, config in kernels.CONFIGS.items()}

    def change(kind, **values):
        kernels.CONFIGS[kind].update(values)
        kernels.plan.cache_clear()

    yield change
    for kind, config in before.items():
        change(kind, **config)


def strided(arguments):
    """The same q and k as slices of one wider tensor, as a fused projection gives them."""
    q, k, *rest = arguments
    fused = torch.cat((q.flatten(2), k.flatten(2), k.flatten(2)), dim=2)
    width = q.shape[2] * q.shape[3]
    return [fused[..., :width].view_as(q), fused[..., width : width + k[0, 0].numel()].view_as(k), *rest]


INTERPRETED = [
    {"H": 3, "Hk": 3, "D": 32},
    {"H": 5, "Hk": 1, "dtype": torch.float16},
    {"H": 3, "Hk": 2, "D": 32, "per_head": True},
    {"B": 1, "L": 3, "H": 12, "Hk": 3, "D": 64},  # q in parts of 8 and 4 heads, k with one of four masked
    {"weights": False},
]


@pytest.mark.interpret
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(triton_backend, poisoned, configured, case):
    configured("forward", tokens=2)  # the last program of an odd number of tokens has one to do
    check_against_reference(strided(make(**{"L": 3, "frames": 100_000} | case)), case.get("per_head", False))


def check_weights_without_eps(arguments):
    """Three heads lie in a block of four, of which the last, all zeros, has no norm without an eps."""
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in arguments]
    q, k = qk_norm_rope(*leaves, eps=0.0, per_head=True)
    (q.square().sum() + k.square().sum()).backward()
    doubles = [x.requires_grad_() if x.is_floating_point() else x for x in in_double(arguments)]
    q, k = reference.qk_norm_rope(*doubles, eps=0.0, per_head=True)
    (q.square().sum() + k.square().sum()).backward()
    for got, want in zip(leaves[2:4], doubles[2:4], strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_interpreted_weights_without_eps(triton_backend):
    check_weights_without_eps(make(H=3, Hk=3, D=32, per_head=True))


@pytest.mark.interpret
def test_interpreted_alone_as_in_batch(triton_backend):
    check_alone_as_in_batch(make(L=2))


@pytest.mark.interpret
def test_interpreted_empty(triton_backend):
    check_empty({"L": 0})


@pytest.mark.interpret
def test_interpreter_refuses_bfloat16(triton_backend):
    with pytest.raises(raven.BackendUnavailableError, match="bfloat16"):
        qk_norm_rope(*make(dtype=torch.bfloat16))


def check_alone_as_in_batch(arguments):
    outputs, gradients, _ = with_gradients(arguments)
    assert all(x.any() for x in outputs + gradients)
    q, k, q_weight, k_weight, positions = arguments
    last = (q[1:, -1:], k[1:, -1:], q_weight, k_weight, positions[1:, -1:])
    for got, want in zip(qk_norm_rope(*last), outputs, strict=True):
        assert torch.equal(got, want[1:, -1:])
    again = with_gradients(arguments)
    for got, want in zip(again[0] + again[1], outputs + gradients, strict=True):
        assert torch.equal(got, want)


# On a GPU

on_gpu = functools.partial(make, device="cuda", frames=100_000)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        {"L": 1563, "H": 12, "Hk": 12, "D": 128},
        {"L": 77, "H": 40, "Hk": 40, "D": 128},
        {"L": 133, "H": 24, "Hk": 4, "D": 64, "per_head": True},
        {"L": 130, "H": 7, "Hk": 7, "D": 256},
        {"L": 129, "H": 4, "Hk": 4, "D": 32},
        {"L": 129, "H": 12, "Hk": 3, "D": 128, "weights": False},
        {"L": 65, "H": 5, "Hk": 3, "D": 16},
        {"L": 66, "H": 8, "Hk": 8, "D": 256, "per_head": True},
        {"B": 1, "L": 1, "H": 16, "Hk": 16, "D": 128},
    ],
    ids=str,
)
def test_gpu(poisoned, dtype, case):
    check_against_reference(strided(on_gpu(dtype=dtype, **case)), case.get("per_head", False))


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16])
def test_gpu_weights_of_two_bytes(weight):
    q, k, q_weight, k_weight, positions = on_gpu(L=300, H=6, Hk=6, D=128, dtype=torch.bfloat16)
    check_against_reference([q, k, q_weight.to(weight), k_weight.to(weight), positions])


@pytest.mark.gpu
def test_gpu_unaligned_rows_are_copied():
    """Rows that do not begin at a multiple of 16 bytes."""
    arguments = on_gpu(L=33, H=3, Hk=3, D=64, dtype=torch.bfloat16)
    expected = with_gradients(arguments)
    for i in range(2):
        wide = torch.nn.functional.pad(arguments[i].flatten(2), (1, 2))
        arguments[i] = wide[..., 1:-2].view_as(arguments[i])
    got = with_gradients(arguments)
    for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.gpu
def test_gpu_empty():
    check_empty({"L": 0, "device": "cuda"})


@pytest.mark.gpu
def test_gpu_nan_stays_in_its_token():
    arguments = on_gpu(L=50, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    clean = qk_norm_rope(*arguments)
    arguments[0][0, 7, 3, 5] = math.nan
    q, k = qk_norm_rope(*arguments)
    assert q[0, 7].isnan().all() and torch.equal(k, clean[1])
    others = torch.ones(2, 50, dtype=torch.bool, device="cuda")
    others[0, 7] = False
    assert torch.equal(q[others], clean[0][others])


@pytest.mark.gpu
def test_gpu_in_a_graph():
    """Captured once, replayed on other numbers: forward and backward."""
    arguments = on_gpu(L=400, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    new = on_gpu(L=400, H=12, Hk=12, D=128, dtype=torch.bfloat16)
    expected = with_gradients(new)
    with_gradients(arguments)  # compiles, and makes the table of frequencies
    grads = expected[2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _qk_norm_rope(*arguments, 1e-6, 1e4, False)
        gradients = _qk_norm_rope_backward(*grads, *arguments, 1e-6, 1e4, False, True)
    for x, y in zip(arguments, new, strict=True):
        x.copy_(y)
    for _ in range(2):
        graph.replay()
        for got, want in zip((*outputs, *gradients), expected[0] + expected[1], strict=True):
            assert torch.equal(got, want) and got.any()


@pytest.mark.gpu
def test_gpu_weights_without_eps():
    check_weights_without_eps(on_gpu(H=3, Hk=3, D=32, per_head=True))


FIRST_CALL = """
import sys
sys.path[:0] = {path}
import torch
from rope_cases import check_against_reference, make
check_against_reference(make(**{case}, dtype=torch.bfloat16, device="cuda"))
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [{"L": 3, "H": 16, "Hk": 16, "D": 256}, {"B": 1, "L": 792, "H": 4, "Hk": 4, "D": 128, "weights": False}],
    ids=str,
)
def test_gpu_first_call_of_a_process(gpu_backend, case):
    """The CUDA backward asks for 48 KiB of shared memory here, beside what it declares: more than is given unasked."""
    script = FIRST_CALL.format(path=[str(p) for p in sys.path], case=case)
    backend = {"RAVEN_BACKEND": "triton" if gpu_backend == "triton" else "cuda"}
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | backend, timeout=300)


@pytest.mark.gpu
def test_gpu_alone_as_in_batch():
    check_alone_as_in_batch(on_gpu(L=700, H=12, Hk=12, D=128, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_gpu_chosen_and_equal_to_reference(gpu_backend):
    arguments = on_gpu(H=12, Hk=12, D=128)
    compiled = "cuda" if gpu_backend == "automatic" and native.reason(*arguments) is None else "triton"
    assert raven.explain("qk_norm_rope", *arguments[:4]).chosen == compiled
    outputs = qk_norm_rope(*arguments)
    for got, want in zip(outputs, reference.qk_norm_rope(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    L, H, D = 2**31 // (32 * 256) + 3, 32, 256
    q = torch.zeros(1, L, H, D, dtype=torch.bfloat16, device="cuda")
    q[:, -5:].normal_()
    k = torch.randn(1, L, 1, D, dtype=torch.bfloat16, device="cuda")
    q_weight, k_weight = torch.rand(H * D, device="cuda"), torch.rand(D, device="cuda")
    positions = torch.arange(L, dtype=torch.int32, device="cuda")[:, None].expand(L, 3)
    outputs = qk_norm_rope(q, k, q_weight, k_weight, positions)
    last = [x[:, -5:] for x in (q, k)]
    expected = reference.qk_norm_rope(*in_double([*last, q_weight, k_weight, positions[-5:]]))
    for got, want in zip(outputs, expected, strict=True):
        assert_rounded(got[:, -5:], want)
