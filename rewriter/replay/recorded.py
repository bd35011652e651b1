"""Device memory that recordings hold, for plans that count what is there.

A recording's pool is free memory to the allocator's count of tensors, and to nobody else: what lies there
between a forward and its backward is no tensor of PyTorch's any more.
"""

from typing import Protocol
from weakref import WeakKeyDictionary

import torch


class Holder(Protocol):
    """Makes recordings; see ``capture.CudaRecorder``."""

    def bytes(self) -> int: ...


_holders: WeakKeyDictionary[Holder, torch.device] = WeakKeyDictionary()


def count(holder: Holder, device: torch.device) -> None:
    """Have what ``holder`` records on ``device`` counted for as long as it is there."""
    _holders[holder] = device


def recorded_bytes(device: torch.device) -> int:
    """What all recordings on ``device`` hold."""
    return sum(holder.bytes() for holder, where in tuple(_holders.items()) if where == device)
