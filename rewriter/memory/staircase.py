"""What the parts before a place must at least take, when one bound on all memory stands for all bounds.

Weighed by prices, the bounds of all moments and of the host add up to one: what all memory costs is at most
what the budgets are worth. Under that one bound the fastest whole choices are found exactly (surrogate
relaxation), since only two numbers of a prefix matter, its time and its price. It is tighter than any price,
which lets choices be taken in part: most of all where choices differ in which memory they take, but not in
how much, so that there are many that no price tells apart, and few times between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewriter.memory.bounds import Floats
from rewriter.memory.options import Options, Whole

# Points of a staircase at most. Of more, neighbours are taken together, each number from the better one.
_POINTS = 20_000


@dataclass(frozen=True)
class Staircase:
    """What the parts before a place take at least, for a price of memory: as steps.

    ``price`` rises, ``time`` falls.
    """

    price: Floats
    time: Whole

    def least(self, paid: Floats) -> Floats:
        """Units that no prefix within the price ``paid`` takes less than; infinite where there is none."""
        at = np.searchsorted(self.price, paid, "right") - 1
        return np.where(at < 0, np.inf, self.time[at]) if len(self.time) else np.full(len(paid), np.inf)


def staircases(
    parts: Sequence[Options],
    times: Sequence[Whole],
    priced: Sequence[Floats],
    after: Sequence[Floats],
    most: float,
) -> list[list[Staircase]]:
    """Of the first i parts, for i = 0..n, by the overlap of the last: time against the price of all memory.

    Args:
        priced: from ``Prices.of``, one row.
        after: from ``cheapest_suffixes``.
        most: prefixes whose time and price are over this with what follows are left out.
    """
    found = [[Staircase(np.zeros(1), np.zeros(1, np.int64))]]
    for i, options in enumerate(parts):
        groups = []
        for group in range(len(options.overlaps)):
            prices, units = [], []
            own = np.flatnonzero(options.group == group)
            for g, stairs in enumerate(found[-1]):
                price, time = _lowest(priced[i][0][own], times[i][g][own])
                prices.append((stairs.price[:, None] + price).ravel())
                units.append((stairs.time[:, None] + time).ravel())
            price, time = np.concatenate(prices), np.concatenate(units)
            chances = price + time + after[i + 1][0, group] <= most
            groups.append(Staircase(*_coarse(*_lowest(price[chances], time[chances]))))
        found.append(groups)
    return found


def _lowest(price: Floats, time: Whole) -> tuple[Floats, Whole]:
    order = np.lexsort((time, price))
    price, time = price[order], time[order]
    falls = np.ones(len(time), bool)
    falls[1:] = time[1:] < np.minimum.accumulate(time)[:-1]
    return price[falls], time[falls]


def _coarse(price: Floats, time: Whole) -> tuple[Floats, Whole]:
    if len(price) <= _POINTS:
        return price, time
    step = -(-len(price) // _POINTS)
    last = np.minimum(np.arange(step - 1, len(time) + step - 1, step), len(time) - 1)
    return price[::step], time[last]
