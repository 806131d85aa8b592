"""gated_residual: the Triton kernels against the reference, in the interpreter and on a GPU."""

import math

import pytest
import torch
from test_gated_residual import (
    Case,
    assert_rounded,
    check_against_float64,
    check_empty,
    check_output_not_used,
    check_strides,
)

import raven
from raven import segments
from raven.ops import gated_residual, modulate
from raven.ops.gated_residual import _backward, _gated_residual_norm
from raven.reference import gated_residual as reference
from raven.reference.modulate import modulate as reference_modulate
from raven.testing import assert_bitwise

# How the kernels cut tokens into blocks


@pytest.mark.parametrize("lengths", [(5, 0, 17, 1), (4680,) * 13, (1,), (0, 3)], ids=str)
@pytest.mark.parametrize("most", [1, 7, 528])
def test_blocks_cover_every_token_once(lengths, most):
    device, tokens = torch.device("cpu"), sum(lengths)
    blocks = segments.cut_into_blocks(2, tokens, len(lengths), lengths, device, most)
    segment = [s for s, length in enumerate(lengths) for _ in range(length)]
    covered = [(s, t) for s, first, count in blocks.items.tolist() for t in range(first, first + count)]
    assert covered == list(zip(segment, range(tokens), strict=True))
    assert segments.segment_of_tokens(lengths, device).tolist() == segment
    assert all(0 < count <= blocks.rows for count in blocks.items[:, 2].tolist())
    for i in range(len(lengths)):
        assert (blocks.items[blocks.starts[i] : blocks.starts[i + 1], 0] == i).all()
    assert blocks.total == 2 * len(blocks.items) and blocks.longest == blocks.starts.diff().max()
    assert blocks.total <= most or blocks.rows == max(lengths)
    # One row less a block would make too many blocks.
    assert blocks.rows == 1 or 2 * sum(-(-n // (blocks.rows - 1)) for n in lengths) > most
    if len(set(lengths)) == 1:
        equal = segments.cut_into_blocks(2, tokens, len(lengths), None, device, most)
        assert equal[:4] == (blocks.rows, blocks.count // len(lengths), blocks.total, blocks.longest)


# Triton in its interpreter


@pytest.fixture
def guarded(monkeypatch):
    """torch.empty gives NaN between two guards of NaN; afterwards every guard is still NaN, and nothing in between."""
    made = []

    def empty(*shape, dtype=torch.float32, device="cpu"):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple | list) else shape)
        whole = torch.full((shape.numel() + 128,), math.nan, dtype=dtype, device=device)
        made.append(whole)
        return whole[64:-64].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    monkeypatch.undo()
    assert made
    for whole in made:
        assert whole[:64].isnan().all() and whole[-64:].isnan().all() and not whole[64:-64].isnan().any()


INTERPRETED = [
    {"L": 4, "norm": "modulated"},
    {"L": 5, "lengths": (1, 4), "norm": "affine", "dtype": torch.float16},
    {"L": 4, "gated": False, "norm": "affine", "B": 1},
    {"L": 4, "norm": "none", "branch": torch.float16},
    {"L": 4, "C": 33, "lengths": (4, 0), "table": torch.float16},
    {"L": 2, "N": 1, "B": 1, "C": 768},  # in parts of 512 and 256
]


@pytest.mark.interpret
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted(triton_backend, guarded, case):
    check_against_float64(Case(**case))


@pytest.fixture
def configured():
    """Change ``CONFIGS`` for one test."""
    from raven.kernels import gated_residual as kernels

    before = {kind: dict(config) for kind, config in kernels.CONFIGS.items()}

    def change(kind, **values):
        kernels.CONFIGS[kind].update(values)
        kernels.cut.cache_clear()

    yield change
    for kind, config in before.items():
        change(kind, **config)


@pytest.mark.interpret
def test_interpreted_in_blocks(triton_backend, configured):
    """Several tokens a block, the last one of a segment with fewer."""
    configured("backward", blocks=4)
    check_against_float64(Case(L=6, C=16))
    check_against_float64(Case(L=6, C=16, lengths=(1, 5), norm="affine"))


@pytest.mark.interpret
def test_interpreted_more_segments_than_a_grid_has(triton_backend, monkeypatch):
    from raven.kernels import gated_residual as kernels

    case = Case(L=4)
    want = case()
    monkeypatch.setattr(kernels, "MOST_IN_GRID", 1)
    for got, expected in zip(case(), want, strict=True):
        assert_bitwise(got, expected)


@pytest.mark.interpret
def test_interpreted_strides(triton_backend):
    check_strides(Case(L=2))


@pytest.mark.interpret
@pytest.mark.parametrize("unused", [0, 1])
def test_interpreted_output_not_used(triton_backend, unused):
    check_output_not_used(Case(L=2), unused)


@pytest.mark.interpret
def test_interpreted_empty(triton_backend):
    check_empty(L=0)


def check_alone_as_in_batch(case):
    """The bits of one token do not depend on the others, nor those of sums on the run."""
    want, gradients = check_against_float64(case)
    one = case.to(None)
    one.x, one.branch, one.table = case.x[1:, -1:], case.branch[1:, -1:], case.table[1:, -1:]
    for got, whole in zip(one(), want, strict=True):
        assert_bitwise(got, whole[1:, -1:].detach())
    leaves = [case.requiring_gradients() for _ in range(2)]
    runs = [
        torch.autograd.grad(sum(y.float().square().sum() for y in x()), x.leaves(), allow_unused=True) for x in leaves
    ]
    for first, second in zip(*runs, strict=True):
        assert first is None or torch.equal(first, second)


@pytest.mark.interpret
def test_interpreted_alone_as_in_batch(triton_backend):
    check_alone_as_in_batch(Case(L=2))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        {"L": 9360, "C": 1536, "B": 1},
        {"L": 1563, "C": 1536, "lengths": (1000, 563)},
        {"L": 66, "C": 5120, "norm": "affine"},
        {"L": 640, "C": 1536, "N": 1, "gated": False, "norm": "affine"},
        {"L": 130, "C": 8192, "norm": "none"},
        {"L": 130, "C": 100, "lengths": (129, 1)},
        {"L": 130, "C": 64, "lengths": (0, 130), "table": torch.bfloat16},
        {"L": 37, "C": 4100, "N": 37},
        {"L": 2, "C": 16384},
    ],
    ids=str,
)
def test_gpu(guarded, dtype, case):
    check_against_float64(Case(device="cuda", dtype=dtype, **case))


@pytest.mark.gpu
def test_gpu_residual_stream_of_another_dtype():
    case = Case(device="cuda", L=1000, C=1536, branch=torch.bfloat16)
    check_against_float64(case, dtype=torch.bfloat16)


@pytest.mark.gpu
def test_gpu_chosen():
    case = Case(device="cuda")
    assert raven.explain("gated_residual", case.x, case.branch).chosen == "triton"


@pytest.mark.gpu
def test_gpu_strides():
    check_strides(Case(device="cuda", L=50, C=1536, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("unused", [0, 1])
def test_gpu_output_not_used(unused):
    check_output_not_used(Case(device="cuda", L=50, C=1536), unused)


@pytest.mark.gpu
def test_gpu_empty():
    check_empty("cuda", L=0)


@pytest.mark.gpu
def test_gpu_alone_as_in_batch():
    check_alone_as_in_batch(Case(device="cuda", L=700, C=1536, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_every_path_has_the_same_bits(dtype):
    """With a gradient to come or not, segments of one length or of several, the norm in the same pass or behind it."""
    case = Case(device="cuda", L=800, C=1536, dtype=dtype)
    x_new, y = case()
    assert x_new.any() and y.any()
    for got, want in zip(case.requiring_gradients()(), (x_new, y), strict=True):
        assert_bitwise(got, want)
    rows = case.table.unbind(2)
    assert_bitwise(modulate(x_new, rows[3], rows[4]), y)
    case.lengths = (399, 401)
    for got, want in zip(case(), (x_new, y), strict=True):
        assert_bitwise(got[:, :399], want[:, :399])
        assert_bitwise(got[:, 400:], want[:, 400:])
    ones = torch.ones_like(rows[2])
    assert_bitwise(gated_residual(case.x, case.branch), gated_residual(case.x, case.branch, ones))


@pytest.mark.gpu
def test_gpu_nan_stays_in_its_token():
    case = Case(device="cuda", L=50, C=1536, dtype=torch.bfloat16)
    clean = case()
    case.branch[0, 7, 5] = math.nan
    others = torch.ones(2, 50, dtype=torch.bool, device="cuda")
    others[0, 7] = False
    x_new, y = case()
    assert y[0, 7].isnan().all() and x_new[0, 7].isnan().sum() == 1
    for got, want in zip((x_new, y), clean, strict=True):
        assert torch.equal(got[others], want[others])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, (300, 100)], ids=str)
def test_gpu_in_a_graph(lengths):
    """Captured once, replayed on other numbers: forward and backward."""
    case, new = (Case(device="cuda", L=400, C=1536, dtype=torch.bfloat16, lengths=lengths) for _ in range(2))

    def forward_and_backward(case):
        gate, shift, scale = case.table.unbind(2)[2:5]
        total, y, stats = _gated_residual_norm(case.x, case.branch, gate, shift, scale, lengths, 1e-6, torch.bfloat16)
        kinds = (torch.bfloat16, torch.bfloat16)
        return total, y, *_backward(total, y, total, stats, case.branch, gate, scale, lengths, *kinds, [True] * 5)

    expected = forward_and_backward(new)
    assert all(x.any() for x in expected)
    forward_and_backward(case)  # compiles, and makes the lists of segments and blocks
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_backward(case)
    for x, y in zip(case.leaves(), new.leaves(), strict=True):
        x.copy_(y)
    for _ in range(2):
        graph.replay()
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_gpu_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    C = 8192
    L = 2**31 // C + 3
    x = torch.zeros(1, L, C, dtype=torch.bfloat16, device="cuda")
    x[:, -5:].normal_()
    rows = torch.randn(1, 3, C, device="cuda")
    gate, shift, scale = (row[:, None] for row in rows.unbind(1))
    outputs = gated_residual(x, x, gate, shift=shift, scale=scale)
    last = x[:, -5:].double()
    total = reference.gated_sum(last, last, gate.double(), None)
    assert_rounded(outputs[0][:, -5:], total, "x_new")
    y, _ = reference_modulate(outputs[0][:, -5:].double(), shift.double(), scale.double(), None, 1e-6, torch.float64)
    assert_rounded(outputs[1][:, -5:], y, "y")
