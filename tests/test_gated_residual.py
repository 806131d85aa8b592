"""gated_residual: the reference against a plain statement of the formula, the Triton kernels against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F

import raven
from raven import backends
from raven.ops import gated_residual, modulate
from raven.ops.gated_residual import _backward, _gated_residual, _gated_residual_norm
from raven.reference import gated_residual as reference
from raven.reference.modulate import modulate as reference_modulate
from raven.testing import assert_bitwise

# Unit roundoff of each dtype, and room for the float32 arithmetic before that one rounding.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
ARITHMETIC = 3e-6
NORMS = ("none", "modulated", "affine")


class Case:
    """Arguments of the op: x and branch [B, L, C], a table [B, N, 6, C] whose slices are gate, shift and scale."""

    def __init__(
        self, B=2, L=6, N=2, C=24, dtype=torch.float32, branch=None, table=None, lengths=None, gated=True,
        norm="modulated", device="cpu",
    ):  # fmt: skip
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = 0.5 + torch.randn(B, L, C, dtype=wide, device=device).to(dtype)
        self.branch = torch.randn(B, L, C, dtype=wide, device=device).to(branch or dtype)
        self.table = torch.randn(B, N, 6, C, dtype=wide, device=device).to(table or wide)
        self.weight = torch.rand(C, dtype=wide, device=device).to(table or wide) + 0.5
        self.bias = torch.randn(C, dtype=wide, device=device).to(table or wide)
        self.lengths, self.gated, self.norm = lengths, gated, norm

    def leaves(self):
        return [self.x, self.branch, self.table, self.weight, self.bias]

    def to(self, dtype):
        other = object.__new__(Case)
        other.__dict__ = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.__dict__.items()}
        return other

    def requiring_gradients(self):
        other = self.to(None)
        for name in ("x", "branch", "table", "weight", "bias"):
            setattr(other, name, getattr(self, name).detach().requires_grad_())
        return other

    def __call__(self, op=gated_residual, **kwargs):
        rows = self.table.unbind(2)
        if self.norm == "modulated":
            kwargs |= {"shift": rows[3], "scale": rows[4]}
        elif self.norm == "affine":
            kwargs |= {"weight": self.weight, "bias": self.bias}
        out = op(self.x, self.branch, rows[2] if self.gated else None, self.lengths, **kwargs)
        return out if isinstance(out, tuple) else (out,)


def plainly(x, branch, gate=None, lengths=None, *, shift=None, scale=None, weight=None, bias=None, eps=1e-6):
    """The formula of the docstring, with every table row repeated for its tokens."""

    def spread(rows):
        each = [x.shape[1] // rows.shape[1]] * rows.shape[1] if lengths is None else list(lengths)
        return rows.repeat_interleave(torch.tensor(each, device=rows.device), dim=1)

    total = x + (branch if gate is None else spread(gate) * branch)
    if weight is not None:
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    if scale is None:
        return total
    return total, F.layer_norm(total, total.shape[-1:], None, None, eps) * (1 + spread(scale)) + spread(shift)


def assert_rounded(got, want, name):
    """``got`` is the float64 ``want``, computed in float32 and rounded once to its own dtype."""
    assert got.shape == want.shape and torch.isfinite(got).all(), name
    slack = 1.01 * ROUNDING[got.dtype] * want.abs() + ARITHMETIC * max(1.0, float(want.abs().max())) + 2.0**-25
    excess = (got.double() - want).abs() - slack
    assert excess.max() <= 0, f"{name}: error above the rounding of {got.dtype} by {excess.max():.2e}"


def check_against_float64(case, **kwargs):
    """Outputs and all gradients; what follows the rounded sum is held against float64 from that sum on."""
    leaves = case.requiring_gradients()
    outputs = leaves(**kwargs)
    grads = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves.leaves(), grads, allow_unused=True)

    exact = case.to(torch.float64)
    rows, lengths = exact.table.unbind(2), case.lengths
    gate = rows[2] if case.gated else None
    total, stats, scale, norm = outputs[0].detach().double(), None, None, case.norm != "none"
    assert_rounded(outputs[0], reference.gated_sum(exact.x, exact.branch, gate, lengths), "x_new")
    if norm:
        shift, scale = (exact.bias, exact.weight) if case.norm == "affine" else rows[3:5]
        y, stats = reference_modulate(total, shift, scale, lengths, kwargs.get("eps", 1e-6), torch.float64)
        assert_rounded(outputs[1], y, "y")
    wide = [g.double() for g in grads] + [None]
    wanted = (True, True, case.gated, norm, norm)
    want = reference.backward(*wide[:2], total, stats, exact.branch, gate, scale, lengths, (torch.float64,) * 2, wanted)
    d_x, d_branch, d_table, d_weight, d_bias = gradients
    got = [d_x, d_branch]
    if case.gated:
        got.append(d_table[:, :, 2])
    if norm:
        got += [d_bias, d_weight] if case.norm == "affine" else [d_table[:, :, 3], d_table[:, :, 4]]
    names = [name for name, want in zip(("x", "branch", "gate", "shift", "scale"), wanted, strict=True) if want]
    for name, a, b in zip(names, got, want, strict=True):
        assert_rounded(a, b, f"gradient of {name}")
    return outputs, gradients


# The reference


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lengths", [None, (1, 5), (6, 0)], ids=str)
def test_reference_is_the_formula(norm, gated, lengths):
    case = Case(dtype=torch.float64, norm=norm, gated=gated, lengths=lengths)
    for got, want in zip(case(), case(plainly), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_reference_rounds_once(dtype, norm):
    check_against_float64(Case(dtype=dtype, norm=norm, lengths=(2, 4)))


def test_residual_stream_of_another_dtype():
    """As under autocast: float32 stream, bfloat16 branch, bfloat16 input of the next layer."""
    case = Case(branch=torch.bfloat16)
    x_new, y = case(dtype=torch.bfloat16)
    assert x_new.dtype == torch.float32 and y.dtype == torch.bfloat16
    check_against_float64(case, dtype=torch.bfloat16)


def test_norm_is_of_the_rounded_sum():
    case = Case(dtype=torch.bfloat16)
    x_new, y = case()
    rows = case.table.unbind(2)
    assert_bitwise(y, modulate(x_new, rows[3], rows[4]))
    assert_bitwise(x_new, Case.__call__(_without_norm(case))[0])


def _without_norm(case):
    other = case.to(None)
    other.norm = "none"
    return other


# The op


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lengths", [None, (0, 3)], ids=str)
def test_gradcheck(norm, gated, lengths):
    case = Case(B=1, L=3 if lengths else 4, C=5, dtype=torch.float64, norm=norm, gated=gated, lengths=lengths)
    leaves = case.requiring_gradients()

    def run(*tensors):
        leaves.x, leaves.branch, leaves.table, leaves.weight, leaves.bias = tensors
        return leaves()

    assert torch.autograd.gradcheck(run, leaves.leaves())


def test_opcheck():
    case = Case(C=5, B=1).requiring_gradients()
    x, branch, table, weight, bias = case.leaves()
    gate, shift, scale = (row.detach().requires_grad_() for row in table.unbind(2)[:3])
    for lengths in (None, (2, 4)):
        torch.library.opcheck(_gated_residual, (x, branch, gate, lengths))
        torch.library.opcheck(_gated_residual_norm, (x, branch, gate, shift, scale, lengths, 1e-6, torch.float32))
    torch.library.opcheck(_gated_residual_norm, (x, branch, None, bias, weight, None, 1e-6, torch.bfloat16))
    total, y, stats = (t.detach() for t in _gated_residual_norm(x, branch, gate, shift, scale, None, 1e-6, x.dtype))
    arguments = (total, y, total, stats, branch.detach(), gate.detach(), scale.detach(), None)
    for wanted in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(_backward, (*arguments, torch.float32, torch.bfloat16, wanted))


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_to_one_graph(norm):
    case = Case(norm=norm)
    eager, compiled = case.requiring_gradients(), case.requiring_gradients()
    run = torch.compile(lambda *x, **k: gated_residual(*x, **k), fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(run), eager()
    grads = [torch.randn_like(y) for y in expected]
    gradients = [
        torch.autograd.grad(out, c.leaves(), grads, allow_unused=True)
        for out, c in ((outputs, compiled), (expected, eager))
    ]
    for got, want in zip((*outputs, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def check_output_not_used(case, unused):
    """A loss on one output alone: the gradients are those for zeros in the other."""
    first, second = case.requiring_gradients(), case.requiring_gradients()
    outputs = first()
    grad = torch.randn_like(outputs[1 - unused])
    got = torch.autograd.grad(outputs[1 - unused], first.leaves(), grad, allow_unused=True)
    zeros = torch.zeros_like(outputs[unused])
    want = torch.autograd.grad(
        second(), second.leaves(), [zeros, grad] if unused == 0 else [grad, zeros], allow_unused=True
    )
    assert all(a.any() for a in got if a is not None)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unused", [0, 1])
@pytest.mark.parametrize(("norm", "gated"), [("modulated", True), ("affine", False)])
def test_output_not_used(unused, norm, gated):
    check_output_not_used(Case(norm=norm, gated=gated), unused)


def test_gradients_only_where_asked():
    for name in ("x", "branch", "table", "weight", "bias"):
        case = Case(norm="affine" if name in ("weight", "bias") else "modulated")
        everything = case.requiring_gradients()
        want = dict(
            zip(
                ("x", "branch", "table", "weight", "bias"),
                torch.autograd.grad(
                    sum(y.square().sum() for y in everything()), everything.leaves(), allow_unused=True
                ),
                strict=True,
            )
        )
        leaf = getattr(case, name).requires_grad_()
        (got,) = torch.autograd.grad(sum(y.square().sum() for y in case()), leaf)
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-6)


def test_without_a_gate_x_and_branch_share_their_gradient():
    leaves = Case(gated=False, norm="affine").requiring_gradients()
    d_x, d_branch = torch.autograd.grad(sum(y.square().sum() for y in leaves()), [leaves.x, leaves.branch])
    assert torch.equal(d_x, d_branch)
    leaves = Case(gated=False, norm="affine", branch=torch.bfloat16).requiring_gradients()
    d_x, d_branch = torch.autograd.grad(sum(y.square().sum() for y in leaves()), [leaves.x, leaves.branch])
    assert torch.equal(d_x.bfloat16(), d_branch)


def check_strides(case):
    """Slices of wider tensors, and another order in memory, give the bits of packed copies."""
    want = case()
    assert all(y.any() for y in want)
    other = case.to(None)
    other.x = torch.cat((case.x, case.x), dim=2)[..., : case.x.shape[2]]
    other.branch = case.branch.transpose(0, 1).contiguous().transpose(0, 1)
    other.table = case.table.transpose(1, 2).contiguous().transpose(1, 2)
    for got, expected in zip(other(), want, strict=True):
        assert_bitwise(got, expected)
    other.branch = case.branch.transpose(1, 2).contiguous().transpose(1, 2)
    for got, expected in zip(other(), want, strict=True):
        assert_bitwise(got, expected)


def test_strides():
    check_strides(Case())


def check_empty(device="cpu", **shape):
    leaves = Case(device=device, **shape).requiring_gradients()
    outputs = leaves()
    assert [y.shape for y in outputs] == [leaves.x.shape] * 2
    sum(y.sum() for y in outputs).backward()
    assert torch.equal(leaves.table.grad, torch.zeros_like(leaves.table))


@pytest.mark.parametrize("shape", [{"L": 0}, {"B": 0}, {"L": 0, "lengths": (0, 0)}], ids=str)
def test_empty(shape):
    check_empty(**shape)


def arguments_of(case):
    rows = case.table.unbind(2)
    return {"x": case.x, "branch": case.branch, "gate": rows[2], "shift": rows[3], "scale": rows[4], "lengths": None}


ERRORS = [
    (ValueError, r"x: got shape \(6, 24\)", lambda a: {"x": a["x"][0]}),
    (TypeError, "x: got dtype int32", lambda a: {"x": a["x"].int()}),
    (ValueError, "branch: got shape", lambda a: {"branch": a["branch"][:, :5]}),
    (TypeError, "branch: got dtype int64", lambda a: {"branch": a["branch"].long()}),
    (ValueError, "branch: got device meta", lambda a: {"branch": a["branch"].to("meta")}),
    (ValueError, r"gate: got shape \(2, 2, 23\), expected \[2, N, 24\]", lambda a: {"gate": a["gate"][..., 1:]}),
    (TypeError, "gate: got dtype bool", lambda a: {"gate": a["gate"] > 0}),
    (ValueError, "gate: got no segment", lambda a: {k: a[k][:, :0] for k in ("gate", "shift", "scale")}),
    (ValueError, r"shift: got shape \(2, 1, 24\), expected \[2, 2, 24\]", lambda a: {"shift": a["shift"][:, :1]}),
    (ValueError, r"scale: got shape", lambda a: {"scale": a["scale"][0]}),
    (ValueError, "scale: got None together with shift", lambda a: {"scale": None}),
    (ValueError, "shift: got None together with scale", lambda a: {"shift": None}),
    (ValueError, "weight, bias: got them together with shift or scale", lambda a: {"weight": a["x"][0, 0]}),
    (
        ValueError,
        "bias: got None together with weight",
        lambda a: {"weight": a["x"][0, 0], "shift": None, "scale": None},
    ),
    (
        ValueError,
        r"weight: got shape \(23,\), expected \[24\]",
        lambda a: {"weight": a["x"][0, 0, 1:], "bias": a["x"][0, 0], "shift": None, "scale": None},
    ),
    (ValueError, r"lengths: got \(3, 2\), expected 2 lengths that sum to 6", lambda a: {"lengths": (3, 2)}),
    (ValueError, r"lengths: got \(6,\)", lambda a: {"lengths": (6,)}),
    (ValueError, r"lengths: got \(7, -1\)", lambda a: {"lengths": (7, -1)}),
    (
        ValueError,
        "lengths: got None for 5 tokens and 2 segments",
        lambda a: {"x": a["x"][:, :5], "branch": a["branch"][:, :5]},
    ),
    (ValueError, "eps: got nan", lambda a: {"eps": math.nan}),
    (TypeError, "dtype: got torch.int32", lambda a: {"dtype": torch.int32}),
]


@pytest.mark.parametrize(("error", "message", "change"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_arguments(error, message, change):
    arguments = arguments_of(Case())
    with pytest.raises(error, match=message):
        gated_residual(**(arguments | change(arguments)))


def test_no_channels():
    x = torch.zeros(1, 2, 0)
    with pytest.raises(ValueError, match="x: got 0 channels"):
        gated_residual(x, x)


def test_forward_mode_derivative_is_not_dropped():
    x = torch.randn(1, 3, 8)
    with pytest.raises(NotImplementedError, match="gated_residual: forward-mode derivatives"):
        torch.func.jvp(lambda x: gated_residual(x, x), (x,), (x,))


def test_says_which_backend_runs():
    case = Case(dtype=torch.float64)
    reasons = raven.explain("gated_residual", case.x, case.branch).reasons
    assert reasons["cuda"] == "gated_residual has no cuda implementation"
    assert "float64" in reasons["triton"] and reasons["reference"] is None
    wide = torch.zeros(1, 1, 16385)
    assert "16385 channels" in raven.explain("gated_residual", wide, wide).reasons["triton"]


def test_triton_by_name_is_not_replaced(triton_backend):
    with pytest.raises(raven.BackendUnavailableError, match="float64"):
        Case(dtype=torch.float64)()


def test_registered():
    assert "gated_residual" in backends.operators()
