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
    """What a part does to the parts that run while its copies are under way: host bytes and time units."""

    hosted: int
    offload: int
    reload: int


@dataclass(frozen=True)
class Options:
    """The choices of one kind of part as arrays, the dominated left out, in whole bytes and time units.

    ``group`` says which of ``overlaps`` each choice has: choices that copy alike are alike to their neighbours.
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
    """Price per device byte and per host byte, and the moment that the device price is for; one row each.

    A moment of -1 is the one that a suffix names: all that the parts before it save is paid for. Other moments
    are numbers of parts: what is saved before, in flight and used at that part is paid for, nothing later.
    """

    device: Floats
    host: Floats
    moment: Whole

    def rows(self, which: NDArray) -> "Prices":
        return Prices(self.device[which], self.host[which], self.moment[which])


def cheapest_prefixes(parts: Sequence[Options], prices: Prices) -> list[Floats]:
    """Least time and price of the first i parts for i = 0..n, by the overlap of the last of them.

    Returns arrays of (prices, overlaps of part i); the first is zeros of (prices, 1).
    """
    cost = np.zeros((len(prices.device), 1))
    found = [cost]
    before: Sequence[Overlap] = (NOTHING,)
    times = {}
    for i, options in enumerate(parts):
        key = (id(before), id(options))
        if key not in times:
            times[key] = time_of(options, before), np.array([o.hosted for o in before])
        time, flight = times[key]
        here = np.where(prices.moment == i, prices.device, 0.0)[:, None]
        saving = np.where((prices.moment < 0) | (prices.moment > i), prices.device, 0.0)[:, None]
        arriving = (cost + here * flight)[:, :, None] + time
        each = arriving.min(axis=1) + saving * options.saved + here * options.peak
        each += prices.host[:, None] * options.hosted
        cost = np.full((len(each), len(options.overlaps)), np.inf)
        for g in range(cost.shape[1]):
            cost[:, g] = each[:, options.group == g].min(axis=1)
        found.append(cost)
        before = options.overlaps
    return found


def least_total(parts: Sequence[Options], prices: Prices, device: float, host: float) -> Floats:
    """The lower bound of a whole step that each price proves under these budgets; moments are not -1."""
    last = parts[-1].overlaps
    waits = np.array([o.offload + o.reload for o in last])
    cost = (cheapest_prefixes(parts, prices)[-1] + waits).min(axis=1)
    return cost - prices.device * device - prices.host * host


def best_prices(
    parts: Sequence[Options], device: int, host: int, device_price: float | None = None
) -> Prices:
    """The prices, one row, that prove the most: a coarse grid, then finer ones around the best.

    Device memory is bound where it is tightest: at the last part of some kind, since the forward frees nothing,
    or at the part with the largest peak. With ``device_price``, only the price of host memory is sought.
    """
    last_of_kind = {id(options): i for i, options in enumerate(parts)}
    widest = int(np.argmax([options.peak.min() for options in parts]))
    moments = np.unique([*last_of_kind.values(), widest])
    units = sum(int(options.forward.max() + options.backward.max()) for options in parts)
    saved = max(1, sum(int(options.saved.max()) for options in parts))
    hosted = sum(int(options.hosted.max()) for options in parts)
    decades = np.array([0.0, *np.geomspace(1e-4, 1e4, 9)])
    on_device = decades * units / saved if device_price is None else np.array([device_price])
    on_host = decades * (units if device_price is None else saved) / max(1, hosted)
    if host >= hosted:
        on_host = np.zeros(1)
    ratio = 10.0
    while True:
        grid = np.meshgrid(np.unique(on_device), np.unique(on_host), moments, indexing="ij")
        prices = Prices(*(axis.ravel() for axis in grid))
        best = prices.rows(np.array([np.argmax(least_total(parts, prices, device, host))]))
        if ratio < 1.0001:
            return best
        moments = best.moment if ratio < 1.2 else moments
        ratio = ratio**0.5
        steps = ratio ** np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
        on_device = best.device[0] * steps if device_price is None else on_device
        on_host = best.host[0] * steps
