"""The bench harness and ``raven bench``: no row without its check, and files that read back as written."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from raven import backends, bench, cli
from raven._targets import TARGETS, format_targets
from raven.layout import ChunkLayout
from raven.spans import Spans
from raven.testing import attention_oracle

BENCH = Path(__file__).parents[1] / "bench"


def module_of(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness():
    return module_of("harness")


@pytest.fixture
def recorder(harness):
    recorder = harness.Recorder("cpu")
    recorder.copy_tb_per_s, recorder.matmul_tflop_per_s = 0.5, 0.25
    return recorder


def arguments(**changes):
    row = {"op": "add", "case": "small", "direction": "forward", "backend": "reference", "unit": "TB/s"}
    return row | {"check": lambda: None, "run": lambda: None, "work": 1e3} | changes


def test_row_has_what_the_results_promise(recorder):
    order = []
    row = recorder.row(
        **arguments(
            check=lambda: order.append("check") or {"out": 1e-7},
            run=lambda: order.append("run"),
            peers={"eager": lambda: order.append("peer")},
            extra={"peak_extra_bytes": 5},
        )
    )
    assert order[0] == "check" and {"run", "peer"} <= set(order)
    assert set(bench.ROW_KEYS) <= row.keys()
    assert row["rate"] == pytest.approx(1e3 / row["ms"] / 1e9) and row["roof"] == 0.5
    assert row["percent"] == pytest.approx(100 * row["rate"] / 0.5)
    assert row["peers"].keys() == {"eager"} and row["errors"] == {"out": 1e-7} and row["peak_extra_bytes"] == 5
    assert recorder.rows == [row]
    assert recorder.row(**arguments(unit="TFLOP/s"))["roof"] == 0.25


def test_a_failed_check_leaves_no_row_and_times_nothing(recorder):
    ran = []

    def check():
        raise AssertionError("wrong by 3")

    with pytest.raises(AssertionError, match="wrong by 3"):
        recorder.row(**arguments(check=check, run=lambda: ran.append(0), peers={"eager": lambda: ran.append(1)}))
    assert recorder.rows == [] and ran == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"unit": "GB/s"}, "unit: got 'GB/s'"), ({"direction": "sideways"}, "direction: got 'sideways'")],
)
def test_row_refuses(recorder, changes, message):
    with pytest.raises(ValueError, match=message):
        recorder.row(**arguments(**changes))
    assert recorder.rows == []


def test_peers_are_measured_once_for_all_backends(recorder):
    calls = {"made": 0, "run": 0}

    def make():
        calls["made"] += 1
        return {"other": lambda: calls.__setitem__("run", calls["run"] + 1)}

    first = recorder.row(**arguments(backend="cuda", peers=make))
    ran = calls["run"]
    second = recorder.row(**arguments(backend="triton", peers=make))
    assert calls == {"made": 1, "run": ran} and ran > 0
    assert second["peers"] == first["peers"] and [row["backend"] for row in recorder.rows] == ["cuda", "triton"]
    assert recorder.row(**arguments(direction="backward", peers=make))["peers"] and calls["made"] == 2


def test_a_wrong_peer_has_no_time(recorder):
    ran = []

    def check(name):
        if name == "wrong":
            raise AssertionError("wrong: error 1\nsecond line")
        return 0.25

    peers = {"wrong": lambda: ran.append(0), "right": lambda: None}
    row = recorder.row(**arguments(check=lambda: {"out": 0.5}, peers=peers, peer_check=check))
    assert row["peers"].keys() == {"right"} and row["errors"] == {"out": 0.5, "right": 0.25} and ran == []
    assert recorder.results()["left_out"] == {"wrong, add small forward": "AssertionError: wrong: error 1"}


def test_rounds_beyond_cache(harness):
    assert harness.rounds_beyond_cache(harness.CACHE_BYTES) == 1
    assert harness.rounds_beyond_cache(harness.CACHE_BYTES // 4) == 4
    assert harness.rounds_beyond_cache(0) == 64


def stored(**changes):
    row = {"op": "chunk_attention", "case": "repacked-60840", "direction": "forward", "backend": "triton"}
    row |= {"ms": 10.0, "rate": 660.0, "unit": "TFLOP/s", "roof": 750.0, "percent": 88.0, "timer": "events"}
    row |= {"peers": {"flex": 20.0, "cudnn": 8.0}} | changes
    versions = {"raven": "0.1.0", "torch": "2.11.0"}
    return {"gpu": "NVIDIA X", "date": "today", "versions": versions, "ceilings": {"copy_tb_per_s": 4.2}, "rows": [row]}


def test_table_shows_percentages_and_ratios():
    lines = bench.format_table(stored()).splitlines()
    assert lines[0] == "NVIDIA X, today" and "torch 2.11.0" in lines[1] and "copy 4.2 TB/s" in lines[2]
    assert "repacked-60840" in lines[-1] and "660 TFLOP/s" in lines[-1] and "88 %" in lines[-1]
    assert "2.00x flex" in lines[-1] and "0.80x cudnn" in lines[-1]


def test_table_has_the_yardstick_where_it_was_measured():
    heading, _, row = bench.format_table(stored(cudnn_dense_rate=600.0)).splitlines()[-3:]
    assert "of dense cuDNN" in heading and "1.10x" in row
    assert "of dense cuDNN" not in bench.format_table(stored())


def results_of(*rows):
    return stored() | {"rows": [stored(**row)["rows"][0] for row in rows]}


def lines_of(results):
    return {
        tuple(line.split()[:4]): line.split() for line in format_targets(results).splitlines() if "chunk_att" in line
    }


def test_targets_are_ratios_of_rows():
    main, fast = {"case": "repacked-60840", "backend": "cuda", "peers": {}}, "backward"
    lines = lines_of(
        results_of(
            main | {"rate": 660.0, "cudnn_dense_rate": 600.0},
            main | {"rate": 640.0, "cudnn_dense_rate": 500.0, "direction": fast},
            main | {"rate": 480.0, "direction": "backward-deterministic"},
            main | {"rate": 480.0, "backend": "triton", "cudnn_dense_rate": 600.0},
            main | {"rate": 600.0, "case": "ragged-pack-65520"},
            {"case": "decode-4680x4680", "backend": "cuda", "ms": 10.0, "peers": {"cudnn": 9.0, "fa4": 1.0}},
        )
    )
    name = ("chunk_attention", "repacked-60840")
    assert lines[(*name, "forward", "cuda")][4:] == "660 TFLOP/s dense cuDNN 1.100 1.05 1.18 holds".split()
    assert lines[(*name, "backward", "cuda")][-4:] == "1.280 1.00 1.17 goal".split()
    assert lines[(*name, "backward-deterministic", "cuda")][-4:] == "0.750 0.85 0.92 missed".split()
    assert lines[(*name, "forward", "triton")][-4:] == "0.800 1.05 1.18 missed".split()
    assert lines[("chunk_attention", "ragged-pack-65520", "forward", "cuda")][-4:] == "0.909 0.90 - holds".split()
    assert lines[("chunk_attention", "decode-4680x4680", "forward", "cuda")][-4:] == "0.900 1.00 1.30 missed".split()


def test_targets_without_a_figure_are_named():
    text = format_targets(results_of({"backend": "cuda", "cudnn_dense_rate": 600.0}))
    assert "without a figure in this run: chunk_attention repacked-60840 backward" in text
    assert format_targets(results_of({"backend": "reference"})) == ""


def test_every_target_names_a_row_of_the_benches():
    text = "".join(path.read_text() for path in bench.bench_files(BENCH))
    for target in (t for t in TARGETS if t.op in backends.operators()):
        kind, _, rest = target.case.partition("-")
        assert kind in text and rest.split("-")[0] in text and f'op="{target.op}"' in text, target.job


def test_results_read_back(tmp_path):
    path = tmp_path / "deep" / "run.json"
    bench.write_results(stored(ms=1.23456789), path)
    results = bench.read_results(path)
    assert results["rows"][0]["ms"] == 1.23457 and results["gpu"] == "NVIDIA X"
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_merged_runs_keep_every_row_and_ceiling():
    other = stored(op="gaussian_log_prob") | {"ceilings": {"copy_tb_per_s": 9.0, "matmul_tflop_per_s": 700.0}}
    merged = bench.merge_results([stored(), other])
    assert [row["op"] for row in merged["rows"]] == ["chunk_attention", "gaussian_log_prob"]
    assert merged["ceilings"] == {"copy_tb_per_s": 4.2, "matmul_tflop_per_s": 700.0}
    assert bench.merge_results([stored() | {"left_out": {"a": "b"}}, other])["left_out"] == {"a": "b"}
    assert merged["gpu"] == "NVIDIA X" and merged["versions"]["torch"] == "2.11.0"
    assert bench.merge_results([])["rows"] == []


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    results = stored()
    results["rows"].append(results["rows"][0] | {"peers": {}})
    (path,) = bench.plot_results(results, tmp_path / "run.json")
    assert path == tmp_path / "run.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_plots_of_two_backends_and_a_curve(tmp_path):
    pytest.importorskip("matplotlib")
    results = stored()
    results["ceilings"]["matmul_tflop_per_s"] = 750.0
    (row,) = results["rows"]
    row |= {"curve": "repacked", "intensity": 2e3, "cudnn_dense_rate": 600.0}
    results["rows"] = [
        row | {"backend": backend, "tokens": tokens, "case": f"repacked-{tokens}", "direction": direction}
        for backend in ("cuda", "triton")
        for tokens in (14040, 23400, 60840)
        for direction in ("forward", "backward", "backward-deterministic")
    ]
    results["rows"].append(stored(op="kv_append", case="tokens-4680", unit="TB/s", rate=4.0, roof=4.2)["rows"][0])
    paths = bench.plot_results(results, tmp_path / "run.json")
    assert [path.name for path in paths] == ["run.png", "run-roofline.png", "run-lengths.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_command_prints_a_stored_table(tmp_path, capsys):
    path = tmp_path / "run.json"
    results = stored(cudnn_dense_rate=600.0) | {"left_out": {"fa3": "ImportError: No module named fa3"}}
    bench.write_results(results, path)
    assert cli.main(["bench", "--table", str(path)]) == 0
    out = capsys.readouterr().out
    assert "repacked-60840" in out and "fa3: ImportError" in out and "targets" in out and "holds" in out


def test_command_draws_stored_tables_of_one_gpu_together(tmp_path, capsys):
    parts = [stored(), stored(op="kv_append", case="tokens-4680", unit="TB/s", rate=4.0, roof=4.2)]
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, part in zip(paths, (*parts, parts[0] | {"gpu": "another"}), strict=True):
        bench.write_results(part, path)
    assert cli.main(["bench", "--table", *map(str, paths[:2]), "--output", str(tmp_path / "both.json")]) == 0
    out = capsys.readouterr().out
    assert "repacked-60840" in out and "kv_append" in out
    assert (tmp_path / "both.png").exists() and not (tmp_path / "both.json").exists()
    assert cli.main(["bench", "--table", *map(str, paths)]) == cli.BAD_INPUT
    assert "expected those of one GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no JSON file"), ("[]", "has no rows"), ('{"rows": [{"op": "x"}]}', "without case, direction")],
)
def test_command_refuses_other_files(tmp_path, capsys, content, message):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert cli.main(["bench", "--table", str(path)]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_command_refuses_missing_files_folders_and_ops(tmp_path, capsys):
    assert cli.main(["bench", "--table", str(tmp_path / "none.json")]) == cli.BAD_INPUT
    assert cli.main(["bench", "--folder", str(tmp_path)]) == cli.BAD_INPUT
    assert "part of a checkout" in capsys.readouterr().err
    assert cli.main(["bench", "no_such_op"]) == cli.BAD_INPUT
    assert "got 'no_such_op', expected one of" in capsys.readouterr().err


def test_every_op_has_a_bench_file():
    importlib.import_module("raven.ops")  # registers them
    assert set(backends.operators()) <= {path.stem.removeprefix("bench_") for path in bench.bench_files(BENCH)}


SMALL_BENCH = """
def test_right(bench):
    bench.row(op="add", case="a", direction="forward", backend="reference", unit="TB/s", work=8.0,
              check=lambda: None, run=lambda: 1 + 1, peers={"other": lambda: 2})

def test_wrong(bench):
    def check():
        raise AssertionError("off by one")
    bench.row(op="add", case="b", direction="forward", backend="reference", unit="TB/s", work=8.0,
              check=check, run=lambda: 1 + 1)
"""


SLOW_BENCH = """
import time
from pathlib import Path

def test_first(bench):
    bench.row(op="sleep", case="quick", direction="forward", backend="reference", unit="TB/s", work=8.0,
              check=lambda: None, run=lambda: 1 + 1)

def test_second(bench):
    Path(__file__).with_name("started").touch()
    time.sleep(120)
"""


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    pytest.importorskip("pytest_benchmark")
    for name in ("conftest.py", "harness.py"):
        (tmp_path / name).write_text((BENCH / name).read_text())
    (tmp_path / "bench_add.py").write_text(SMALL_BENCH)
    (tmp_path / "bench_sleep.py").write_text(SLOW_BENCH)
    output = tmp_path / "run.json"
    command = [sys.executable, "-m", "raven.cli", "bench", "--folder", str(tmp_path), "--output", str(output)]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to the command alone, as `timeout` does; Ctrl-C reaches the bench as well
    assert process.wait(timeout=60) == 1
    assert [row["case"] for row in json.loads(output.read_text())["rows"]] == ["a", "quick"]


def test_command_runs_benches(tmp_path, capsys, monkeypatch):
    """The real thing on a folder of its own: one right row, one refused."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("conftest.py", "harness.py"):
        (tmp_path / name).write_text((BENCH / name).read_text())
    (tmp_path / "bench_add.py").write_text(SMALL_BENCH)
    output = tmp_path / "run.json"
    assert cli.main(["bench", "--folder", str(tmp_path), "--output", str(output)]) == 1
    out, err = capsys.readouterr()
    assert "failed: bench_add" in err and str(output) in out
    rows = json.loads(output.read_text())["rows"]
    assert [row["case"] for row in rows] == ["a"] and rows[0]["peers"]["other"] > 0


CLEAN = """========= COMPUTE-SANITIZER
case: attention
case: decode
========= ERROR SUMMARY: 0 errors
"""
DIRTY = """========= COMPUTE-SANITIZER
case: attention
========= Invalid __global__ write of size 4 bytes
=========     at raven::append<float, (int)3>(float *, raven::Rows<T1> &)+0x1b0 in /home/someone/csrc/rows.cuh:7
=========     Address 0x7f0000000400 is out of bounds
=========     Host Frame: main in /home/someone/run.py:3
========= Invalid __global__ write of size 4 bytes
RuntimeError: CUDA error
========= ERROR SUMMARY: 2 errors
"""


def test_sanitizer_summaries():
    sanitizer = module_of("sanitizer")
    assert sanitizer.summarise("memcheck", 0, CLEAN, 3.0) == (
        True,
        ["memcheck: clean, 2 cases, 3 s", "  ERROR SUMMARY: 0 errors"],
    )
    clean, lines = sanitizer.summarise("memcheck", 9, DIRTY, 3.0)
    text = "\n".join(lines)
    assert not clean and "NOT CLEAN, 1 cases" in lines[0] and "RuntimeError: CUDA error" in text
    assert text.count("Invalid __global__ write") == 1 and "someone" not in text and "7f0000000400" not in text
    assert "write of size 4 bytes\n  at raven::append+0x.. in rows.cuh:7\n" in text
    hazards = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    assert sanitizer.summarise("racecheck", 0, hazards, 1.0)[0]
    for output, code in ((CLEAN, 1), ("case: attention\n", 0), (hazards.replace("0 hazards", "3 hazards"), 0)):
        assert not sanitizer.summarise("racecheck", code, output, 1.0)[0], "a tool that did not finish is not clean"


def test_sanitizer_refuses(capsys, monkeypatch):
    sanitizer = module_of("sanitizer")
    with pytest.raises(SystemExit):
        sanitizer.main(["lint"])
    assert "got lint, expected some of memcheck" in capsys.readouterr().err
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    assert sanitizer.main([]) == 2
    assert "comes with the CUDA toolkit" in capsys.readouterr().err
    line = sanitizer.command("cs", "racecheck", "  --kernel-regex  ...")
    assert line[:3] == ["cs", "--tool", "racecheck"] and "kns=raven" in line
    assert "kns=raven" not in sanitizer.command("cs", "initcheck", "--kernel-regex")


class FakeWrapper:
    """flashinfer's surface: a plan, then calls."""

    def __init__(self, workspace, order):
        assert order == "NHD" and workspace.dtype == torch.uint8

    def plan(self, q_ends, k_ends, heads, key_heads, head_dim, causal, q_data_type):
        assert not causal and q_data_type == torch.float64
        self.ends = q_ends, k_ends

    def run(self, q, k, v):
        return varlen(q, k, v, *self.ends)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k):
    """One dense attention per pair of sequences."""
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        key, value = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * q.shape[-1] ** -0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(parts)


def fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False):
    assert not causal and max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k)


def fa4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, causal=False):
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k), "lse"


def magi(q, k, v, q_ranges, k_ranges, attn_type_map=None, deterministic=False):
    assert (attn_type_map == 0).all() and len(attn_type_map) == len(q_ranges) == len(k_ranges)
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (begin, end), (first, last) in zip(q_ranges.tolist(), k_ranges.tolist(), strict=True):
        mask[begin:end, first:last] = True
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v), "lse"


FAKES = {
    "fa3": ("flash_attn_interface", {"flash_attn_varlen_func": fa3}),
    "fa4": ("flash_attn.cute", {"flash_attn_varlen_func": fa4}),
    "magi": ("magi_attention.functional", {"flex_flash_attn_func": magi}),
    "flashinfer": ("flashinfer", {"BatchPrefillWithRaggedKVCacheWrapper": FakeWrapper}),
}


@pytest.mark.parametrize("spans", [ChunkLayout.repacked((1, 2, 1), 3).spans, Spans.full(5, 9)], ids=["packed", "full"])
@pytest.mark.parametrize("name", FAKES)
def test_peers_do_the_same_job(name, spans, monkeypatch):
    """Against packages with the same surface: gathered keys, and gradients back at their tokens."""
    module, functions = FAKES[name]
    fake = ModuleType(module)
    fake.__dict__.update(functions)
    for parent in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, parent, fake)
    peers = module_of("peers")
    q, k, v, grad = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (spans.q_end, *[spans.kv_end] * 2, spans.q_end))
    out, _, *grads = attention_oracle(q[None], k[None], v[None], spans, grad_out=grad[None])
    peer = peers.PEERS[name](q, k, v, spans, False)
    got = peer.results(grad if peer.differentiable else None, len(q), len(k))
    assert peer.differentiable == (name != "flashinfer") and len(got) == (4 if peer.differentiable else 1)
    for a, b in zip(got, (out, *grads), strict=False):
        torch.testing.assert_close(a, b.float())


def test_peers_that_are_not_there_say_so(monkeypatch):
    peers = module_of("peers")
    x = torch.randn(3, 1, 8)
    for name, (module, _) in FAKES.items():
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
        with pytest.raises(peers.FAILURES):
            peers.PEERS[name](x, x, x, Spans.full(3, 3), False)


def test_peers_without_a_deterministic_backward_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    fake = ModuleType("flash_attn.cute")
    fake.flash_attn_varlen_func = fa4
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fake)
    x = torch.randn(3, 1, 8)
    with pytest.raises(NotImplementedError, match="no deterministic backward"):
        module_of("peers").PEERS["fa4"](x, x, x, Spans.full(3, 3), True)
