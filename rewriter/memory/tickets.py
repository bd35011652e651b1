"""What stands for a tensor while it is in host memory, and the record of where it is."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from rewriter.memory.arena import Block
from rewriter.memory.layout import Layout


@dataclass(eq=False, slots=True)
class Copy:
    """One tensor on its way.

    Attributes:
        source: the tensor as it was offloaded, until its memory is given up.
        block: its bytes in host memory; None for an empty tensor.
        device: the tensor on the device again, until it is handed out.
        left, arrived: the events after the copies out and back.
        uses: how often it will be reloaded yet; 0 once it is over.
        written: whether somebody wrote to the source after it was offloaded.
        epoch: how many resets came before it.
        tile: whether it is a part of something that is never on the device as a whole.
    """

    source: torch.Tensor | None
    layout: Layout
    block: Block | None
    version: int
    group: Any
    epoch: int
    tile: bool = False
    device: torch.Tensor | None = None
    left: Any = None
    arrived: Any = None
    uses: int = 1
    written: bool = False

    def take_source(self) -> torch.Tensor:
        """The source, which the record holds no longer."""
        source, self.source = self.source, None
        assert source is not None
        self.written = version_of(source) != self.version
        return source


class Ticket:
    """Stands for an offloaded tensor; one that nobody holds any more gives its memory back."""

    __slots__ = ("_abandoned", "_copy", "nbytes", "__weakref__")

    def __init__(self, copy: Copy, abandoned: deque[Copy]):
        self._copy, self._abandoned = copy, abandoned
        self.nbytes = copy.layout.nbytes

    def __del__(self):
        # Python may collect garbage in the middle of any call, so that this only leaves a note for the next.
        copy = getattr(self, "_copy", None)  # none where an interrupt came before it was set
        if copy is not None and copy.uses:
            self._abandoned.append(copy)


def version_of(tensor: torch.Tensor) -> int:
    """Changes with each write in place; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def identity(tensor: torch.Tensor) -> tuple:
    """Equal for two tensors that are the same values in the same memory, while both are alive."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version_of(tensor))
