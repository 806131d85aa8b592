"""read_rows: rows of a cache scaled back and rotated, written where they should be and nowhere else."""

import pytest
import torch
from rope_cases import assert_rounded

import raven
from raven.ops import qk_norm_rope, read_rows
from raven.ops.read_rows import _read_rows

CANARY = -77.0
FLOAT8 = torch.float8_e4m3fn
ROWS = (6, -1, 0, 2, 7)


def make(stored=torch.float32, dtype=torch.float32, scaled=True, rotated=True, B=2, S=9, H=3, D=16, device="cpu"):
    """Arguments of the op itself: (cache, rows, out, scale, positions, theta)."""
    cache = torch.randn(B, S, H, D, device=device).to(stored)
    rows = torch.tensor(ROWS, dtype=torch.int32, device=device)
    out = torch.full(cache.shape, CANARY, dtype=dtype, device=device)
    scale = torch.rand(B, S, H, device=device) + 0.5 if scaled else None
    positions = torch.randint(-5, 3000, (len(ROWS), 3), dtype=torch.int32, device=device) if rotated else None
    return cache, rows, out, scale, positions, 10000.0


def check(arguments):
    """Against qk_norm_rope in float64, whose rotation is held against its own oracle."""
    cache, rows, out, scale, positions, theta = arguments
    read_rows(*arguments)
    kept = rows >= 0
    index = rows[kept].long()
    want = cache.double()[:, index]
    if scale is not None:
        want = want * scale.double()[:, index].unsqueeze(-1)
    if positions is not None:
        want, _ = qk_norm_rope(want, want, None, None, positions[kept], theta=theta)
    if (scale, positions, cache.dtype) == (None, None, out.dtype):
        assert torch.equal(out[:, index], cache[:, index])
    if out.dtype == torch.float64:
        torch.testing.assert_close(out[:, index], want, rtol=1e-12, atol=1e-12)
    else:
        assert_rounded(out[:, index], want)
    others = [row for row in range(cache.shape[1]) if row not in index.tolist()]
    assert (out[:, others] == CANARY).all()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, FLOAT8])
def test_rule(stored, scaled, rotated):
    check(make(stored, scaled=scaled, rotated=rotated))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    check(make(dtype if dtype == torch.float64 else torch.float16, dtype))


def test_empty():
    cache, rows, out, scale, positions, theta = make()
    read_rows(cache, rows[:0], out, scale, positions[:0], theta)
    assert (out == CANARY).all()


@pytest.mark.parametrize("given", [True, False])
def test_opcheck(given):
    torch.library.opcheck(_read_rows, make(scaled=given, rotated=given))


def test_compiles_to_one_graph():
    arguments = make(FLOAT8)
    f = torch.compile(read_rows, fullgraph=True, backend="aot_eager")
    eager = arguments[2].clone()
    read_rows(*arguments[:2], eager, *arguments[3:])
    f(*arguments)
    assert torch.equal(arguments[2], eager)


NAMES = ("cache", "rows", "out", "scale", "positions", "theta")
ERRORS = [
    (ValueError, "cache: got shape", lambda a: {"cache": a["cache"][0]}),
    (ValueError, "out: got shape", lambda a: {"out": a["out"][:1]}),
    (ValueError, "scale: got shape", lambda a: {"scale": a["scale"][:, :2]}),
    (ValueError, "positions: got shape", lambda a: {"positions": a["positions"][:2]}),
    (ValueError, "rows: got device meta", lambda a: {"rows": a["rows"].to("meta")}),
    (ValueError, "theta: got 0", lambda a: {"theta": 0}),
    (ValueError, "head dim 15", lambda a: {"cache": a["cache"][..., :15], "out": a["out"][..., :15]}),
    (ValueError, "cache: got requires_grad=True", lambda a: {"cache": a["cache"].requires_grad_()}),
    (TypeError, "rows: got dtype int64", lambda a: {"rows": a["rows"].long()}),
    (TypeError, "scale: got dtype float64", lambda a: {"scale": a["scale"].double()}),
    (TypeError, "out: got dtype float8_e4m3fn", lambda a: {"out": a["out"].to(FLOAT8)}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    arguments = dict(zip(NAMES, make(), strict=True))
    with pytest.raises(error, match=message):
        read_rows(**arguments | change(arguments))
    assert (arguments["out"] == CANARY).all()


def test_unpacked_tensors_are_for_the_reference():
    cache, rows, out, *others = make()
    turned = cache.transpose(1, 2).contiguous().transpose(1, 2)
    reasons = raven.explain("read_rows", turned, out, others[0]).reasons
    assert "cache has strides" in reasons["triton"] and reasons["reference"] is None
    many = torch.empty(65536, 2, 1, 16, device="meta")
    assert "cache has batch 65536, more than the 65535" in raven.explain("read_rows", many, many).reasons["triton"]
    check((turned, rows, out, *others))


@pytest.mark.interpret
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_interpreted(triton_backend, stored, given):
    arguments = make(stored, stored, given, given)
    read_rows(*arguments)
    raven.set_backend("reference")
    want = torch.full_like(arguments[2], CANARY)
    read_rows(*arguments[:2], want, *arguments[3:])
    torch.testing.assert_close(arguments[2], want, rtol=1e-3 if stored == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, FLOAT8])
@pytest.mark.parametrize("sizes", [(12, 128), (40, 128), (3, 32)], ids=str)
def test_gpu(sizes, stored, rotated):
    H, D = sizes
    arguments = make(stored, torch.bfloat16, stored == FLOAT8, rotated, H=H, D=D, device="cuda")
    assert raven.explain("read_rows", arguments[0], arguments[2], arguments[3]).chosen == "triton"
    check(arguments)


@pytest.mark.gpu
def test_gpu_graph():
    """Captured once, it follows what the rows and positions hold at each replay."""
    arguments = make(FLOAT8, torch.bfloat16, H=12, D=128, device="cuda")
    cache, rows, out, scale, positions, theta = arguments
    read_rows(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read_rows(*arguments)
    rows.copy_(torch.tensor([1, 3, -1, 4, 8], dtype=torch.int32))
    positions += 7
    out.fill_(CANARY)
    graph.replay()
    want = torch.full_like(out, CANARY)
    read_rows(cache, rows, want, scale, positions, theta)
    assert torch.equal(out, want) and (out[:, [0, 2, 5, 6, 7]] == CANARY).all()
    assert (out[:, [1, 3, 4, 8]] != CANARY).any()
