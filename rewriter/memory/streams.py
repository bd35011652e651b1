"""The streams that copies run on: two beside the computing one, so that both directions of the bus are used.

On a device without streams everything runs in place, in order: ``InOrder`` has the same words, and they do
nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Computing:
    """The stream that computes on ``device``, whichever it is now: a caller may change it between steps."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before: torch.cuda.Stream | None = None

    def now(self) -> Any:
        """The current stream, on which what was ordered on the one before holds too."""
        stream = torch.cuda.current_stream(self._device)
        if self._before is not None and stream != self._before:
            stream.wait_stream(self._before)
        self._before = stream
        return stream


class SideStreams:
    """``out`` to the host and ``back`` from it, beside whichever stream computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.out: Any = torch.cuda.Stream(device)
        self.back: Any = torch.cuda.Stream(device)
        self._computing = Computing(device)

    def compute(self) -> Any:
        """The stream that computes now."""
        return self._computing.now()

    def on(self, stream: Any) -> AbstractContextManager:
        return torch.cuda.stream(stream)

    def synchronize(self) -> None:
        """Wait, on the host, until nothing is being copied."""
        self.out.synchronize()
        self.back.synchronize()


class _Nothing:
    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self) -> "_Nothing":
        return self


class InOrder:
    """A device without streams: each copy has ended when its call returns."""

    def __init__(self):
        self.out: Any = _Nothing()
        self.back: Any = self.out

    def compute(self) -> Any:
        return self.out

    def on(self, stream: Any) -> AbstractContextManager:
        return nullcontext()

    def synchronize(self) -> None: ...


def streams_of(device: torch.device) -> SideStreams | InOrder:
    return SideStreams(device) if device.type == "cuda" else InOrder()


def with_index(device: torch.device) -> torch.device:
    """``device``; of CUDA's without a number, the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
