"""Dequantised weights that stay on the device from one step to the next, as if they were made anew.

    residents.given(inputs)       # one tensor for each, made at the first call

Before each call the packed weights are looked at: one that is another tensor, lies elsewhere or was written
since is dequantised again, into the same memory. The matrices of adapters, which every update writes, are
copied into their rooms at each call; a weight that two adapters share is there once for each. Autograd is
told where either changed, as it would be of the weights themselves: a backward of a call before is then
refused. (Not seen are writes past PyTorch's counter, as through ``.data``.)

Of all programs on a device, one has them at a time: what another one has of the same weights in the same form
is taken over, and the rest given up. A program that has none gives them up where it needs their room. They go
with the program that has them.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, _foreach_copy_, _foreach_mul  # pyright: ignore[reportPrivateImportUsage]

from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.resident_weight import Form
from rewriter.memory.made_once import made_once


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


@dataclass(eq=False)
class _Kept:
    """One that is there, and what it was made of."""

    whole: Tensor
    origin: list[tuple[Any, int, int]]
    # Version of the matrix that was copied last.
    drawn: int = -1
    place: Tensor | None = None
    # The same memory, whose writes autograd is not told of.
    unseen: Tensor | None = field(default=None, repr=False)


_Key = tuple[int, int | None, Form]


class Shelf:
    """What is there on one device, for all programs.

    Attributes:
        kept: by the addresses of the packed weight and of the matrix in its room, and its form.
        turn: how many times something was made or given up: what is recorded holds for one turn.
        owner: the program that has them.
    """

    def __init__(self):
        self.kept: dict[_Key, _Kept] = {}
        self.turn = 0
        self.owner: weakref.ref[Residents] | None = None

    @property
    def nbytes(self) -> int:
        return sum(kept.whole.nbytes for kept in self.kept.values())

    def hold_to(self, room: int) -> None:
        """Give all up where they take more than ``room`` bytes."""
        if self.kept and self.nbytes > room:
            self.clear()

    def clear(self) -> None:
        self.kept.clear()
        self.turn += 1

    def clear_of(self, owner: "weakref.ref[Residents] | None") -> None:
        """The same where the program ``owner`` still has them."""
        if self.owner is owner:
            self.clear()


class Residents:
    """Those of one program.

    Args:
        room: bytes that those of other programs may take beside one that wants none.
    """

    def __init__(self, wanted: Sequence[Wanted], shelf: Shelf, room: int = 0):
        self._wanted, self._shelf, self._room = tuple(wanted), shelf, room
        self._self: weakref.ref[Residents] = weakref.ref(self)
        weakref.finalize(self, shelf.clear_of, self._self).atexit = False

    def given(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Each in its form, for a call of the program with ``inputs``; adapters' matrices in their rooms."""
        with torch.inference_mode(False), torch.no_grad():
            kept = self._settled(inputs)
            self._fill(kept, inputs)
        return [one.whole for one in kept]

    def settle(self, inputs: Sequence[Any]) -> tuple[int, list[Tensor]]:
        """Make each be what the packed weights say now.

        Returns:
            the turn that recordings of the program hold for, and what they read.
        """
        with torch.inference_mode(False), torch.no_grad():
            kept = self._settled(inputs)
        return self._shelf.turn, [one.whole for one in kept]

    def _settled(self, inputs: Sequence[Any]) -> list[_Kept]:
        shelf = self._shelf
        if not self._wanted:
            shelf.hold_to(self._room)
            return []
        keys = [_key(one, inputs) for one in self._wanted]
        shelf.owner = self._self
        for key in set(shelf.kept).difference(keys):
            del shelf.kept[key]
            shelf.turn += 1
        return [self._one(key, one, inputs) for key, one in zip(keys, self._wanted, strict=True)]

    def _one(self, key: _Key, one: Wanted, inputs: Sequence[Any]) -> _Kept:
        sources = [inputs[i] for i in one.takes]
        kept = self._shelf.kept.get(key)
        if kept is not None and _is_of(kept.origin, sources):
            return kept
        matrix = None if one.matrix is None else inputs[one.matrix]
        whole = one.source.form.made(one.source.packed(sources), matrix)
        if kept is not None and kept.whole.shape == whole.shape:
            kept.whole.copy_(whole)
            kept.origin = _origin(sources)
            return kept
        place = None if matrix is None else one.source.form.place(whole)
        kept = _Kept(whole, _origin(sources), -1, place, None if place is None else place.data)
        self._shelf.kept[key] = kept
        self._shelf.turn += 1
        return kept

    def _fill(self, kept: Sequence[_Kept], inputs: Sequence[Any]) -> None:
        by_scale: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for one, wanted in zip(kept, self._wanted, strict=True):
            if wanted.matrix is None or one.place is None or one.unseen is None:
                continue
            matrix = inputs[wanted.matrix].detach()
            # Not by the tensor itself: who records a program gives it others of the same memory.
            is_new, one.drawn = one.drawn != _version(matrix), _version(matrix)
            by_scale.setdefault(wanted.source.form.scale, []).append(
                (one.place if is_new else one.unseen, matrix)
            )
        for scale, pairs in by_scale.items():
            places, matrices = ([pair[i] for pair in pairs] for i in (0, 1))
            # A power of two: nothing is rounded in the matrix's own dtype that would not be in the weight's.
            scaled = matrices if scale == 1 else _foreach_mul(matrices, scale)
            _foreach_copy_(places, scaled)


def _key(one: Wanted, inputs: Sequence[Any]) -> _Key:
    matrix = None if one.matrix is None else inputs[one.matrix].data_ptr()
    return inputs[one.takes[0]].data_ptr(), matrix, one.source.form


def _origin(sources: Sequence[Tensor]) -> list[tuple[Any, int, int]]:
    return [(weakref.ref(x), x.data_ptr(), _version(x)) for x in sources]


def _is_of(origin: Sequence[tuple[Any, int, int]], sources: Sequence[Tensor]) -> bool:
    return all(
        ref() is x and address == x.data_ptr() and version == _version(x)
        for (ref, address, version), x in zip(origin, sources, strict=True)
    )


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


@made_once
def shelf_of(device: str) -> Shelf:
    """The process's own: all programs share the device."""
    return Shelf()


class WithResidents:
    """A program that takes what stays after its inputs, as one that does not."""

    def __init__(self, run: Any, residents: Residents):
        self._run, self._residents = run, residents

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs, *self._residents.given(inputs))

    def settle(self, inputs: Sequence[Any]) -> tuple[int, list[Tensor]]:
        """Before a recording of it runs; recordings that were made in another turn read what is gone."""
        return self._residents.settle(inputs)
