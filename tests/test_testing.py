"""The public test tools: each must fail when it should."""

import pytest
import torch
from choices import kernels_alone

import raven
from raven.layout import ChunkLayout
from raven.ops import blend_rows
from raven.reference.chunk_attention import dense_attention
from raven.spans import Spans
from raven.testing import (
    Tolerance,
    assert_as_accurate,
    assert_bitwise,
    attention_oracle,
    copy_rate,
    guarded,
    matmul_rate,
    oracles,
    poisoned_memory,
    relative_rms,
    time_ms,
    tolerance,
)


def test_relative_rms():
    want = torch.tensor([3.0, 4.0])
    assert relative_rms(want + torch.tensor([0.3, 0.4]), want) == pytest.approx(0.1)
    assert relative_rms(torch.tensor([float("nan"), 4.0]), want) == float("inf")
    assert relative_rms(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_rms(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_rms(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(ValueError, match=r"got: got shape \(1,\)"):
        relative_rms(torch.zeros(1), torch.zeros(2))


def test_assert_as_accurate():
    want = torch.ones(4, dtype=torch.float64)
    limit = Tolerance(rms=1e-2)
    assert assert_as_accurate(want + 1e-3, want, want + 1e-3, limit) == pytest.approx(1e-3)
    with pytest.raises(AssertionError, match="out: relative RMS error 2.000e-02, expected at most 1.0e-02"):
        assert_as_accurate(want + 2e-2, want, None, limit, "out")
    with pytest.raises(AssertionError, match="at most 2 times the baseline's 1.000e-03"):
        assert_as_accurate(want + 3e-3, want, want + 1e-3, limit)
    with pytest.raises(AssertionError, match="inf"):
        assert_as_accurate(want * float("nan"), want, None, limit)


def test_tolerance_is_the_designs():
    assert tolerance(torch.bfloat16, "forward").rms == 6e-3
    assert tolerance(torch.bfloat16, "backward") == Tolerance(1e-2, 2.0)
    with pytest.raises(TypeError, match="dtype: got torch.int32"):
        tolerance(torch.int32)
    with pytest.raises(ValueError, match="direction: got 'sideways'"):
        tolerance(torch.float32, "sideways")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_assert_bitwise(dtype):
    x = torch.tensor([0, 1, 2]).to(dtype)
    assert_bitwise(x, x.clone())
    with pytest.raises(AssertionError, match=r"1 of 3 elements differ, first at \[1\]"):
        assert_bitwise(x, torch.tensor([0, 2, 2]).to(dtype))
    with pytest.raises(AssertionError, match="dtype"):
        assert_bitwise(x, x.to(torch.float16))
    with pytest.raises(AssertionError, match="shape"):
        assert_bitwise(x, x[:2])


def test_assert_bitwise_sees_signs_and_accepts_nan():
    with pytest.raises(AssertionError, match="1 of 1"):
        assert_bitwise(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert_bitwise(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_poisoned_memory():
    with poisoned_memory():
        assert torch.empty(64).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.float16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="inside"), poisoned_memory():
        raise RuntimeError("inside")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("index", [-1, 6])
def test_guarded_sees_writes_on_either_side(index):
    x, check = guarded((2, 3), margin=8)
    assert x.shape == (2, 3) and x.isnan().all()
    x.fill_(1.0)
    check()
    torch.as_strided(x, (1,), (1,), x.storage_offset() + index).fill_(0.0)
    with pytest.raises(AssertionError, match="1 of 8 elements"):
        check()


@pytest.mark.parametrize(
    "spans",
    [
        ChunkLayout.repacked((2, 1, 2), 3, sink=1, window=1).spans,
        Spans.full(7, 11),
        Spans([[2, 5]], [0, 1], [[1, 4]]),
        Spans([], [0], []),
    ],
)
def test_attention_oracle(spans, monkeypatch):
    monkeypatch.setattr(oracles, "_ROWS", 4)
    q_len, kv_len = max(spans.q_end, 8), max(spans.kv_end, 8)
    q, grad = (torch.randn(2, q_len, 4, 8) for _ in range(2))
    k, v = (torch.randn(2, kv_len, 2, 8) for _ in range(2))
    out, lse, *grads = attention_oracle(q, k, v, spans, grad_out=grad)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense_attention(*leaves, spans.dense_mask(q_len, kv_len), 8**-0.5)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(lse, want_lse.detach())
    for got, w in zip(grads, torch.autograd.grad(want, leaves, grad.double()), strict=True):
        torch.testing.assert_close(got, w)
    assert len(attention_oracle(q, k, v, spans)) == 2


def test_a_silent_fallback_is_seen(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RAVEN_BACKEND", raising=False)

    def blend(dtype):
        blend_rows(torch.ones(1, 4, 1, 16, dtype=dtype), None, 0, 2, 1, 0.5)

    with pytest.raises(AssertionError, match="plain PyTorch on cpu, and nobody asked for it: blend_rows"):
        with kernels_alone("cpu"):
            blend(torch.float32)
    raven.set_backend("reference")
    with kernels_alone("cpu"):
        blend(torch.float32)
    raven.set_backend(None)
    with kernels_alone("cpu"):
        blend(torch.float64)
    with kernels_alone():
        blend(torch.float32)


def test_timers_on_a_cpu():
    calls = []
    assert time_ms(lambda: calls.append(0), "cpu", repeats=3, at_least_ms=0.0, warmup_ms=0.0) > 0
    assert len(calls) >= 3
    turns = []
    time_ms([lambda: turns.append(0), lambda: turns.append(1)], "cpu", repeats=2, at_least_ms=0.0, warmup_ms=0.0)
    assert turns.count(0) == turns.count(1)
    assert copy_rate("cpu") > 0 and matmul_rate("cpu", 32) > 0
