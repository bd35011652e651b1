"""Choices for each of the parts from one on, as columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rewriter.memory.options import Options, Whole

_NEVER = -(2**61)


@dataclass(frozen=True)
class Found:
    """Index into each part's own choices, and what they need, host and take."""

    choices: tuple[int, ...]
    need: int
    hosted: int
    time: int


@dataclass(frozen=True)
class Suffixes:
    """Suffixes as columns, and how to follow each: the choice of its first part, and the suffix after it.

    ``first`` is what the first moment needs beside flight, or what of it can matter; ``need`` what all
    later ones do. ``group`` and ``rest`` are the suffix after it: which of those that stand after each
    overlap, and its row.
    """

    first: Whole
    need: Whole
    hosted: Whole
    time: Whole
    choice: Whole
    group: Whole
    rest: Whole

    @classmethod
    def end(cls) -> Suffixes:
        """The one suffix behind the last part."""
        zero = np.zeros(1, np.int64)
        return cls(zero + _NEVER, zero + _NEVER, zero, zero, zero, zero, zero)

    @classmethod
    def joined(cls, several: Sequence[Suffixes]) -> Suffixes:
        return cls(*(np.concatenate([getattr(s, f.name) for s in several]) for f in fields(cls)))

    def rows(self, which) -> Suffixes:
        return Suffixes(*(getattr(self, f.name)[which] for f in fields(self)))

    def behind(self, options: Options, time: Whole, choice: Whole, group: int, rest: Whole) -> Suffixes:
        """Each of ``choice``, of a part with ``options``, before the row of these that ``rest`` names.

        Args:
            time: units for each choice of the part.
            group: which overlap of the part these stand after.
        """
        later = np.maximum(self.first[rest] + options.flight[choice], self.need[rest])
        return Suffixes(
            options.peak[choice],
            options.saved[choice] + later,
            self.hosted[rest] + options.hosted[choice],
            self.time[rest] + time[choice],
            choice,
            np.full(len(rest), group),
            rest,
        )

    def __len__(self) -> int:
        return len(self.need)


def followed(parts: Sequence[Options], stages: Sequence[Sequence[Suffixes]], row: int) -> Found:
    """The plan of ``row`` of the suffixes from the first part on.

    Args:
        stages: the suffixes from each part on, by the overlap before it; the last part's come first.
    """
    whole = stages[-1][0]
    choices, group, at = [], 0, row
    for options, stage in zip(parts, reversed(stages), strict=True):
        suffixes = stage[group]
        choices.append(int(options.index[suffixes.choice[at]]))
        group, at = int(suffixes.group[at]), int(suffixes.rest[at])
    return Found(tuple(choices), int(whole.need[row]), int(whole.hosted[row]), int(whole.time[row]))
