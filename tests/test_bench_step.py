"""``raven bench step``: rows of jobs that take seconds, limits and phases in the report, the bench on tiny models."""

import json
import math
import sys

import pytest
import torch
from bench_files import BENCH, arguments, module_of, stored
from torch.utils.flop_counter import FlopCounterMode

from raven import bench, cli
from raven._targets import LIMITS, format_targets
from raven.layout import ChunkLayout
from raven.models import CausalWan, WanConfig

SIZES = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 3, "in_dim": 2, "out_dim": 2}
SMALL = WanConfig(**SIZES, freq_dim=16, text_dim=8, text_len=5)


@pytest.fixture(scope="module")
def wan_step():
    sys.modules["harness"] = module_of("harness")  # as beside it in bench/
    return module_of("wan_step")


@pytest.fixture
def recorder(wan_step):
    recorder = sys.modules["harness"].Recorder("cpu")
    recorder.copy_tb_per_s = 0.5
    return recorder


def test_row_of_a_job_with_its_own_measurement(recorder):
    order = []
    row = recorder.row(
        **arguments(
            check=lambda: order.append("check"),
            run=None,
            measure=lambda: order.append("measure") or 250.0,
            extra=lambda: {"seconds": 0.25, "order": list(order)},
        )
    )
    assert row["ms"] == 250.0 and row["order"] == ["check", "measure"] and row["seconds"] == 0.25
    assert row["rate"] == pytest.approx(1e3 / 250 / 1e9)
    for changes in ({"run": None}, {"measure": lambda: 1.0}):
        with pytest.raises(ValueError, match="run, measure: got (both|neither), expected one of them"):
            recorder.row(**arguments(**changes))
    assert len(recorder.rows) == 1


def row_of(**changes):
    row = {"op": "step", "case": "repacked-60840-selective", "direction": "forward+backward", "backend": "cuda"}
    return stored()["rows"][0] | row | {"peers": {}} | changes


def lines_of(*rows):
    text = format_targets(stored() | {"rows": list(rows)})
    return [line.split() for line in text.splitlines() if line.startswith("step ")], " ".join(text.split())


@pytest.mark.parametrize(
    ("backend", "seconds", "verdict"),
    [("cuda", 2.1, "goal"), ("cuda", 2.4, "holds"), ("cuda", 2.6, "missed"), ("triton", 2.6, "holds")],
)
def test_limits_are_absolute(backend, seconds, verdict):
    (time, memory), text = lines_of(row_of(backend=backend, seconds=seconds, peak_gib=22.5))
    assert time[3:7] == [backend, f"{seconds}", "s", "at"] and time[-1] == verdict
    assert memory[-4:] == ["1.023", "22", "-", "missed"]
    assert "step repacked-60840-full forward+backward (GiB)" in text


def test_limits_from_below_and_without_their_figure(monkeypatch):
    limit = type(LIMITS[0])("stream", "fast", "forward", "frames_per_s", "frames/s", 38.0, 48.0, at_least=True)
    monkeypatch.setattr("raven._targets.LIMITS", (limit,))
    row = row_of(op="stream", case="fast", direction="forward")
    for figure, verdict in ((37.0, "missed"), (40.0, "holds"), (50.0, "goal")):
        text = format_targets(stored() | {"rows": [row | {"frames_per_s": figure}]})
        line = next(line for line in text.splitlines() if line.startswith("stream fast"))
        assert line.endswith(verdict) and "at least" in line
    assert "stream fast" not in format_targets(stored() | {"rows": [row]}).split("without a figure")[0]


def test_phases_in_report_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    phases = {"rollout": 3000.0, "student backward": 1000.0}
    official = {"official_seconds": 5.54, "official_peak_gib": 26.5}
    rows = [row_of(phases_ms=phases, peak_gib=80.0), row_of(case="b", phases_ms=phases, peak_gib=9.0, **official)]
    results = stored() | {"rows": rows}
    lines = bench.format_phases(results).splitlines()
    assert lines[0] == "step repacked-60840-selective, cuda: 4 s, peak 80.0 GiB" and len(lines) == 6
    assert lines[3].endswith("9.0 GiB (official code, measured earlier on an H200: 5.54 s, 26.5 GiB)")
    assert lines[1].split() == ["rollout", "3000.0", "ms", "75.0", "%"]
    assert bench.format_phases(stored()) == ""
    names = [path.name for path in bench.plot_results(results, tmp_path / "run.json")]
    assert names == ["run.png", "run-phases.png"]


def test_operations_are_those_of_the_model(wan_step):
    """Against PyTorch's counter, which sees every product of the reference but its attention over spans."""
    size = wan_step.Size(SMALL, (2, 4, 6), (1, 2, 1), 2)
    model = CausalWan(SMALL)
    inputs = wan_step.Inputs(size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        inputs.forward(model)
    got = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    linear, attention = wan_step.repacked_flops(size)
    tokens, video = size.layout.length, size.video_tokens
    ends = 2 * SMALL.dim * 4 * (2 * tokens + 2 * video)  # patch embedding and head
    levels = len(size.layout.segments)
    time = 2 * levels * (SMALL.freq_dim + SMALL.dim + 6 * SMALL.dim) * SMALL.dim
    assert linear == pytest.approx(got - ends - time, rel=0.02)
    text = 4 * SMALL.dim * SMALL.text_len * (2 * tokens + video)
    layout = ChunkLayout.repacked((1, 2, 1), 6)
    assert attention == text + 3 * layout.flops(SMALL.num_heads, SMALL.dim // SMALL.num_heads)
    assert wan_step.with_backward((2.0, 2.0)) == 13.0


def test_rollout_counts_every_pass(wan_step):
    size = wan_step.Size(SMALL, (2, 4, 6), (1, 2), 3)
    passes = [(6, 6 * 6, 4), (12, 12 * 18, 3)]  # tokens, pairs, steps and all but the last clean pass
    want = sum(n * sum(wan_step.forward_flops(SMALL, tokens, pairs)) for tokens, pairs, n in passes)
    assert wan_step.rollout_flops(size) == want


def test_numbers_that_are_not_right_are_refused(wan_step):
    for bad in ([torch.zeros(2)], [torch.ones(2), torch.tensor([math.nan])], [torch.tensor([math.inf])], [None], []):
        with pytest.raises(AssertionError, match="weights: "):
            wan_step.assert_finite("weights", bad)
    assert wan_step.assert_finite("weights", [torch.tensor([3.0, 4.0])]) == pytest.approx(5.0)


def test_slice_refuses_wrong_gradients(wan_step, monkeypatch):
    size = wan_step.Size(SMALL, (2, 4, 6), (1, 2, 1), 2)
    errors = wan_step.slice_errors(size, "none")
    assert set(errors) == {"velocity", "gradient", "gradient of the worst matrix"} and max(errors.values()) < 0.05
    forward = wan_step.Inputs.forward

    def wrong(self, model):  # only where checkpointing is asked for: neither the baseline nor float64
        v = forward(self, model)
        return v if model.gradient_checkpointing != "full" else v + 0.05 * (v - v.detach())

    monkeypatch.setattr(wan_step.Inputs, "forward", wrong)
    with pytest.raises(AssertionError, match="gradient: relative RMS error"):
        wan_step.slice_errors(size, "full")


def test_bench_runs_on_tiny_models(tmp_path, capfd, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "run.json"
    assert cli.main(["bench", "step", "-k", "smoke", "--folder", str(BENCH), "--output", str(output)]) == 0
    rows = {row["case"]: row for row in json.loads(output.read_text())["rows"]}
    modes = [f"repacked-smoke-{mode}" for mode in ("none", "selective", "full")]
    assert list(rows) == [*modes, "raven-smoke", "cm-grpo-smoke"]
    for row in rows.values():
        assert row["seconds"] == pytest.approx(sum(row["phases_ms"].values()) / 1e3, rel=1e-4) and row["errors"]
    assert "teacher score" in rows["raven-smoke"]["phases_ms"] and "rewards" in rows["cm-grpo-smoke"]["phases_ms"]
    out, err = capfd.readouterr()
    assert "where the time goes" in out and "raven-smoke, reference: step 1 of 1" in err
