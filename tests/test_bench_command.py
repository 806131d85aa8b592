"""``raven bench``: what it runs, what it keeps of a broken run, and stored tables."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from bench_files import BENCH, stored

from raven import bench, cli


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
