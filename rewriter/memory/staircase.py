"""What the parts before a place must at least take, when one bound on all memory stands for all bounds.

Weighed by prices, the bounds of all moments and of the host add up to one: what all memory costs is at most
what the budgets are worth. Under that one bound the fastest whole choices are found exactly (surrogate
relaxation), since only two numbers of a prefix matter, its time and its price. It is tighter than any price,
which lets choices be taken in part: most of all where choices differ in which memory they take, but not in
how much, so that there are many that no price tells apart, and few times between them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewriter.memory.bounds import Floats
from rewriter.memory.options import Options, Whole

# Steps that are added to steps at most, over all parts. Where there are more, neighbours of a staircase are
# taken together, each number from the better one.
_COMBINED = 2_000_000


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
    steps = _steps(parts, times, priced)
    left = _COMBINED
    found = [[Staircase(np.zeros(1), np.zeros(1, np.int64))]]
    for i, options in enumerate(parts):
        # What earlier parts did not need is for later ones.
        combined = sum(len(found[-1][g].price) * len(price) for (g, _), (price, _) in steps[i].items())
        before = [_coarse(stairs, -(-combined * (len(parts) - i) // left)) for stairs in found[-1]]
        groups = []
        for group in range(len(options.overlaps)):
            prices, units = [], []
            for g, stairs in enumerate(before):
                price, time = steps[i][g, group]
                prices.append((stairs.price[:, None] + price).ravel())
                units.append((stairs.time[:, None] + time).ravel())
            price, time = np.concatenate(prices), np.concatenate(units)
            left = max(1, left - len(price))
            chances = price + time + after[i + 1][0, group] <= most
            groups.append(Staircase(*_lowest(price[chances], time[chances])))
        found.append(groups)
    return found


def _steps(
    parts: Sequence[Options], times: Sequence[Whole], priced: Sequence[Floats]
) -> list[dict[tuple[int, int], tuple[Floats, Whole]]]:
    """Of each part alone: price and time after each overlap, for each of its own."""
    found = []
    for options, time, price in zip(parts, times, priced, strict=True):
        own = [np.flatnonzero(options.group == group) for group in range(len(options.overlaps))]
        pairs = itertools.product(range(len(time)), range(len(own)))
        found.append({(g, group): _lowest(price[0][own[group]], time[g][own[group]]) for g, group in pairs})
    return found


def _lowest(price: Floats, time: Whole) -> tuple[Floats, Whole]:
    order = np.argsort(price)
    price, time = price[order], time[order]
    falls = np.ones(len(time), bool)
    falls[1:] = time[1:] < np.minimum.accumulate(time)[:-1]
    price, time = price[falls], time[falls]
    # Of the same price the last, which is the lowest.
    last = np.append(price[1:] > price[:-1], True) if len(price) else falls
    return price[last], time[last]


def _coarse(stairs: Staircase, step: int) -> Staircase:
    """One of ``step`` neighbours, no higher than any of them."""
    count = len(stairs.time)
    last = np.minimum(np.arange(step - 1, count + step - 1, step), count - 1)
    return Staircase(stairs.price[::step], stairs.time[last])
