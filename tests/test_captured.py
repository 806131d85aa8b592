"""Small tables on the device that caches may drop, while a captured CUDA graph still reads them."""

import weakref

import pytest
import torch

from raven import graphs, rows
from raven.ops import gaussian_step

CPU = torch.device("cpu")
TABLES = {
    "frequencies": (lambda: rows.frequency_table(16, 123.0, CPU), rows._frequency_table),
    "borders": (lambda: gaussian_step.borders((1, 2), CPU), gaussian_step._borders),
}


@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_a_graph_keeps_what_it_reads(name, capturing, monkeypatch):
    make, cached = TABLES[name]
    monkeypatch.setattr(graphs, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    table = weakref.ref(make())
    assert table() is not None
    cached.cache_clear()
    assert (table() is not None) == capturing


def test_nothing_is_kept_of_nothing(monkeypatch):
    monkeypatch.setattr(graphs, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gaussian_step.borders((2, 2), CPU) is None and gaussian_step.borders(None, CPU) is None
    assert not graphs._captured
