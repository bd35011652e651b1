"""The choices of each part as arrays of whole numbers, without those that another makes needless.

    Choice (bytes, seconds)  ->  Options (bytes, time units), one for each part

A copy that hides behind whatever the next part may do is no different from none: what is left of it are the
bytes in flight. Most copies of long batches hide, so that most choices are alike to their neighbours. A
choice is needless where another of the same part takes no more of any memory, and no more time whatever its
neighbours choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewriter.memory.plan import Choice, Part

Whole = NDArray[np.int64]

# Seconds are counted in units of about this part of the slowest step.
_UNITS = 1e10


class Overlap(NamedTuple):
    """Units that a part's copies take beside the next part's forward and backward; 0 where they hide."""

    offload: int
    reload: int


NOTHING = Overlap(0, 0)


@dataclass(frozen=True)
class Options:
    """The choices of one part as arrays, in whole bytes and time units.

    ``index`` is each choice's place among all of the part's; ``group`` says which of ``overlaps`` it has:
    those that copy alike take the same time of their neighbours.
    """

    index: Whole
    saved: Whole
    hosted: Whole
    peak: Whole
    flight: Whole
    forward: Whole
    backward: Whole
    group: Whole
    overlaps: tuple[Overlap, ...]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class _Kind:
    """All choices of a kind of parts: bytes as (choices, 4), units as (choices, 4)."""

    memory: Whole
    times: Whole

    @property
    def quickest(self) -> tuple[int, int]:
        """Units of the forward and of the backward that no choice takes less than."""
        return int(self.times[:, 0].min()), int(self.times[:, 1].min())

    def copies(self, hidden: tuple[int, int]) -> Whole:
        """(choices, 2): units of offload and reload, 0 where they hide behind ``hidden``."""
        return np.where(self.times[:, 2:] <= np.array(hidden), 0, self.times[:, 2:])


def unit_of(parts: Sequence[Part]) -> float:
    """Seconds of a time unit: a power of two, so that seconds that are round stay so."""
    longest = {id(p.choices): max(sum(_seconds(choice)) for choice in p.choices) for p in parts}
    slowest = sum(longest[id(p.choices)] for p in parts)
    return 2.0 ** ceil(log2(slowest / _UNITS)) if slowest else 1.0


def options_of(parts: Sequence[Part], unit: float) -> list[Options]:
    """One ``Options`` a part, the same object for parts with equal neighbours.

    Args:
        unit: seconds of a time unit; infinite where time does not count.
    """
    kinds: dict[int, _Kind] = {}
    for part in parts:
        if id(part.choices) not in kinds:
            kinds[id(part.choices)] = _kind(part.choices, unit)
    row = [kinds[id(part.choices)] for part in parts]
    made: dict[tuple, Options] = {}
    found = []
    for before, here, after in zip([None, *row], row, [*row[1:], None], strict=False):
        key = (id(before), id(here), id(after))
        if key not in made:
            made[key] = _options(before, here, after)
        found.append(made[key])
    return found


def _seconds(choice: Choice) -> tuple[float, float, float, float]:
    return choice.forward_seconds, choice.backward_seconds, choice.offload_seconds, choice.reload_seconds


def _kind(choices: Sequence[Choice], unit: float) -> _Kind:
    memory = [(choice.saved, choice.hosted, choice.peak, choice.flight) for choice in choices]
    times = [[round(seconds / unit) for seconds in _seconds(choice)] for choice in choices]
    return _Kind(np.array(memory, np.int64), np.array(times, np.int64))


def _options(before: _Kind | None, here: _Kind, after: _Kind | None) -> Options:
    memory = here.memory.copy()
    if after is None:
        # No part follows that its copies could share the device with.
        memory[:, 3] = 0
    arriving = np.zeros(2, np.int64) if before is None else before.copies(here.quickest).max(axis=0)
    copies = here.times[:, 2:] if after is None else here.copies(after.quickest)
    later = np.zeros((len(memory),) * 2, np.int64)
    for units, most in zip(here.times[:, :2].T, arriving, strict=True):
        later += _most_later(units, int(most))
    hidden = (0, 0) if after is None else after.quickest
    for units, behind in zip(copies.T, hidden, strict=True):
        waits = np.maximum(units, behind)
        later += waits[:, None] - waits if after is None else np.maximum(waits[:, None] - waits, 0)
    no_worse = (later <= 0) & (memory[:, None] <= memory).all(axis=2)
    equal = no_worse & no_worse.T
    # Of equal choices the first stays.
    beaten = (no_worse & ~equal) | np.triu(equal, 1)
    index = np.flatnonzero(~beaten.any(axis=0))
    overlaps, group = np.unique(copies[index], axis=0, return_inverse=True)
    saved, hosted, peak, flight = memory[index].T
    forward, backward = here.times[index, :2].T
    named = tuple(Overlap(*row) for row in overlaps.tolist())
    return Options(index, saved, hosted, peak, flight, forward, backward, group.ravel(), named)


def _most_later(units: Whole, most: int) -> Whole:
    """Units by which row's choice ends later than column's, at most, a copy of 0 to ``most`` beside it."""
    ends = np.maximum(units, most)
    row, column = units[:, None], units[None]
    return np.where(row > column, row - column, ends[:, None] - ends)
