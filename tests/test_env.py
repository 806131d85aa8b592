"""``raven env``: facts for programs and for people."""

import json
import os
import subprocess
import sys

import pytest
import torch

import raven
from raven import backends, env


def test_facts_are_true():
    facts = env.collect()
    assert facts["raven"] == raven.__version__ and facts["torch"] == torch.__version__
    assert facts["packages"]["numpy"] is not None
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["no_gpu"] is None) == bool(facts["gpus"])
    assert facts["ops"].keys() == {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}


def test_every_op_is_explained():
    for ops in env.collect()["ops"].values():
        assert tuple(ops) == backends.operators()
        assert "chunk_attention" in ops
        for choice in ops.values():
            assert choice["reasons"].keys() == set(backends.BACKENDS)
            assert choice["reasons"]["reference"] is None
            assert choice["reasons"][choice["chosen"]] is None


@pytest.mark.skipif(backends.interpreting(), reason="the interpreter runs Triton on the CPU")
def test_cpu_uses_the_reference():
    for choice in env.collect()["ops"]["cpu"].values():
        assert choice["chosen"] == "reference"
        assert choice["reasons"]["triton"] is not None


def test_text_names_everything(capsys):
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"raven {raven.__version__}, Python ")
    assert "planner in" in text and "backend: chosen automatically" in text
    for op in backends.operators():
        assert f"\n  {op}: " in text
    if not torch.cuda.is_available():
        assert "no GPU: " in text


def test_json_is_the_same(capsys):
    assert env.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(env.collect()))


def test_backend_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("RAVEN_BACKEND", "cuda")
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert "backend asked for: cuda" in text and "chunk_attention: no backend can run this" in text


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("RAVEN_BACKEND", "cudda")
    with pytest.raises(ValueError, match="RAVEN_BACKEND: got 'cudda'"):
        env.collect()


def test_a_name_that_is_no_backend():
    with pytest.raises(ValueError, match="name: got 'gpu', expected one of cuda, triton, reference"):
        raven.set_backend("gpu")
    with pytest.raises(ValueError, match="op: got 'attention', expected one of .*chunk_attention, consistency_step"):
        raven.explain("attention")


def test_explain_needs_no_other_import():
    code = "import raven, torch; q = torch.ones(1, 1, 1, 32); print(raven.explain('chunk_attention', q, q, q).chosen)"
    environment = {**os.environ, "RAVEN_BACKEND": "reference"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "reference"
