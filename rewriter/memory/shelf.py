"""The dequantised weights that stay on a device, of all programs: who has what, and what gives way.

A weight goes when no program that asked for it is left, when its packed tensors are gone or lie elsewhere, or
where a program has to have the room: the one goes first whose program was longest without a look at what it
has. Programs that alternate keep both theirs where both fit, and share what they have in common; where both
do not, what does not fit is all that is made again.
"""

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rewriter.kernels.resident_weight import Form
from rewriter.memory.made_once import made_once
from rewriter.memory.seen import Seen
from rewriter.memory.streams import Computing

# Addresses of a packed weight and of the matrix in its room, and the form.
Key = tuple[int, int | None, Form]


class User(Protocol):
    """A program that has weights on a shelf.

    Attributes:
        asked: what it asked for, of what is there.
    """

    asked: set[Key]

    def lost(self, key: Key) -> None:
        """To be told that something of that is there no more."""
        ...


@dataclass(eq=False)
class Kept:
    """One that is there.

    Attributes:
        origin: what it was made of.
        matrix: what is in its room, if it has one; where that is does not change.
        place: the room, a view of the weight.
        drawn: version of the matrix that autograd was told of last.
    """

    whole: Tensor
    origin: Seen
    matrix: Seen | None
    place: Tensor | None
    drawn: int = -1

    def used_on(self, stream: Any) -> None:
        """Its memory is given to nobody before what ``stream`` has been given by then."""
        self.whole.record_stream(stream)

    def is_stale(self) -> bool:
        """Whether nobody can ask for it again."""
        return not self.origin.are_there() or not (self.matrix is None or self.matrix.are_there())


@dataclass(eq=False)
class Shelf:
    """What is there on ``device``.

    Attributes:
        kept: those that were asked for last at the end.
        nbytes: of all.
        changes: how many times something was put there or went.
        turn: had by the thread that looks for something there, makes it or fills it.
    """

    device: torch.device
    kept: dict[Key, Kept] = field(default_factory=dict)
    nbytes: int = 0
    changes: int = 0
    turn: threading.RLock = field(default_factory=threading.RLock)
    _computing: Computing = field(init=False)
    _users: weakref.WeakSet[User] = field(default_factory=weakref.WeakSet)

    def __post_init__(self):
        self._computing = Computing(self.device)

    def enter(self, user: User) -> None:
        """Have a program among those that are told; what it alone asked for goes with it."""
        self._users.add(user)
        weakref.finalize(user, self._sweep).atexit = False

    def stream(self) -> Any:
        """The stream on which what is there is read now, after those before.

        None where there are no streams, and while a CUDA graph is captured, which can wait for none outside.
        """
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        return self._computing.now()

    def put(self, key: Key, kept: Kept) -> None:
        self.kept[key] = kept
        self.nbytes += kept.whole.nbytes
        self.changes += 1

    def drop_with(self, packed: Tensor, key: Key) -> None:
        """Let what is there go with what it was made of."""
        weakref.finalize(packed, self._drop_of, weakref.ref(self.kept[key]), key).atexit = False

    def drop(self, key: Key) -> None:
        kept = self.kept.pop(key, None)
        if kept is None:
            return
        self.nbytes -= kept.whole.nbytes
        self.changes += 1
        for user in tuple(self._users):
            if key in user.asked:
                user.asked.discard(key)
                user.lost(key)

    def give_up(self, room: int, but: Iterable[Key]) -> None:
        """Hold all ``but`` some to ``room`` bytes, and let go what nobody can ask for again."""
        needed = set(but)
        others = [key for key in tuple(self.kept) if key not in needed]
        for key in others:
            if (kept := self.kept.get(key)) is not None and kept.is_stale():
                self.drop(key)
        there = [(key, self.kept[key].whole.nbytes) for key in others if key in self.kept]
        over = sum(nbytes for _, nbytes in there) - room
        for key, nbytes in there:
            if over <= 0:
                return
            self.drop(key)
            over -= nbytes

    def touch(self, keys: Iterable[Key]) -> None:
        """Have those go last."""
        for key in keys:
            if (kept := self.kept.pop(key, None)) is not None:
                self.kept[key] = kept

    def _drop_of(self, kept: weakref.ref[Kept], key: Key) -> None:
        # Another may be there by now, of a tensor that came to lie in the same place.
        there = self.kept.get(key)
        # Or it is the same one, made again of a tensor that has the memory of the first.
        if there is not None and there is kept() and not there.origin.are_there():
            self.drop(key)

    def _sweep(self) -> None:
        asked: set[Key] = set().union(*(user.asked for user in tuple(self._users)))
        for key in [key for key in tuple(self.kept) if key not in asked]:
            self.drop(key)


@made_once
def shelf_of(device: str) -> Shelf:
    """The process's own: all programs share the device."""
    return Shelf(torch.device(device))
