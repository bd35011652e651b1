"""What the parts before a place must at least cost, when memory is paid for instead of bounded.

At a price per device byte and one per host byte, the budgets drop out, and the cheapest way through the first
parts is a shortest path over (part, what of the part before overlaps it): a few array operations a part, for
many prices at once. Less the price of what the budgets leave, that is a lower bound of what the same parts
cost within the budgets (Lagrangian relaxation), and near the best prices a tight one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewriter.memory.options import NOTHING, Options, Overlap, Whole

Floats = NDArray[np.float64]


def time_of(options: Options, before: Sequence[Overlap]) -> Whole:
    """Units for each choice after each overlap: (overlaps, choices)."""
    offload = np.array([o.offload for o in before])[:, None]
    reload = np.array([o.reload for o in before])[:, None]
    return np.maximum(options.forward, offload) + np.maximum(options.backward, reload)


def times_of(parts: Sequence[Options]) -> list[Whole]:
    """``time_of`` each part after the one before it; the waits of the last part's copies included."""
    made: dict[tuple[int, int], Whole] = {}
    found = []
    before: tuple[Overlap, ...] = (NOTHING,)
    for options in parts:
        key = (id(before), id(options))
        if key not in made:
            made[key] = time_of(options, before)
        found.append(made[key])
        before = options.overlaps
    last = parts[-1]
    waits = np.array([overlap.offload + overlap.reload for overlap in last.overlaps])
    found[-1] = found[-1] + waits[last.group]
    return found


@dataclass(frozen=True)
class Prices:
    """Prices in time units per byte, one row each.

    ``device`` is (rows, parts): of a byte that is there at a part's worst moment. ``host`` is (rows,).
    """

    device: Floats
    host: Floats

    def of(self, parts: Sequence[Options]) -> list[Floats]:
        """What the bytes of each choice cost: (rows, choices), one a part.

        What a part saves is paid for at every later moment, what is in flight at the next one.
        """
        later = np.cumsum(self.device[:, ::-1], axis=1)[:, ::-1]
        nothing = np.zeros_like(self.host)
        found = []
        for i, options in enumerate(parts):
            last = i + 1 == len(parts)
            after, soon = (nothing, nothing) if last else (later[:, i + 1], self.device[:, i + 1])
            bytes_ = np.stack([options.saved, options.flight, options.peak, options.hosted]).astype(float)
            found.append(np.stack([after, soon, self.device[:, i], self.host], axis=1) @ bytes_)
        return found

    def paid(self, device: int, host: int) -> Floats:
        """What the budgets are worth: (rows,)."""
        return self.device.sum(axis=1) * device + self.host * host


def cheapest_prefixes(
    parts: Sequence[Options], times: Sequence[Whole], priced: Sequence[Floats]
) -> list[Floats]:
    """Least time and price of the first i parts for i = 0..n, by the overlap of the last of them.

    Returns arrays of (prices, overlaps of part i); the first is zeros of (prices, 1).
    """
    cost = np.zeros((len(priced[0]), 1))
    found = [cost]
    for options, time, price in zip(parts, times, priced, strict=True):
        each = price + (cost[:, :, None] + time).min(axis=1)
        groups = range(len(options.overlaps))
        cost = np.stack([each[:, options.group == g].min(axis=1) for g in groups], axis=1)
        found.append(cost)
    return found


def cheapest_suffixes(
    parts: Sequence[Options], times: Sequence[Whole], priced: Sequence[Floats]
) -> list[Floats]:
    """The same of the parts from i on, for i = 0..n, by the overlap of the part before: the last is zeros."""
    cost = np.zeros((len(priced[0]), len(parts[-1].overlaps)))
    found = [cost]
    for options, time, price in zip(reversed(parts), reversed(times), reversed(priced), strict=True):
        cost = ((price + cost[:, options.group])[:, None] + time).min(axis=2)
        found.append(cost)
    return found[::-1]


# The last moments, which are mostly the worst.
_LAST = 3


def prices_around(best: Prices, tie: float, *, vary_device: bool) -> Prices:
    """The best prices of a whole step, others near them, and none; the most promising first.

    Behind the best come those at which a byte too many at one of the last moments costs as much as a byte in
    host memory does by ``tie``: among plans that take equally long, it has to go there.
    """
    factors = np.array([1.0, 0.98, 1.02, 0.93, 1.07, 0.8, 1.25, 0.5, 2.0, 0.0])
    on_device, on_host = np.meshgrid(factors if vary_device else np.ones(1), factors, indexing="ij")
    far = np.add.outer(np.arange(len(on_device)), np.arange(len(factors))).ravel()
    order = np.argsort(far, kind="stable")
    device = on_device.ravel()[order, None] * best.device
    last = best.device + tie * np.eye(best.device.shape[1])[-_LAST:]
    host = on_host.ravel()[order] * best.host
    return Prices(
        np.concatenate([device[:1], last, device[1:]]),
        np.concatenate([host[:1], np.repeat(best.host, len(last)), host[1:]]),
    )
