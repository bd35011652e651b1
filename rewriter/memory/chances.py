"""Which suffixes have a chance: what the parts before one must at least add leaves it within the limits.

Those parts save and host some bytes whatever they choose; they cost what ``bounds.py`` says at several prices
of memory; and they take what ``staircase.py`` says at the best prices, once a plan is known. What none of
these rules out has a chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.memory.bounds import (
    Floats,
    Prices,
    cheapest_prefixes,
    cheapest_suffixes,
    prices_around,
    times_of,
)
from rewriter.memory.options import Options
from rewriter.memory.staircase import Staircase, staircases
from rewriter.memory.suffixes import Found, Suffixes

# Units that the price of all host bytes comes to, among plans that take equally long.
_TIE = 0.5
# The first price alone rules out most; the others are tried on what it leaves.
_BLOCKS = (slice(0, 8), slice(8, None))
# Suffixes that are priced at once: as many as stay in a cache, and too few for BLAS to start threads, which
# would wait for each other much longer than they compute.
_AT_ONCE = 512
# Rounding of sums of prices times bytes, in time units, where one unit is 1e-10 of a step.
MARGIN = 0.01


def paid(prices: Prices, device: int, host: int) -> Floats:
    """What the budgets are worth, (rows,): more by what sums of such numbers may lose by rounding.

    A bound thereby stays one.
    """
    return prices.paid(device, host) * (1 + 1e-12)


@dataclass(frozen=True)
class Limit:
    """Of plans that are searched: most units, ``cost`` with the price of host bytes and ``time`` without."""

    cost: float = inf
    time: float = inf

    @classmethod
    def below(cls, time: int) -> Limit:
        """Plans of less than ``time`` units."""
        return cls(time - 1 + _TIE + MARGIN, time - 1)

    @classmethod
    def as_good_as(cls, known: Found, tie: float) -> Limit:
        """Plans that take no longer than ``known``, and where they take as long host no more."""
        return cls(known.time + tie * known.hosted + MARGIN, known.time)


class Chances:
    """The bounds of one search's parts.

    Attributes:
        times: units of each part's choices, after each overlap of the part before.
        tie: price of a host byte among plans that take equally long; no sum of them is worth a unit.
        device, host: the budgets.
    """

    def __init__(self, parts: Sequence[Options], device: int, host: int, best: Prices, *, by_peak: bool):
        """With the ``best`` prices; ``by_peak`` where it is the peak that is to be least."""
        self._parts, self.device, self.host, self._best = parts, device, host, best
        self.times = times_of(parts)
        self.tie = 0.0 if by_peak else _TIE / (1 + sum(int(o.hosted.max()) for o in parts))
        self._prices = prices_around(best, self.tie, vary_device=not by_peak)
        self._priced = replace(self._prices, host=self._prices.host + self.tie).of(parts)
        self._before = cheapest_prefixes(parts, self.times, self._priced)
        # Of each row of prices, what falls on the moments from a part on: (parts + 2, rows).
        self._on_device = np.pad(self._prices.device, ((0, 0), (0, 2)))
        self._later = np.cumsum(self._on_device[:, ::-1], axis=1)[:, ::-1].T
        # Bytes that the parts before must at least save, and host: a suffix that leaves less is no plan.
        self._saves = np.cumsum([0, *(int(o.saved.min()) for o in parts)])
        self._holds = np.cumsum([0, *(int(o.hosted.min()) for o in parts)])
        self._stairs: list[list[Staircase]] | None = None

    def climb(self, most: float) -> float:
        """Make staircases for plans of at most ``most`` units; the units that none takes less than."""
        priced, worth = self._best.of(self._parts), paid(self._best, self.device, self.host)
        after = cheapest_suffixes(self._parts, self.times, priced)
        self._stairs = staircases(self._parts, self.times, priced, after, worth[0] + most + MARGIN)
        least = min(float(stairs.least(worth + MARGIN)[0]) for stairs in self._stairs[-1])
        return min(least, most)

    def worth(self, suffixes: Suffixes, i: int) -> Floats:
        """What suffixes from part i on cost at the first price."""
        soon, later, on_host = self._on_device[0, i], self._later[i + 1][0], self._prices.host[0] + self.tie
        return suffixes.time + soon * suffixes.first + later * suffixes.need + on_host * suffixes.hosted

    def spare(self, i: int, g: int, limit: Limit) -> Floats:
        """What a suffix may be worth behind each choice of part i, which stands after overlap g."""
        budgets = paid(self._prices, self.device, self.host)[0]
        return limit.cost - self._before[i][0, g] + budgets - (self.times[i][g] + self._priced[i][0])

    def among(self, suffixes: Suffixes, i: int, g: int, limit: Limit) -> tuple[Suffixes, Floats]:
        """Those from part i on, after overlap g, that have one, and the least that a plan with each costs."""
        fit = suffixes.need + self._saves[i] <= self.device
        suffixes = suffixes.rows(fit & (suffixes.hosted + self._holds[i] <= self.host))
        if self._stairs is not None:
            left = self._left_for_time(suffixes, i)
            suffixes = suffixes.rows(suffixes.time + self._stairs[i][g].least(left) <= limit.time)
        return self._within_prices(suffixes, i, g, limit)

    def _left_for_time(self, suffixes: Suffixes, i: int) -> Floats:
        """What each suffix leaves of the budgets' worth at the best prices."""
        prices = self._best
        own = prices.device[0, i] * suffixes.first + self._later[i + 1][0] * suffixes.need
        return paid(prices, self.device, self.host)[0] + MARGIN - own - prices.host[0] * suffixes.hosted

    def _within_prices(self, some: Suffixes, i: int, g: int, limit: Limit) -> tuple[Suffixes, Floats]:
        """Those that no price rules out, and the least that a plan with each of them costs."""
        budgets = paid(self._prices, self.device, self.host)
        proven = np.full(len(some), -np.inf)
        for block in _BLOCKS:
            at = self._before[i][block, g] - budgets[block]
            prices = [self._on_device[block, i], self._later[i + 1][block], self._prices.host[block], at]
            numbers = np.stack([some.first, some.need, some.hosted, np.ones(len(some))])
            bound = _dearest(np.stack(prices, axis=1), numbers)
            proven = np.maximum(proven, bound + some.time + self.tie * some.hosted)
            chances = proven <= limit.cost
            some, proven = some.rows(chances), proven[chances]
        return some, proven


def _dearest(prices: Floats, numbers: NDArray[Any]) -> Floats:
    """The most that each column of ``numbers`` comes to at any row of ``prices``."""
    found = np.full(numbers.shape[1], -np.inf)
    for start in range(0, len(found) if len(prices) else 0, _AT_ONCE):
        at = slice(start, start + _AT_ONCE)
        found[at] = (prices @ numbers[:, at]).max(axis=0)
    return found
