"""Who listens to ``record_stream`` may begin to at any time, in any thread."""

import functools
import threading
from contextlib import suppress

import pytest
import torch

from rewriter.replay import side_streams


@pytest.fixture
def telling(monkeypatch):
    """``record_stream`` of tensors on a CPU, which have none."""
    monkeypatch.setattr(side_streams, "_listen_on_gpus", lambda: None)
    library = torch.library.Library("aten", "IMPL")
    library.impl("record_stream", lambda tensor, stream: None, "CPU")
    telling = side_streams.telling("CPU")
    yield
    telling._destroy()
    library._destroy()


class Ear:
    def __init__(self, on_first=lambda: None):
        self.heard, self.on_first = 0, on_first

    def used_on(self, tensor, stream):
        self.heard += 1
        if self.heard == 1:
            self.on_first()


def test_one_may_begin_to_listen_while_others_are_told(telling):
    late = Ear()

    def another_thread_listens():
        thread = threading.Thread(target=side_streams.listen, args=(late,))
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    early = [Ear(another_thread_listens), Ear(another_thread_listens)]
    for ear in early:
        side_streams.listen(ear)
    for _ in range(2):
        torch.ones(2).record_stream(torch.Stream("cpu"))
    assert [ear.heard for ear in early] == [2, 2] and late.heard == 1


def test_two_threads_that_begin_to_listen_at_once_take_the_operators_place_once(monkeypatch):
    taken, both = [], threading.Barrier(2)

    def take_its_place():
        taken.append(True)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)

    monkeypatch.setattr(side_streams, "_listen_on_gpus", functools.cache(take_its_place))
    ears = [Ear(), Ear()]
    threads = [threading.Thread(target=side_streams.listen, args=(ear,)) for ear in ears]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
