"""The peers of the attention bench do the same job: held against packages with the same parameters."""

import sys
from types import SimpleNamespace

import peer_packages
import pytest
import torch
from bench_files import arguments, module_of

from raven.layout import ChunkLayout
from raven.spans import Spans
from raven.testing import attention_oracle

MASKS = {
    "packed": ChunkLayout.repacked((1, 2, 1), 3).spans,
    "blocks": ChunkLayout.repacked((2, 1, 2), 75, sink=1, window=2).spans,
    "wide": ChunkLayout.teacher_forcing((4, 3), 70).spans,
    "full": Spans.full(5, 9),
}
NAMES = ("fa3", "fa4", "fa4-blocks", "magi", "flashinfer")


@pytest.fixture
def peers(monkeypatch):
    for name, package in peer_packages.packages().items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "peers_blocks", module_of("peers_blocks"))  # as beside it in bench/
    return module_of("peers")


def tensors(spans):
    lengths = (spans.q_end, spans.kv_end, spans.kv_end, spans.q_end)
    return [torch.randn(n, 2, 8, dtype=torch.float64) for n in lengths]


def assert_same_job(peers, name, spans, deterministic=False):
    q, k, v, grad = tensors(spans)
    out, _, *grads = attention_oracle(q[None], k[None], v[None], spans, grad_out=grad[None])
    peer = peers.PEERS[name](q, k, v, spans, deterministic)
    got = peer.results(grad if peer.differentiable else None, len(q), len(k))
    assert peer.differentiable == (name != "flashinfer") and len(got) == (4 if peer.differentiable else 1)
    for a, b in zip(got, (out, *grads), strict=False):
        torch.testing.assert_close(a, b.float())
    return peer


def test_every_peer_is_held_against_its_package(peers):
    assert set(peers.PEERS) == set(peers.PACKAGES) == set(NAMES) and set(peers.MASKED) <= set(NAMES)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_peers_do_the_same_job(peers, name, mask, deterministic):
    """Gathered keys, or the mask itself; gradients back at their tokens; a row's name says what is not counted."""
    if name == "fa4-blocks" and deterministic:
        with pytest.raises(NotImplementedError, match="deterministic"):
            peers.PEERS[name](*tensors(MASKS[mask])[:3], MASKS[mask], True)
        return
    peer = assert_same_job(peers, name, MASKS[mask], deterministic)
    gathered = mask != "full" and name in ("fa3", "fa4", "flashinfer")
    assert peer.label(name) == (f"{name}, keys gathered before" if gathered else name)


@pytest.mark.parametrize("mask", MASKS)
def test_magi_attention_before_its_options_were_renamed(peers, mask, monkeypatch):
    functional = sys.modules["magi_attention.functional"]
    monkeypatch.setattr(functional, "flex_flash_attn_func", peer_packages.magi_old)
    assert_same_job(peers, "magi", MASKS[mask])


def test_lists_of_blocks_hold_whole_ones(peers):
    """Otherwise the comparison above would not look at them."""
    blocks = sys.modules["peers_blocks"]
    spans = MASKS["wide"]
    partly, wholly = blocks.block_lists(blocks.range_table(spans, 128), spans.kv_end, 128)
    assert partly[0].sum() > 0 and wholly[0].sum() > 0


def test_peers_of_an_attention_row(peers, monkeypatch):
    """Torch's own attention is a peer without a package; the versions of the packages of others are noted."""
    for name in ("harness", "peers"):
        monkeypatch.setitem(sys.modules, name, module_of(name))
    bench = module_of("bench_chunk_attention")
    job = bench.Job(lambda: Spans.full(5, 9), cudnn=True, others=True)
    case = bench.Case(job, 2, 8, torch.float64)
    monkeypatch.setattr(bench, "DEVICE", "cuda")
    recorder = SimpleNamespace(noted=[], uses=lambda package: recorder.noted.append(package), leave_out=pytest.fail)
    found = case.peers(SimpleNamespace(peers=True, recorder=recorder), "forward")
    assert set(found) == {"cudnn", "fa3", "fa4", "magi", "flashinfer"}
    assert recorder.noted == [peers.PACKAGES[name] for name in found if name != "cudnn"]


def test_norm_and_rotary_of_flashinfer(peers, monkeypatch):
    """Every peer of the bench, at the size of one frame."""
    monkeypatch.setitem(sys.modules, "harness", module_of("harness"))
    bench = module_of("bench_qk_norm_rope")
    case = bench.Case(2 * bench.ROWS * bench.COLS, 2, 64, torch.float32)
    for other in (bench.by_flashinfer(case), lambda: bench.as_models_write_it(*case.inputs)):
        assert case.check_forward_of(other) < 1e-5
    with pytest.raises(AssertionError, match="relative RMS error"):
        case.check_forward_of(lambda: (case.q, case.k))


def test_the_packages_refuse_what_they_do_not_know():
    q, k, v, _ = tensors(MASKS["full"])
    for function in (peer_packages.fa3_dense, peer_packages.fa4_dense, peer_packages.magi):
        with pytest.raises(TypeError, match="cu_seqlen_q"):
            function(q[None], k[None], v[None], cu_seqlen_q=None)
    with pytest.raises(TypeError, match="max_seqlen_k"):
        peer_packages.magi(q, k, v, max_seqlen_k=3)


def test_a_compiler_of_a_peer_may_fail_in_its_own_way(monkeypatch):
    """CuTe's errors are no RuntimeError: the peer is left out, the row stays."""
    error = type("DSLBaseError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", peer_packages.module("common", DSLBaseError=error))

    def fails():
        raise error("no kernel for this")

    recorder = module_of("harness").Recorder("cpu")
    row = recorder.row(**arguments(peers={"fa4": fails, "other": int}, peer_check=lambda name: 0.0))
    assert row["peers"].keys() == {"other"}
    assert recorder.left_out == {"fa4, add small forward": "DSLBaseError: no kernel for this"}


def test_peers_that_are_not_there_say_so(peers, monkeypatch):
    for name in peer_packages.packages():
        monkeypatch.setitem(sys.modules, name, None)
    q, k, v, _ = tensors(MASKS["packed"])
    for name in peers.PEERS:
        with pytest.raises(ImportError):
            peers.PEERS[name](q, k, v, MASKS["packed"], False)
