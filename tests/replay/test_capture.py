"""What a recorder does before a recording runs, on streams that stand in for a GPU's."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from rewriter.replay.capture import CudaRecorder, uncollected
from rewriter.replay.lending import Lender, Lent


@pytest.fixture
def waited(monkeypatch):
    """The streams that the steps' own stream has waited for."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda **given: given)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return []


def _recorder(waited) -> CudaRecorder:
    recorder = CudaRecorder.__new__(CudaRecorder)
    recorder.__dict__.update(lender=Lender(), _home=SimpleNamespace(wait_stream=waited.append))
    return recorder


def _told(stream: torch.Stream) -> dict:
    return dict(stream_id=stream.stream_id, device_index=stream.device_index, device_type=0)


def test_while_one_thread_records_another_that_ends_does_not_let_garbage_be_collected():
    entered, collects = threading.Event(), []

    def record():
        with uncollected():
            entered.set()
            ended.wait(20)
            collects.append(gc.isenabled())

    assert gc.isenabled()
    ended, other = threading.Event(), threading.Thread(target=record)
    with uncollected():
        other.start()
        entered.wait(0.1)
    assert entered.wait(20)
    ended.set()
    other.join()
    assert collects == [False] and gc.isenabled()


def test_the_steps_stream_waits_once_for_each_that_used_what_is_back(waited):
    recorder, stream = _recorder(waited), torch.Stream("cpu")
    (given,) = recorder.lender.give(Lent([torch.ones(3)]))
    for _ in range(2):
        recorder.lender.used_on(given, stream)
    assert not recorder.reclaim([]) and not waited, "it is held"
    del given
    for _ in range(2):
        assert recorder.reclaim([])
    assert waited == [_told(stream)]


def test_the_steps_stream_waits_for_those_that_use_what_is_forgotten(waited):
    recorder, stream = _recorder(waited), torch.Stream("cpu")
    (given,) = recorder.lender.give(Lent([torch.ones(3)]))
    recorder.lender.used_on(given, stream)
    del given
    recorder.forget()
    assert waited == [_told(stream)]
