"""Layers' frozen weights from host memory, on the device before they are read: a layer ahead.

    with weights.on_device(here, names, backward=False):     # layer i runs; those of layer i+1 are copied

While a layer runs, the stream of copies to the device brings the weights of the one that runs next: the layer
after it in the forward, the one before it in the backward. They lie in two buffers that take turns, each as
large as a layer's weights: 109 MB of an 8B Llama in NF4, 2 ms of the bus at 55 GB/s. Kernels then read device
memory, once a tile if they run in tiles, and not the bus. In the backward they come after the activations
that the layer itself asks for, and before those of layers below. At the turn from forward to backward both
buffers hold what is read first.

Ordered by events alone, as in ``transfer.py``: a copy into a buffer waits for what the computing stream was
given so far, the last reader of that buffer included; the computing stream waits for a copy before its layer.
The buffers are given up with their last use: after the backward of the first layer that has one, or the last
forward where none has. A layer whose weights nobody foresaw has them copied when it asks.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewriter.memory.streams import InOrder, SideStreams

BUFFERS = 2
_ALIGNED = 512
_POISON = 255


@dataclass(eq=False)
class _Buffer:
    """Device memory for the weights of one layer: of the layer whose key it has, once they ``arrived``."""

    bytes: Tensor
    key: int | None = None
    tensors: list[Tensor] = field(default_factory=list)
    arrived: Any = None


class WeightsAhead:
    """The weights of the layers that run now and next.

    Args:
        device: the one that computes.
        streams: its own, shared with the activations' copies.
        poison: overwrite a buffer before each copy into it, to show a wait that is missing.

    Attributes:
        bytes_in: copied to the device since the beginning.
        late: layers whose copy began when they asked for it.
    """

    def __init__(self, device: torch.device, streams: SideStreams | InOrder, poison: bool = False):
        self.device, self.poison = device, poison
        self.bytes_in = self.late = 0
        self._streams = streams
        self._buffers: list[_Buffer] = []
        self._after: dict[int, list[weakref.ref[Tensor]]] = {}
        self._before: dict[int, list[weakref.ref[Tensor]]] = {}
        # Keys of the layers that run in the forward alone, since the beginning of their program.
        self._once: set[int] = set()

    def begin(self, layers: Sequence[Sequence[Tensor]]) -> None:
        """A program begins in which layers with these weights run, in this order.

        What buffers hold counts no longer: weights may have been written since.
        """
        for buffer in self._buffers:
            buffer.key = None
        keys = [_key(weights) for weights in layers]
        held: list[list[weakref.ref[Tensor]]] = [[weakref.ref(w) for w in weights] for weights in layers]
        self._once.difference_update(keys)
        self._after |= dict(zip(keys, [*held[1:], []], strict=True))
        self._before |= dict(zip(keys, [[], *held[:-1]], strict=True))

    @contextmanager
    def on_device(
        self, here: dict[str, Any], names: Sequence[str], *, backward: bool, returns: bool = False
    ) -> Iterator[None]:
        """Within it ``here`` has ``names`` on the device, and those of the layer that runs next are copied.

        Args:
            returns: whether a backward comes after this forward, and reads again what is there.
        """
        weights = [here[name] for name in names]
        if not (backward or returns):
            self._once.add(_key(weights))
        following = self._following(weights, backward)
        try:
            here.update(zip(names, self._arrived(weights, following), strict=True))
            yield
        except BaseException:
            # The step is over, and where memory was short two layers' weights would stay. Copies may have
            # been cut short, before anybody noted when they arrive.
            self._streams.compute().wait_stream(self._streams.back)
            self._buffers.clear()
            raise
        if not following and not returns:
            self.let_go()

    def _arrived(self, weights: Sequence[Tensor], following: Sequence[Tensor]) -> list[Tensor]:
        """``weights`` on the device, for what is computed from now on; those ``following`` on their way."""
        buffer = self._buffer_of(_key(weights))
        if buffer is None:
            self.late += 1
            buffer = self._fetch(weights)
        self._streams.compute().wait_event(buffer.arrived)
        if following and self._buffer_of(_key(following)) is None:
            self._fetch_ahead(following, buffer)
        return buffer.tensors

    def let_go(self) -> None:
        """Give up the buffers: whoever computes in their memory comes after the copies into it."""
        for buffer in self._buffers:
            if buffer.arrived is not None:
                self._streams.compute().wait_event(buffer.arrived)
        self._buffers.clear()

    def _following(self, weights: Sequence[Tensor], backward: bool) -> list[Tensor]:
        """Of the layer that runs next; none where that is not known, or they are in host memory no more."""
        chain = self._before if backward else self._after
        device, alive = weights[0].device, list(weights)
        while alive:
            found = [reference() for reference in chain.get(_key(alive), [])]
            alive = [w for w in found if w is not None and w.device == device]
            if len(alive) < len(found):
                return []
            if not backward or (alive and _key(alive) not in self._once):
                break
        return alive

    def _buffer_of(self, key: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.key == key), None)

    def _fetch_ahead(self, weights: Sequence[Tensor], in_use: _Buffer) -> None:
        try:
            self._fetch(weights, in_use)
        except torch.OutOfMemoryError:
            # The step can still succeed: the copy then begins at its use.
            return

    def _fetch(self, weights: Sequence[Tensor], in_use: _Buffer | None = None) -> _Buffer:
        buffer = self._room(buffer_bytes(w.nbytes for w in weights), in_use)
        buffer.key, buffer.tensors = None, list(_parts(buffer.bytes, weights))
        compute, back = self._streams.compute(), self._streams.back
        if self.poison:
            if buffer.arrived is not None:
                compute.wait_event(buffer.arrived)
            buffer.bytes.fill_(_POISON)
        back.wait_stream(compute)
        with self._streams.on(back), torch.no_grad():
            for part, weight in zip(buffer.tensors, weights, strict=True):
                part.copy_(weight, non_blocking=True)
        buffer.arrived = back.record_event()
        buffer.key = _key(weights)
        self.bytes_in += sum(weight.nbytes for weight in weights)
        return buffer

    def _room(self, size: int, in_use: _Buffer | None) -> _Buffer:
        """A buffer of ``size`` bytes that is not ``in_use``: of two, the one that was filled first."""
        free = [buffer for buffer in self._buffers if buffer is not in_use]
        if len(self._buffers) < BUFFERS:
            buffer = _Buffer(self._empty(size))
        else:
            buffer = free[0]
            self._buffers.remove(buffer)
            if buffer.bytes.numel() < size:
                if buffer.arrived is not None:
                    self._streams.compute().wait_event(buffer.arrived)
                del buffer, free
                buffer = _Buffer(self._empty(size))
        self._buffers.append(buffer)
        return buffer

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def buffer_bytes(sizes: Iterable[int]) -> int:
    """Of a buffer for weights of these sizes, each at an address that copies and kernels like."""
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)


def _parts(buffer: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensor]:
    start = 0
    for weight in weights:
        yield buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        start += buffer_bytes([weight.nbytes])


def _key(weights: Sequence[Tensor]) -> int:
    return weights[0].data_ptr()
