"""What bench/sanitizer.py makes of the words of compute-sanitizer."""

import pytest
from bench_files import module_of

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
