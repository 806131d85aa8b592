"""The bench harness and ``raven bench``: no row without its check, and files that read back as written."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from raven import backends, bench, cli

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def harness():
    spec = importlib.util.spec_from_file_location("bench_harness", BENCH / "harness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert merged["gpu"] == "NVIDIA X" and merged["versions"]["torch"] == "2.11.0"
    assert bench.merge_results([])["rows"] == []


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    results = stored()
    results["rows"].append(results["rows"][0] | {"peers": {}})
    path = bench.plot_results(results, tmp_path / "run.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_command_prints_a_stored_table(tmp_path, capsys):
    path = tmp_path / "run.json"
    bench.write_results(stored(), path)
    assert cli.main(["bench", "--table", str(path)]) == 0
    assert "repacked-60840" in capsys.readouterr().out


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
