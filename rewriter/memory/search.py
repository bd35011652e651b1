"""The fastest choices within the budgets: a search from the last part to the first.

A *suffix* is a choice for each of the parts from one on. All that matters of it to the parts before is three
numbers: what it needs (the device bytes that its worst moment takes beyond what earlier parts save), what it
hosts, and its time. One that is no better than another in any of the three is dropped, and so is one that the
lower bound of the parts before it (``bounds.py``) rules out: not even they could make it better than the best
plan known. That plan comes from the same search with few suffixes kept. Nothing else is dropped, unless
there are more than a second's work allows; what remains at the first part is then the optimum.

Numbers are whole (time in units), so that equal plans are equal, and ties go to the fewer host bytes and then
to the lower peak.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import ceil

import numpy as np

from rewriter.memory.bounds import (
    NOTHING,
    Options,
    Overlap,
    Prices,
    Whole,
    cheapest_prefixes,
    time_of,
)
from rewriter.memory.relaxation import best_prices

# Suffixes kept for each overlap by the search for a first plan.
_NARROW = 32
# Suffixes that the search for the best may make in all: about a second's work. Beyond it, those with the
# lowest bounds are kept, and the plan is the best found, within a known distance of the best.
_WORK = 1_000_000
# The first price alone rules out most; the others are tried on what it leaves.
_BLOCKS = (slice(0, 1), slice(1, 6), slice(6, None))
# Rounding of sums of prices times bytes, in time units, where one unit is 1e-10 of a step.
_MARGIN = 0.01


@dataclass(frozen=True)
class Found:
    """Index into each part's own choices, what they need, host and take, and the least that any may take."""

    choices: tuple[int, ...]
    need: int
    hosted: int
    time: int
    bound: int


@dataclass(frozen=True)
class _Suffixes:
    """Suffixes as columns, and how to follow each: the choice of its first part, and the suffix after it."""

    need: Whole
    hosted: Whole
    time: Whole
    choice: Whole
    group: Whole
    rest: Whole

    def rows(self, which) -> "_Suffixes":
        return _Suffixes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.need)


def fastest(parts: Sequence[Options], device: int, host: int) -> Found | None:
    """Least time within the budgets, then fewest host bytes, then lowest peak; None where nothing fits."""
    return _Search(parts, device, host, best_prices(parts, device, host), by_peak=False).best()


def smallest(parts: Sequence[Options], host: int) -> Found | None:
    """The lowest peak within the host budget, then the fewest host bytes; None where the host holds none."""
    still = [replace(o, forward=o.forward * 0, backward=o.backward * 0, overlaps=_timeless(o)) for o in parts]
    anything = sum(int(o.saved.max() + o.hosted.max() + o.peak.max()) for o in parts)
    return _Search(still, anything, host, best_prices(still, 0, host, by_peak=True), by_peak=True).best()


def _timeless(options: Options) -> tuple[Overlap, ...]:
    return tuple(Overlap(o.flight, 0, 0) for o in options.overlaps)


class _Search:
    """One search: the parts, the budgets, and at which prices the parts before a suffix are bounded."""

    def __init__(self, parts: Sequence[Options], device: int, host: int, best: Prices, *, by_peak: bool):
        self.parts = parts
        self.device, self.host = device, host
        self.by_peak = by_peak
        # Among equal times the bounds look at host bytes too, by a price that no sum makes worth a unit.
        self.tie = 0.0 if by_peak else 0.5 / (1 + sum(int(o.hosted.max()) for o in parts))
        self.prices = _around(best, vary_device=not by_peak)
        tied = replace(self.prices, host=self.prices.host + self.tie)
        self.before = cheapest_prefixes(parts, tied)
        # Of each row of prices, what falls on the moments of a suffix: (parts, rows).
        self.later = np.cumsum(self.prices.device[:, ::-1], axis=1)[:, ::-1].T
        # Bytes that the parts before must at least save, and host: a suffix that leaves less is no plan.
        end = np.zeros((2, len(parts)))
        end[0, -1] = 1.0
        still = [
            replace(o, forward=o.forward * 0, backward=o.backward * 0, overlaps=_timeless(o)) for o in parts
        ]
        self.least = cheapest_prefixes(still, Prices(end, np.array([0.0, 1.0])))

    def best(self) -> Found | None:
        found = self._run(None, _NARROW)
        if self.by_peak and found is not None:
            self.device = found.need
        if found is None:
            # Narrow searches may miss what just fits. The plan with the lowest peak does not.
            found = self._lowest()
        if found is None:
            return None
        widths = [len(o) * len(b.overlaps) for b, o in pairwise([*self.parts, self.parts[-1]])]
        wide = self._run(found, max(_NARROW, _WORK // sum(widths)))
        if wide is not None and not self.cut:
            return replace(wide, bound=wide.time)
        best = min((f for f in (wide, found) if f is not None), key=self._rank)
        return replace(best, bound=min(best.time, self._least_time()))

    def _rank(self, found: Found) -> tuple[int, ...]:
        need, hosted, time = found.need, found.hosted, found.time
        return (need, hosted) if self.by_peak else (time, hosted, need)

    def _least_time(self) -> int:
        """Units that no plan within the budgets can take less than, whatever was searched."""
        waits = np.array([overlap.offload + overlap.reload for overlap in self.parts[-1].overlaps])
        proven = (self.before[-1] + waits).min(axis=1) - self.paid
        # The price of host bytes among equal times comes to half a unit at most.
        return max(0, ceil(proven.max() - 0.5 - _MARGIN))

    def _lowest(self) -> Found | None:
        lowest = None if self.by_peak else smallest(self.parts, self.host)
        if lowest is None or lowest.need > self.device:
            return None
        time, before = 0, NOTHING
        for options, choice in zip(self.parts, lowest.choices, strict=True):
            c = int(np.flatnonzero(options.index == choice)[0])
            time += int(time_of(options, (before,))[0, c])
            before = options.overlaps[options.group[c]]
        return replace(lowest, time=time + before.offload + before.reload)

    def _run(self, known: Found | None, kept: int) -> Found | None:
        """Search among plans no worse than ``known``, with at most ``kept`` suffixes for each overlap."""
        self.cut = False
        if self.by_peak or known is None:
            ceiling = np.inf if known is None else _MARGIN
        else:
            ceiling = known.time + self.tie * known.hosted + _MARGIN
        paid = self.prices.device.sum(axis=1) * self.device + self.prices.host * self.host
        # Less what sums of such numbers may lose by rounding, so that a bound stays one.
        self.paid = paid * (1 + 1e-12)
        zero = np.zeros(1, np.int64)
        ends = [
            _Suffixes(zero - 2**61, zero, zero + overlap.offload + overlap.reload, zero, zero, zero)
            for overlap in self.parts[-1].overlaps
        ]
        stages = [ends]
        for i in reversed(range(len(self.parts))):
            before = self.parts[i - 1].overlaps if i else (NOTHING,)
            time = time_of(self.parts[i], before)
            stage = []
            for g, overlap in enumerate(before):
                some = self._extend(i, g, stages[-1], overlap.flight, time[g], ceiling)
                stage.append(self._narrow(some, i, g, ceiling, kept))
            stages.append(stage)
        (whole,) = stages[-1]
        if not len(whole):
            return None
        first = np.lexsort(
            (whole.hosted, whole.need) if self.by_peak else (whole.need, whole.hosted, whole.time)
        )
        return self._follow(stages, int(first[0]))

    def _extend(
        self, i: int, g: int, after: list[_Suffixes], flight: int, time: Whole, ceiling: float
    ) -> _Suffixes:
        """Every choice of part i before every suffix that it can stand before, ``flight`` bytes under way.

        Those that the first price rules out are never made.
        """
        options = self.parts[i]
        on_device, on_host = self.later[i][0], self.prices.host[0] + self.tie
        spare = ceiling - self.before[i][0, g] + self.paid[0]
        own = time + on_device * options.saved + on_host * options.hosted
        worth = [rest.time + on_device * rest.need + on_host * rest.hosted for rest in after]
        columns = []
        for c in range(len(options)):
            group = options.group[c]
            rows = np.flatnonzero(worth[group] <= spare - own[c])
            rest = after[group]
            need = np.maximum(options.peak[c] + flight, options.saved[c] + rest.need[rows])
            same = np.full(len(rows), 0)
            columns.append(
                _Suffixes(
                    need,
                    rest.hosted[rows] + options.hosted[c],
                    rest.time[rows] + time[c],
                    same + c,
                    same + group,
                    rows,
                )
            )
        return _Suffixes(*(np.concatenate([getattr(x, f.name) for x in columns]) for f in fields(_Suffixes)))

    def _narrow(self, all_: _Suffixes, i: int, g: int, ceiling: float, kept: int) -> _Suffixes:
        """Those that may lead to the best plan, sorted by time; the ``kept`` most promising of them."""
        save, hold = self.least[i][:, g]
        fits = (all_.need + save <= self.device) & (all_.hosted + hold <= self.host)
        some = all_.rows(fits)
        value = some.time + self.tie * some.hosted
        proven = np.full(len(some), -np.inf)
        chances = np.ones(len(some), bool)
        for block in _BLOCKS:
            on_host = self.prices.host[block]
            at = self.before[i][block, g] - self.paid[block]
            here = np.flatnonzero(chances)
            bound = (
                at + np.outer(some.need[here], self.later[i][block]) + np.outer(some.hosted[here], on_host)
            )
            proven[here] = np.maximum(proven[here], bound.max(axis=1) + value[here])
            chances[here] = proven[here] <= ceiling
        some, proven = some.rows(chances), proven[chances]
        order = np.lexsort((some.need, some.hosted, some.time))
        some, proven = some.rows(order), proven[order]
        best = np.array(_undominated(some), np.int64)
        if len(best) > kept:
            self.cut = True
            best = best[np.sort(np.argsort(proven[best], kind="stable")[:kept])]
        return some.rows(best)

    def _follow(self, stages: list[list[_Suffixes]], row: int) -> Found:
        whole = stages[-1][0]
        choices, group, at = [], 0, row
        for options, stage in zip(self.parts, reversed(stages[1:]), strict=True):
            suffixes = stage[group]
            choices.append(int(options.index[suffixes.choice[at]]))
            group, at = int(suffixes.group[at]), int(suffixes.rest[at])
        return Found(tuple(choices), int(whole.need[row]), int(whole.hosted[row]), int(whole.time[row]), 0)


def _around(best: Prices, *, vary_device: bool) -> Prices:
    """The best prices of a whole step, others near them, and none; the most promising first."""
    factors = np.array([1.0, 0.98, 1.02, 0.93, 1.07, 0.8, 1.25, 0.5, 2.0, 0.0])
    on_device, on_host = np.meshgrid(factors if vary_device else np.ones(1), factors, indexing="ij")
    far = np.add.outer(np.arange(len(on_device)), np.arange(len(factors))).ravel()
    order = np.argsort(far, kind="stable")
    device = on_device.ravel()[order, None] * best.device
    return Prices(device, on_host.ravel()[order] * best.host)


def _undominated(sorted_: _Suffixes) -> list[int]:
    """Rows that no other row beats or equals in time, host bytes and need, of rows sorted in that order."""
    kept = []
    # The rows so far that no other beats in host bytes and need: ascending in one, descending in the other.
    hosts: list[int] = []
    needs: list[int] = []
    for row, (host, need) in enumerate(zip(sorted_.hosted.tolist(), sorted_.need.tolist(), strict=True)):
        at = bisect_right(hosts, host)
        if at and needs[at - 1] <= need:
            continue
        kept.append(row)
        end = at
        while end < len(needs) and needs[end] >= need:
            end += 1
        # One with as many host bytes needs more than this one.
        start = at - 1 if at and hosts[at - 1] == host else at
        hosts[start:end] = [host]
        needs[start:end] = [need]
    return kept
