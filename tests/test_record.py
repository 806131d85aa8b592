"""The record of a test run counts every end once, and names what failed and why others were left out."""

from types import SimpleNamespace

from record import summary


def report(nodeid, why=None):
    return SimpleNamespace(nodeid=nodeid, longrepr=("conftest.py", 1, f"Skipped: {why}") if why else None)


def test_summary():
    stats = {
        "passed": [report("tests/test_a.py::test_1"), report("tests/test_a.py::test_2[x::y]")],
        "failed": [report("tests/test_b.py::test_3")],
        "error": [report("tests/test_a.py::test_4")],
        "skipped": [report(f"tests/test_b.py::test_{n}", "needs two GPUs") for n in (5, 6)],
        "deselected": [report("tests/test_b.py::test_7")],
    }
    assert summary(stats) == {
        "passed": 2,
        "failed": 1,
        "error": 1,
        "skipped": 2,
        "failures": ["tests/test_a.py::test_4", "tests/test_b.py::test_3"],
        "left_out": {"needs two GPUs": 2},
        "files": {"tests/test_a.py": {"passed": 2, "error": 1}, "tests/test_b.py": {"failed": 1, "skipped": 2}},
    }
