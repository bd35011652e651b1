"""What is said, and done, at the end of a recording that failed."""

import pytest
import torch

from rewriter.replay import ending
from rewriter.replay.ending import ended

POOL, DEVICE = (0, 1), torch.device("cuda", 0)


class Graph:
    """Cannot be ended where what was recorded made it invalid."""

    def __init__(self, is_valid):
        self.ended, self.is_valid = 0, is_valid

    def capture_end(self):
        self.ended += 1
        if not self.is_valid:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def told(monkeypatch):
    """What the allocator and the generator are told."""
    calls = []
    monkeypatch.setattr(ending, "_tell_generator", lambda device: calls.append(device))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):

        def tell(index, pool, name=name):
            calls.append((name, index, pool))

        monkeypatch.setattr(torch._C, name, tell, raising=False)
    return calls


OVER = [("_cuda_endAllocateToPool", 0, POOL), ("_cuda_releasePool", 0, POOL), DEVICE]


@pytest.mark.parametrize("is_valid", [True, False])
def test_the_cause_is_told_and_pytorch_that_it_is_over(told, is_valid):
    graph = Graph(is_valid)
    with pytest.raises(ValueError, match="the cause"), ended(graph, POOL, DEVICE):  # pyright: ignore
        raise ValueError("the cause")
    assert graph.ended == 1
    assert told == ([] if is_valid else OVER), "PyTorch tells it itself"


def test_a_recording_that_cannot_be_ended_fails(told):
    with ended(Graph(is_valid=True), POOL, DEVICE):  # pyright: ignore
        pass
    assert not told
    with (
        pytest.raises(RuntimeError, match="previous error"),
        ended(Graph(is_valid=False), POOL, DEVICE),  # pyright: ignore
    ):
        pass
    assert told == OVER


def test_an_end_that_failed_later_is_not_told_again(monkeypatch, told):
    def refuse(index, pool):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse, raising=False)
    with (
        pytest.raises(RuntimeError, match="previous error"),
        ended(Graph(is_valid=False), POOL, DEVICE),  # pyright: ignore
    ):
        pass
    assert told == [DEVICE], "the graph gives its pool back"
