"""Which stream computes, where a caller changes it between steps."""

import pytest
import torch

from rewriter.memory.streams import Computing
from tests.memory.test_weights_ahead import _Stream


@pytest.fixture
def current(monkeypatch):
    """The stream that is current, and whether a graph is captured, as a GPU would say."""
    now = {"stream": None, "captures": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["captures"])
    return now


def test_a_stream_waits_for_the_one_that_computed_before_it_and_in_a_capture_for_none(current):
    log = []
    first, second = _Stream("first", log), _Stream("second", log)
    computing = Computing(torch.device("cuda"))
    for stream in (first, first, second, second, first):
        current["stream"] = stream
        assert computing.now() is stream
    assert log == [("second", "waits for all of", "first"), ("first", "waits for all of", "second")]
    current |= {"stream": second, "captures": True}
    assert computing.now() is None and len(log) == 2
    assert Computing(torch.device("cpu")).now() is None
