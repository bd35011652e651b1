"""Copies on streams that have a clock in the place of a device: how long a step takes, and for what it waits.

The host is infinitely far ahead. Each stream does its work in order: computing takes the seconds that it is
said to take, a copy its bytes over the rate of the bus, and who waits for an event goes on at its time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.memory.arena import HostArena
from rewriter.memory.layer import ScheduledLayer
from rewriter.memory.schedule import Schedule, Step
from rewriter.memory.spare import Spare
from rewriter.memory.streams import InOrder
from rewriter.memory.transfer import Transfers

# Bytes a second, of the bus in each direction.
RATE = 100


class _Clocked:
    """A stream; an event is a time."""

    def __init__(self):
        self.now = self.waited = 0.0

    def run(self, seconds: float) -> None:
        self.now += seconds

    def wait_event(self, event: float) -> None:
        self.waited += max(event - self.now, 0.0)
        self.now = max(event, self.now)

    def wait_stream(self, stream: Any) -> None:
        self.wait_event(stream.now)

    def record_event(self) -> float:
        return self.now


class _Timed(TorchDispatchMode):
    """Copies take time on a stream, and move nothing."""

    def __init__(self, stream: _Clocked):
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self._stream.run(args[0].nbytes / RATE)
        return args[0]


class ClockedStreams(InOrder):
    """As ``streams.SideStreams``."""

    def __init__(self):
        self.out, self.back, self.computing = _Clocked(), _Clocked(), _Clocked()

    def compute(self) -> Any:
        return self.computing

    def on(self, stream: Any) -> AbstractContextManager:
        return _Timed(stream)


@dataclass(frozen=True)
class Timed:
    """A layer that sends ``tiles`` of ``nbytes`` each, or one whole, and computes as long as it says.

    Of ``weights`` bytes, which are in host memory, it has a copy while it computes.
    """

    forward: float
    backward: float
    nbytes: int = 0
    tiles: int = 0
    weights: int = 0

    @property
    def sends(self) -> int:
        """Tensors."""
        return (self.tiles or 1) if self.nbytes else 0


def waited(layers: Sequence[Timed], window: int, spares: Sequence[Spare], head: float = 0.0) -> float:
    """Seconds for which the computing stream waits for copies in a step of ``layers`` and a head."""
    streams = ClockedStreams()
    with patch("rewriter.memory.transfer.streams_of", lambda device: streams):
        transfers = Transfers(HostArena(1 << 20, pin=False, growth=1 << 16), "cpu")
    held = [torch.empty(layer.weights, dtype=torch.uint8) for layer in layers]
    transfers.expect(spares)
    if named := [[weights] for weights in held if weights.nbytes]:
        transfers.weights.begin(named)
    made = []
    for layer, weights in zip(layers, held, strict=True):
        run = _scheduled(layer, transfers, streams)
        with transfers.group(window) as group, run._weights({"w": weights}, returns=True):
            tickets = {}
            for name in _sent(layer):
                streams.computing.run(layer.forward / layer.sends)
                sent = torch.empty(layer.nbytes, dtype=torch.uint8)
                tickets[name] = transfers.offload(sent, tile=layer.tiles > 0)
                del sent
            streams.computing.run(0.0 if layer.sends else layer.forward)
        made.append((run, weights, group, tickets))
    streams.computing.run(head)
    while made:
        run, weights, group, tickets = made.pop()
        run.backward({"w": weights}, tickets, {}, transfers, group)
    assert transfers.arena.in_use == 0
    return streams.computing.waited


def _sent(layer: Timed) -> list[str]:
    return [f"sent {i}" for i in range(layer.sends)]


def _scheduled(layer: Timed, transfers: Transfers, streams: ClockedStreams) -> ScheduledLayer:
    """What computes, in the backward, as long after each of its reloads."""

    def run(*_: Any) -> None:
        streams.computing.run(layer.backward / max(layer.sends, 1))

    steps = [
        step
        for name in _sent(layer)
        for step in (Step("reload", value=name), Step("run", 0), Step("free", value=name))
    ]
    plan = Schedule((), tuple(steps or [Step("run", 0)]), (), ())
    stages: Any = SimpleNamespace(run=run, wiring=SimpleNamespace(inputs=()))
    ahead = ("w",) if layer.weights else ()
    return ScheduledLayer(stages, plan, None, frozenset(), lambda: transfers, False, ahead=ahead)
