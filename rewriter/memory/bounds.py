"""What the parts before a place must at least cost, when memory is paid for instead of bounded.

At a price per device byte and one per host byte, the budgets drop out, and the cheapest way through the first
parts is a shortest path over (part, what of the part before overlaps it): a few array operations a part, for
many prices at once. Less the price of what the budgets leave, that is a lower bound of what the same parts
cost within the budgets (Lagrangian relaxation), and near the best prices a tight one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


class Overlap(NamedTuple):
    """What a part does to the parts that run while its copies are under way: device bytes and time units."""

    flight: int
    offload: int
    reload: int


@dataclass(frozen=True)
class Options:
    """The choices of one kind of part as arrays, the dominated left out, in whole bytes and time units.

    ``group`` says which of ``overlaps`` each choice has: those that copy alike are alike to their neighbours.
    """

    index: Whole
    saved: Whole
    hosted: Whole
    peak: Whole
    forward: Whole
    backward: Whole
    group: Whole
    overlaps: tuple[Overlap, ...]

    def __len__(self) -> int:
        return len(self.index)


NOTHING = Overlap(0, 0, 0)


def time_of(options: Options, before: Sequence[Overlap]) -> Whole:
    """Units for each choice after each overlap: (overlaps, choices)."""
    offload = np.array([o.offload for o in before])[:, None]
    reload = np.array([o.reload for o in before])[:, None]
    return np.maximum(options.forward, offload) + np.maximum(options.backward, reload)


@dataclass(frozen=True)
class Prices:
    """Prices in time units per byte, one row each.

    ``device`` is (rows, parts): of a byte that is there at a part's worst moment. ``host`` is (rows,).
    """

    device: Floats
    host: Floats

    def rows(self, which: NDArray | slice) -> "Prices":
        return Prices(self.device[which], self.host[which])


def cheapest_prefixes(parts: Sequence[Options], prices: Prices) -> list[Floats]:
    """Least time and price of the first i parts for i = 0..n, by the overlap of the last of them.

    What a part saves is paid for at every later moment, those after the prefix included. Returns arrays of
    (prices, overlaps of part i); the first is zeros of (prices, 1).
    """
    cost = np.zeros((len(prices.host), 1))
    found = [cost]
    before: Sequence[Overlap] = (NOTHING,)
    saving = prices.device.sum(axis=1)
    times = {}
    for i, options in enumerate(parts):
        key = (id(before), id(options))
        if key not in times:
            times[key] = time_of(options, before), np.array([o.flight for o in before])
        time, flight = times[key]
        here = prices.device[:, i]
        saving = saving - here
        arriving = cost + here[:, None] * flight
        each = (arriving[:, :, None] + time).min(axis=1)
        each += saving[:, None] * options.saved + here[:, None] * options.peak
        each += prices.host[:, None] * options.hosted
        cost = np.stack(
            [each[:, options.group == g].min(axis=1) for g in range(len(options.overlaps))], axis=1
        )
        found.append(cost)
        before = options.overlaps
    return found
