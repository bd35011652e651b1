"""Choices for each of the parts from one on, as columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def columns(self) -> tuple[Whole, ...]:
        return self.first, self.need, self.hosted, self.time, self.choice, self.group, self.rest

    def rows(self, which) -> Suffixes:
        return Suffixes(*(column[which] for column in self.columns))

    def __len__(self) -> int:
        return len(self.need)


@dataclass(frozen=True)
class Following:
    """What may stand behind a part, after each of its overlaps: ``suffixes``, those of one after the other's.

    ``group`` and ``row`` say of each after which overlap it stands, and where among those.
    """

    suffixes: Suffixes
    group: Whole
    row: Whole

    @classmethod
    def of(cls, after: Sequence[Suffixes]) -> Following:
        columns = zip(*(suffixes.columns for suffixes in after), strict=True)
        counts = [len(suffixes) for suffixes in after]
        rows = np.concatenate([np.arange(count) for count in counts])
        return cls(Suffixes(*map(np.concatenate, columns)), np.repeat(np.arange(len(after)), counts), rows)

    def behind(self, options: Options, time: Whole, choice: Whole, rest: Whole) -> Suffixes:
        """Each of ``choice``, of a part with ``options``, before the one of these that ``rest`` names.

        Args:
            time: units for each choice of the part.
        """
        these = self.suffixes
        later = np.maximum(these.first[rest] + options.flight[choice], these.need[rest])
        return Suffixes(
            options.peak[choice],
            options.saved[choice] + later,
            these.hosted[rest] + options.hosted[choice],
            these.time[rest] + time[choice],
            choice,
            self.group[rest],
            self.row[rest],
        )


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
