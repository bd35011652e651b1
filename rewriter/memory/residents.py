"""Dequantised weights that stay on the device from one step to the next, as if they were made anew.

    residents.given(inputs)       # one tensor for each, made at the first call

Before each call the packed weights are looked at: one that is another tensor, lies elsewhere or was written
since is dequantised again, into the same memory. To look at 32 layers of seven, 1,120 tensors, took 0.3 ms of
a CPU (AMD EPYC, Python 3.11) that has no GPU; it was not timed beside one.

The matrices of adapters are copied into their rooms at each call, written or not. Nothing says for sure that
one was not: fused optimizers, PyTorch's own and those of bitsandbytes, write past PyTorch's counter. One
launch copies all (``kernels/resident_rooms.py``), and is part of what a recording of the program repeats: as
right there as before it, and without a launch of its own. A weight that two adapters share is there once for
each.

Autograd is told where either was seen to change, as it would be of the weights themselves: a backward of a
call before is then refused. (Not seen are writes to packed weights past the counter, as through ``.data``.)

A program may run on another stream than what made a weight: its stream waits, at each call, for the one on
which a program was called last, and memory that goes is given to nobody before all of them have read it.

What programs have together, and which gives way, is the shelf's (``shelf.py``).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.resident_rooms import Rooms
from rewriter.kernels.resident_weight import Form
from rewriter.memory.seen import Seen, addresses, versions
from rewriter.memory.shelf import Kept, Key, Shelf, shelf_of
from rewriter.replay.recorded import recorded_bytes


class Source(Protocol):
    """How a weight is made; see ``resident_weights.Lasting``."""

    @property
    def form(self) -> Form: ...
    def packed(self, inputs: Sequence[Tensor]) -> Packed4bit: ...


@dataclass(frozen=True, eq=False)
class Wanted:
    """A weight of a program that stays: of its inputs, those of the packed one and the adapter's matrix."""

    source: Source
    takes: tuple[int, ...]
    matrix: int | None


@dataclass(frozen=True, eq=False)
class _Held:
    """What a program was given, and what has to be as it was for it to be given that again.

    Attributes:
        packed: all tensors of the packed weights; matrices: where the adapters' lay.
        filled: of the weights, those that have a room.
        changes: of the shelf.
        stream: on which the program ran; None where there are none.
    """

    wholes: list[Tensor]
    packed: Seen
    matrices: list[int]
    filled: list[Kept]
    rooms: Rooms
    changes: int
    stream: Any


class Residents:
    """Those of one program.

    Args:
        room: bytes for those of other programs and for recordings, beside the program.

    Attributes:
        turn: what is recorded of the program holds for one: in another, something that it read is gone.
    """

    def __init__(self, wanted: Sequence[Wanted], shelf: Shelf, room: int = 0):
        self.asked: set[Key] = set()
        self.turn = 0
        self._wanted, self._shelf, self._room = tuple(wanted), shelf, room
        self._packed = [i for one in self._wanted for i in one.takes]
        self._matrices = [one.matrix for one in self._wanted if one.matrix is not None]
        self._keys: list[Key] = []
        self._held: _Held | None = None
        self._rooms: Rooms | None = None
        shelf.enter(self)

    def given(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Each in its form, for a call of the program with ``inputs``; adapters' matrices in their rooms."""
        with torch.inference_mode(False), torch.no_grad(), self._shelf.turn:
            held = self._current(inputs)
            matrices = [inputs[i] for i in self._matrices]
            _tell_autograd(held.filled, versions(matrices))
            held.rooms.fill(matrices)
        return held.wholes

    def settle(self, inputs: Sequence[Any]) -> tuple[int, list[Tensor]]:
        """Make each be what the packed weights say now.

        Returns:
            the turn that recordings of the program hold for, and what they read.
        """
        with torch.inference_mode(False), torch.no_grad(), self._shelf.turn:
            held = self._current(inputs)
            return self.turn, held.wholes

    def lost(self, key: Key) -> None:
        """To be told by the shelf what is there no more."""
        if key in self._keys:
            self._turn_over()

    def _turn_over(self) -> None:
        self.turn += 1
        self._held = None
        # Until then recordings read its tables.
        self._rooms = None

    def _current(self, inputs: Sequence[Any]) -> _Held:
        held, stream = self._held, self._shelf.stream()
        if (
            held is not None
            and stream in (None, held.stream)
            and held.changes == self._shelf.changes
            and held.matrices == addresses([inputs[i] for i in self._matrices])
            and held.packed.are([inputs[i] for i in self._packed])
        ):
            return held
        self._held = held = self._looked_up(inputs, stream)
        return held

    def _looked_up(self, inputs: Sequence[Any], stream: Any) -> _Held:
        shelf, keys = self._shelf, [_key(one, inputs) for one in self._wanted]
        self._held = None
        if keys != self._keys:
            self._keys = keys
            self._turn_over()
        shelf.give_up(self._room - recorded_bytes(shelf.device), but=keys)
        kept = [self._one(key, one, inputs) for key, one in zip(keys, self._wanted, strict=True)]
        shelf.touch(keys)
        matrices = [inputs[i] for i in self._matrices]
        rooms = self._rooms_of(kept, matrices)
        for one in (*kept, rooms) if stream is not None else ():
            one.used_on(stream)
        return _Held(
            [one.whole for one in kept],
            Seen([inputs[i] for i in self._packed]),
            addresses(matrices),
            [one for one in kept if one.place is not None],
            rooms,
            shelf.changes,
            stream,
        )

    def _rooms_of(self, kept: Sequence[Kept], matrices: Sequence[Tensor]) -> Rooms:
        if self._rooms is None:
            # Of the same memory, whose writes autograd is not told of.
            places = [one.place.data for one in kept if one.place is not None]
            scales = [one.source.form.scale for one in self._wanted if one.matrix is not None]
            self._rooms = Rooms(places, matrices, scales)
        return self._rooms

    def _one(self, key: Key, one: Wanted, inputs: Sequence[Any]) -> Kept:
        sources = [inputs[i] for i in one.takes]
        self.asked.add(key)
        kept = self._shelf.kept.get(key)
        if kept is not None and kept.origin.are(sources):
            return kept
        matrix = None if one.matrix is None else inputs[one.matrix]
        origin = Seen(sources)
        whole = one.source.form.made(one.source.packed(sources), matrix)
        if kept is not None and kept.whole.shape == whole.shape:
            kept.whole.copy_(whole)
            kept.origin = origin
        else:
            self._shelf.drop(key)
            place = None if matrix is None else one.source.form.place(whole)
            kept = Kept(whole, origin, None if matrix is None else Seen([matrix]), place)
            # Before it is there: a program that is collected just then takes what nobody asks for with it.
            self.asked.add(key)
            self._shelf.put(key, kept)
        self._shelf.drop_with(sources[0], key)
        return kept


def residents_beside(
    free: int, device: torch.device, wanted: Sequence[Wanted] = ()
) -> Callable[[], Residents]:
    """Makes those of a program whose plan leaves ``free`` bytes of ``device``, recordings there counted."""
    room = max(free, 0) + recorded_bytes(device)
    return functools.partial(Residents, wanted, shelf_of(str(device)), room)


def _key(one: Wanted, inputs: Sequence[Any]) -> Key:
    matrix = None if one.matrix is None else inputs[one.matrix].data_ptr()
    return inputs[one.takes[0]].data_ptr(), matrix, one.source.form


def _tell_autograd(filled: Sequence[Kept], drawn: Sequence[int]) -> None:
    """Of matrices that were written since. Their versions, since recorders give others of their memory."""
    new = []
    for one, version in zip(filled, drawn, strict=True):
        if one.drawn != version:
            one.drawn = version
            new.append(one.whole)
    if new:
        increment_version(new)


class WithResidents:
    """A program that takes what stays after its inputs, as one that does not."""

    def __init__(self, run: Any, residents: Residents):
        self._run, self._residents = run, residents

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs, *self._residents.given(inputs))

    def settle(self, inputs: Sequence[Any]) -> tuple[int, list[Tensor]]:
        """Before a recording of it runs; recordings that were made in another turn read what is gone."""
        return self._residents.settle(inputs)
