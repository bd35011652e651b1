"""The fastest choices within the budgets: a search from the last part to the first.

A *suffix* is a choice for each of the parts from one on. All that matters of it to the parts before is four
numbers: what it needs (the device bytes that its worst moment takes beyond what earlier parts save), what its
first moment needs beyond that and what is in flight, what it hosts, and its time. One that is no better than
another in any of them is dropped, and so is one that the lower bound of the parts before it (``bounds.py``)
rules out: not even they could make it better than the best plan known. That plan comes from the same search
with few suffixes kept. Nothing else is dropped, unless there are more than a second's work allows; what
remains at the first part is then the optimum.

Numbers are whole (time in units), so that equal plans are equal, and ties go to the fewer host bytes and then
to the lower peak.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, inf
from typing import Any

import numpy as np

from rewriter.memory.bounds import (
    Floats,
    Prices,
    cheapest_prefixes,
    cheapest_suffixes,
    prices_around,
    times_of,
)
from rewriter.memory.frontier import frontier
from rewriter.memory.options import Options, Whole
from rewriter.memory.relaxation import relaxed
from rewriter.memory.staircase import Staircase, staircases

# Suffixes kept for each overlap by the first search, and how many times as many by each further one, which
# knows the plan of the one before.
_NARROW = 16
_WIDER = 8
# Suffixes that all searches may make: about a second's work. Beyond it, those with the lowest bounds are
# kept, and the plan is the best found, within a known distance of the best.
_WORK = 3_000_000
# After so many searches beside the first, only what is faster is searched for.
_TIED = 1
# Units that the price of all host bytes comes to, among plans that take equally long.
_TIE = 0.5
# Chances that differ by less units than this are as good.
_ALIKE = 0.001
# The first price alone rules out most; the others are tried on what it leaves.
_BLOCKS = (slice(0, 8), slice(8, None))
# Rounding of sums of prices times bytes, in time units, where one unit is 1e-10 of a step.
_MARGIN = 0.01
_NEVER = -(2**61)


@dataclass(frozen=True)
class Found:
    """Index into each part's own choices, and what they need, host and take."""

    choices: tuple[int, ...]
    need: int
    hosted: int
    time: int


@dataclass(frozen=True)
class _Suffixes:
    """Suffixes as columns, and how to follow each: the choice of its first part, and the suffix after it.

    ``first`` is what the first moment needs beside flight, or what of it can matter; ``need`` what all
    later ones do.
    """

    first: Whole
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


@dataclass(frozen=True)
class _Limit:
    """Of plans that are searched: most units, ``cost`` with the price of host bytes and ``time`` without."""

    cost: float
    time: float

    @classmethod
    def of(cls, known: Found | None, below: int | None, tie: float, strict: bool) -> "_Limit":
        """Less time than ``below``, and no more than ``known``; less with ``strict``."""
        if known is None:
            return cls(inf, inf) if below is None else cls(below - 1 + _TIE + _MARGIN, below - 1)
        if strict:
            return cls(known.time - 1 + _TIE + _MARGIN, known.time - 1)
        return cls(known.time + tie * known.hosted + _MARGIN, known.time)


class Search:
    """One search: the parts, the budgets, and at which prices the parts before a suffix are bounded.

    Attributes:
        bound: units that no plan within the budgets takes less than, as far as it is known; infinite where it
            is proven that nothing fits. Bytes of the peak, where that is to be least.
    """

    def __init__(self, parts: Sequence[Options], device: int | None, host: int):
        """Without ``device`` it is the peak that is to be least, of parts that take no time."""
        self.by_peak = by_peak = device is None
        if device is None:
            device = sum(int(o.saved.max() + o.flight.max() + o.peak.max()) for o in parts)
        self.parts, self.device, self.host = parts, device, host
        self.times = times_of(parts)
        # Among equal times the bounds look at host bytes too, by a price that no sum makes worth a unit.
        self.tie = 0.0 if by_peak else _TIE / (1 + sum(int(o.hosted.max()) for o in parts))
        found = relaxed(parts, device, host, by_peak=by_peak)
        self.best_prices = found.prices
        slowest = sum(int(time.max()) for time in self.times)
        lost = float((self._paid(found.prices) - found.prices.paid(device, host))[0])
        bound = ceil(found.bound - lost - _MARGIN)
        self.bound = bound if by_peak or bound <= slowest else inf
        self.prices = prices_around(found.prices, self.tie, vary_device=not by_peak)
        self.priced = replace(self.prices, host=self.prices.host + self.tie).of(parts)
        self.before = cheapest_prefixes(parts, self.times, self.priced)
        # Of each row of prices, what falls on the moments from a part on: (parts + 2, rows).
        self.device_prices = np.pad(self.prices.device, ((0, 0), (0, 2)))
        self.later = np.cumsum(self.device_prices[:, ::-1], axis=1)[:, ::-1].T
        # Bytes that the parts before must at least save, and host: a suffix that leaves less is no plan.
        self.saves = np.cumsum([0, *(int(o.saved.min()) for o in parts)])
        self.holds = np.cumsum([0, *(int(o.hosted.min()) for o in parts)])
        self.stairs: list[list[Staircase]] | None = None

    def best(self, below: int | None = None) -> Found | None:
        """The plan that takes the least time, then the fewest host bytes, then the lowest peak.

        Where very many plans take equally long, not all of them are looked at. None where nothing fits, or
        not in less than ``below`` units; ``bound`` says whether that is proven.
        """
        if self.bound == inf or (below is not None and self.bound >= below):
            return None
        found = None
        for turn, width in enumerate(self._widths()):
            better = self._run(_Limit.of(found, below, self.tie, strict=turn > _TIED), width)
            self.improved = better is not None
            found = found if better is None else better
            least = min(inf if found is None else found.time, inf if below is None else below)
            if not self.cut:
                self.bound = max(self.bound, least)
                break
            if least < inf:
                self._climb(least)
            if turn and self.bound >= least:
                break
        return found

    def lowest(self) -> Found | None:
        """The plan of the lowest peak within the host budget, then the fewest host bytes; where one fits."""
        found = None
        for turn, width in enumerate(self._widths()):
            # What fits has to need less than what was found; first, as much with fewer host bytes.
            strict = turn > _TIED
            if found is not None:
                self.device = found.need - int(strict)
            better = self._run(_Limit(_MARGIN if found else inf, inf), width)
            self.improved = better is not None
            found = found if better is None else better
            if not self.cut or (found is not None and turn and found.need <= self.bound):
                break
        return found

    def _widths(self) -> Iterator[int]:
        """Of one search after the other: as wide as the work allows that is left."""
        self.made, self.improved, width = 0, False, _NARROW
        while width >= _NARROW:
            before = self.made
            yield width
            # Half of what is left, since one that finds a better plan makes the next an easy one.
            share = (_WORK - self.made) / max(1, self.made - before) / 2
            if share < 1 and not self.improved:
                return
            width = int(width * min(share, _WIDER))

    def _climb(self, most: float) -> None:
        """Make staircases for plans of at most ``most`` units, and see what they say of all."""
        priced = self.best_prices.of(self.parts)
        after = cheapest_suffixes(self.parts, self.times, priced)
        paid = self._paid(self.best_prices)
        self.stairs = staircases(self.parts, self.times, priced, after, paid[0] + most + _MARGIN)
        least = min(float(stairs.least(paid + _MARGIN)[0]) for stairs in self.stairs[-1])
        self.bound = max(self.bound, min(least, most))

    def _paid(self, prices: Prices) -> Floats:
        # More than it is by what sums of such numbers may lose by rounding, so that a bound stays one.
        return prices.paid(self.device, self.host) * (1 + 1e-12)

    def _run(self, limit: "_Limit", kept: int) -> Found | None:
        """Search among plans within ``limit``, with at most ``kept`` suffixes for each overlap."""
        self.cut, self.limit = False, limit
        self.paid = self._paid(self.prices)
        zero = np.zeros(1, np.int64)
        end = _Suffixes(zero + _NEVER, zero + _NEVER, zero, zero, zero, zero, zero)
        stages = [[end] * len(self.parts[-1].overlaps)]
        for i in reversed(range(len(self.parts))):
            groups = range(len(self.parts[i - 1].overlaps) if i else 1)
            stages.append([self._narrow(self._extend(i, g, stages[-1]), i, g, kept) for g in groups])
        (whole,) = stages[-1]
        if not len(whole):
            return None
        first = np.lexsort(
            (whole.hosted, whole.need) if self.by_peak else (whole.need, whole.hosted, whole.time)
        )
        return self._follow(stages, int(first[0]))

    def _extend(self, i: int, g: int, after: list[_Suffixes]) -> _Suffixes:
        """Every choice of part i, after overlap g, before every suffix that it can stand before.

        Those that the first price rules out are never made.
        """
        options, time = self.parts[i], self.times[i][g]
        on_host = self.prices.host[0] + self.tie
        soon, later = self.device_prices[0, i + 1], self.later[i + 2][0]
        spare = self.limit.cost - self.before[i][0, g] + self.paid[0] - (time + self.priced[i][0])
        columns = []
        for group, rest in enumerate(after):
            own = np.flatnonzero(options.group == group)
            worth = rest.time + soon * rest.first + later * rest.need + on_host * rest.hosted
            order = np.argsort(worth, kind="stable")
            counts = np.searchsorted(worth[order], spare[own], "right")
            choice = np.repeat(own, counts)
            rows = order[np.arange(len(choice)) - np.repeat(np.cumsum(counts) - counts, counts)]
            after_ = np.maximum(rest.first[rows] + options.flight[choice], rest.need[rows])
            columns.append(
                _Suffixes(
                    options.peak[choice],
                    options.saved[choice] + after_,
                    rest.hosted[rows] + options.hosted[choice],
                    rest.time[rows] + time[choice],
                    choice,
                    np.full(len(rows), group),
                    rows,
                )
            )
        return _Suffixes(*(np.concatenate([getattr(x, f.name) for x in columns]) for f in fields(_Suffixes)))

    def _narrow(self, all_: _Suffixes, i: int, g: int, kept: int) -> _Suffixes:
        """Those that may lead to the best plan, sorted by time; the ``kept`` most promising of them."""
        before = self.parts[i - 1] if i else None
        flights = np.zeros(1, np.int64) if before is None else before.flight[before.group == g]
        # A first moment that needs less than all later ones, whatever is in flight, might as well need more.
        self.made += len(all_)
        least = all_.need - flights.max()
        first = np.maximum(all_.first, least)
        some = replace(all_, first=first, need=np.maximum(all_.need, first + flights.min()))
        some = some.rows(
            (some.need + self.saves[i] <= self.device) & (some.hosted + self.holds[i] <= self.host)
        )
        some = some.rows(self._in_time(some, i, g))
        some, proven = self._bounded(some, i, g)
        order = np.lexsort((some.first, some.need, some.hosted, some.time))
        some, proven = some.rows(order), proven[order]
        best = frontier(some.hosted, some.need, some.first, some.first <= some.need - flights.max())
        if len(best) > kept:
            self.cut = True
            # Of nearly equal chances those that leave most of the scarcer memory.
            taken = np.maximum(some.need / max(1, self.device), some.hosted / max(1, self.host))
            chance = np.floor(proven / _ALIKE)
            best = best[np.sort(np.lexsort((taken[best], chance[best]))[:kept])]
        return some.rows(best)

    def _in_time(self, some: _Suffixes, i: int, g: int) -> Any:
        """Which of them the staircase of the parts before leaves a chance."""
        if self.stairs is None:
            return np.ones(len(some), bool)
        prices = self.best_prices
        own = prices.device[0, i : i + 1].sum() * some.first + self.later[i + 1][0] * some.need
        left = self._paid(prices)[0] + _MARGIN - own - prices.host[0] * some.hosted
        return some.time + self.stairs[i][g].least(left) <= self.limit.time

    def _bounded(self, some: _Suffixes, i: int, g: int) -> tuple[_Suffixes, Floats]:
        """Those that no price rules out, and the least that a plan with each of them costs."""
        proven = np.full(len(some), -np.inf)
        for block in _BLOCKS:
            at = self.before[i][block, g] - self.paid[block]
            prices = [self.device_prices[block, i], self.later[i + 1][block], self.prices.host[block]]
            numbers = np.stack([some.first, some.need, some.hosted], axis=1)
            bound = (numbers @ np.stack(prices) + at).max(axis=1, initial=-np.inf)
            proven = np.maximum(proven, bound + some.time + self.tie * some.hosted)
            chances = proven <= self.limit.cost
            some, proven = some.rows(chances), proven[chances]
        return some, proven

    def _follow(self, stages: list[list[_Suffixes]], row: int) -> Found:
        whole = stages[-1][0]
        choices, group, at = [], 0, row
        for options, stage in zip(self.parts, reversed(stages[1:]), strict=True):
            suffixes = stage[group]
            choices.append(int(options.index[suffixes.choice[at]]))
            group, at = int(suffixes.group[at]), int(suffixes.rest[at])
        return Found(tuple(choices), int(whole.need[row]), int(whole.hosted[row]), int(whole.time[row]))
