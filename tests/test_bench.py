"""The bench harness: no row without its check, tables and targets, and files that read back as written."""

import importlib

import pytest
from bench_files import BENCH, arguments, module_of, stored

from raven import backends, bench
from raven._targets import TARGETS, format_targets


@pytest.fixture(scope="module")
def harness():
    return module_of("harness")


@pytest.fixture
def recorder(harness):
    recorder = harness.Recorder("cpu")
    recorder.copy_tb_per_s, recorder.matmul_tflop_per_s = 0.5, 0.25
    return recorder


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


def test_versions_of_peers_are_kept(recorder):
    recorder.uses("pytest", "no-such-package")
    own = recorder.results()["versions"]
    assert own["pytest"] == pytest.__version__ and "no-such-package" not in own and "torch" in own
    merged = bench.merge_results([stored(), stored() | {"versions": {"torch": "2", "flash-attn-4": "4"}}])
    assert merged["versions"] == {"raven": "0.1.0", "torch": "2.11.0", "flash-attn-4": "4"}


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


def test_every_op_has_a_bench_file():
    importlib.import_module("raven.ops")  # registers them
    assert set(backends.operators()) <= {path.stem.removeprefix("bench_") for path in bench.bench_files(BENCH)}
