"""A head's weight on its way before it is read: ordered by events, taken once, gone after the step."""

from unittest.mock import patch

import pytest
import torch

from rewriter.kernels.host_weight import COMING
from rewriter.memory import head_ahead
from rewriter.memory.head_ahead import HeadAhead, HeadBegun
from tests.memory.test_weights_ahead import _Streams

CPU = torch.device("cpu")


def read(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.rewriter.host_weight(torch.empty(0), weight)


def test_the_copy_comes_after_what_was_computed_and_its_reader_after_the_copy():
    streams = _Streams()
    weight, ahead = torch.randn(3, 4), HeadAhead(CPU, streams)
    ahead(weight)
    assert streams.log[:2] == [("back", "waits for all of", "compute"), ("back", "copies", "")]
    copied = len(streams.log)
    assert torch.equal(read(weight), weight)
    assert [entry[:2] for entry in streams.log[copied:]] == [("compute", "waits for")]
    assert not COMING
    ahead.let_go()
    assert len(streams.log) == copied + 1


def test_what_was_not_read_is_waited_for_and_gone_after_a_step_that_failed():
    streams = _Streams()
    weight = torch.randn(3, 4)

    def program(weight):
        begun.copier(weight)
        raise ValueError

    ahead, begun = HeadAhead(CPU, streams), HeadBegun(None, CPU, {})  # type: ignore[arg-type]
    with patch.object(head_ahead, "head_ahead_on", lambda _: ahead), pytest.raises(ValueError):
        begun.within(program)(weight)
    assert streams.log[-1][:2] == ("compute", "waits for") and not COMING


def test_without_memory_for_it_the_head_copies_it_when_it_comes():
    weight, ahead = torch.randn(3, 4), HeadAhead(CPU, _Streams())
    with patch.object(head_ahead.torch, "empty_like", side_effect=torch.OutOfMemoryError):
        assert ahead(weight) == ()
    assert not COMING and torch.equal(read(weight), weight)
