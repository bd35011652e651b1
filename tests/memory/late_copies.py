"""Copies that run as late as they may, on a CPU: where a wait is missing, somebody finds NaN.

A GPU runs a stream's copies when it comes to them, so that a wait that is missing seldom shows. Here a copy
on a side stream runs when the computing stream is told to wait for it and not before, while what computes
runs at once. Memory that is given up before its copy out has run holds NaN by then, and so does what is read
before its copy back has. Nobody may give up memory that a copy has yet to write to.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
)

from rewriter.memory.arena import HostArena
from rewriter.memory.streams import InOrder
from rewriter.memory.transfer import Transfers

Work = Callable[[], None]

_POISON = 255


class _Late:
    """A stream that does what it was given when somebody waits for it; an event is what makes it."""

    def __init__(self):
        self._waiting: list[Work] = []
        self._done = 0

    def add(self, work: Work) -> None:
        self._waiting.append(work)

    def record_event(self) -> Work:
        count = self._done + len(self._waiting)
        return lambda: self._run(count)

    def wait_event(self, event: Work) -> None:
        self.add(event)

    def wait_stream(self, stream: Any) -> None:
        self.add(stream.record_event())

    def synchronize(self) -> None:
        self.record_event()()

    def _run(self, count: int) -> None:
        with _disable_current_modes():
            while self._done < count:
                self._done += 1
                self._waiting.pop(0)()


class _Computing:
    """The stream that computes: all that it was given is done, at any time."""

    def wait_event(self, event: Work) -> None:
        event()

    def wait_stream(self, stream: Any) -> None:
        stream.record_event()()

    def record_event(self) -> Work:
        return lambda: None


class _Deferring(TorchDispatchMode):
    """Gives copies to a stream instead of running them."""

    def __init__(self, stream: _Late):
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target, source = _Place(args[0]), _Place(args[1])

        def copy() -> None:
            there, given = target.tensor(), source.tensor()
            assert there is not None, "memory was given up to which a copy was under way"
            there.fill_(_POISON) if given is None else there.copy_(given)

        self._stream.add(copy)
        return args[0]


def leave_all_streams() -> None:
    """After an interrupt, which may come between the last line within a ``with`` and its end."""
    while _get_current_dispatch_mode_stack():
        _pop_mode()


class _Place:
    """A tensor's memory, which others may free."""

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._lies = (tensor.storage_offset(), tensor.shape, tensor.stride())
        self._dtype = tensor.dtype

    def tensor(self) -> Tensor | None:
        storage = UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return None if storage is None else torch.empty(0, dtype=self._dtype).set_(storage, *self._lies)


class LateStreams(InOrder):
    """As ``streams.SideStreams``."""

    def __init__(self):
        self.out, self.back, self._computing = _Late(), _Late(), _Computing()

    def compute(self) -> Any:
        return self._computing

    def on(self, stream: Any) -> AbstractContextManager:
        return _Deferring(stream)

    def synchronize(self) -> None:
        self.out.synchronize()
        self.back.synchronize()


def late_transfers(arena: HostArena) -> Transfers:
    """On a CPU; what is given up is filled with NaN."""
    with patch("rewriter.memory.transfer.streams_of", lambda device: LateStreams()):
        return Transfers(arena, "cpu", poison=True)
