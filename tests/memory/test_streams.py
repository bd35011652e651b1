"""Which stream computes, where a caller changes it between steps."""

import pytest
import torch

from rewriter.memory.shelf import Shelf
from rewriter.memory.streams import Computing
from tests.memory.test_weights_ahead import _Stream

GPU = torch.device("cuda")


@pytest.fixture
def current(monkeypatch):
    """The stream that is current, and whether a graph is captured, as a GPU would say."""
    now = {"stream": None, "captures": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["captures"])
    return now


@pytest.mark.parametrize("computing", [Computing(GPU).now, Shelf(GPU).stream])
def test_a_stream_waits_for_the_one_that_computed_before_it(current, computing):
    log = []
    first, second = _Stream("first", log), _Stream("second", log)
    for stream in (first, first, second, second, first):
        current["stream"] = stream
        assert computing() is stream
    assert log == [("second", "waits for all of", "first"), ("first", "waits for all of", "second")]


def test_what_is_captured_waits_for_nothing_outside(current):
    shelf, log = Shelf(GPU), []
    for stream, captures in ((_Stream("first", log), False), (_Stream("second", log), True)):
        current |= {"stream": stream, "captures": captures}
        assert shelf.stream() is (None if captures else stream)
    assert not log and Shelf(torch.device("cpu")).stream() is None
