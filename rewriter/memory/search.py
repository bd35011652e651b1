"""The fastest choices within the budgets: a search from the last part to the first.

A *suffix* (``suffixes.py``) is a choice for each of the parts from one on. What matters of it to the parts
before is four numbers: what it needs (the device bytes that its worst moment takes beyond what earlier parts
save), what its first moment needs beyond that and what is in flight, what it hosts, and its time. One that is
no better than another in any of them is dropped (``frontier.py``), and so is one to which the parts before it
leave no chance (``chances.py``): not even they could make it better than the best plan known. That plan comes
from the same search with few suffixes kept. Nothing else is dropped, unless there are more than a second's
work allows; what remains at the first part is then the optimum.

Numbers are whole (time in units), so that equal plans are equal, and ties go to the fewer host bytes and then
to the lower peak.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil, inf

import numpy as np

from rewriter.memory.bounds import Floats
from rewriter.memory.chances import MARGIN, Chances, Limit, paid
from rewriter.memory.frontier import frontier
from rewriter.memory.options import Options, Whole
from rewriter.memory.relaxation import relaxed
from rewriter.memory.suffixes import Following, Found, Suffixes, followed

# Suffixes kept for each overlap by the first search, or fewer, so that it takes at most one of so many parts
# of the work; and how many times as many by each further one, which knows the plan of the one before.
_NARROW = 16
_FIRST = 4
_WIDER = 8
# Suffixes that all searches may make, with what comparing them comes to: about a second's work. Beyond it,
# those with the lowest bounds are kept, and the plan is the best found, within a known distance of the best.
WORK = 5_000_000
# Suffixes that are compared before more of them are, for each that is kept; and the work of comparing one,
# and of narrowing any number of them, where that of making one is 1.
_FEW = 4
_COMPARED = 4
_NARROWING = 500
# After so many searches beside the first, only what is faster is searched for.
_TIED = 1
# Chances that differ by less units than this are as good.
_ALIKE = 0.001

# Of each overlap: the choices that have it, and what may stand behind them, by its rising worth.
_Behind = tuple[Following, list[tuple[Whole, Whole, Floats]]]


class Search:
    """One search: the parts and the budgets, and what is proven of them.

    Attributes:
        bound: units that no plan within the budgets takes less than, as far as it is known; infinite where it
            is proven that nothing fits. Bytes of the peak, where that is to be least.
        done: work that its searches took, in suffixes made.
    """

    def __init__(self, parts: Sequence[Options], device: int | None, host: int):
        """Without ``device`` it is the peak that is to be least, of parts that take no time."""
        self._by_peak = by_peak = device is None
        if device is None:
            device = sum(int(o.saved.max() + o.flight.max() + o.peak.max()) for o in parts)
        found = relaxed(parts, device, host, by_peak=by_peak)
        self._parts, self.done, self._relaxed = parts, 0, found
        self._chances = Chances(parts, device, host, found.prices, by_peak=by_peak)
        slowest = sum(int(time.max()) for time in self._chances.times)
        lost = float((paid(found.prices, device, host) - found.prices.paid(device, host))[0])
        bound = ceil(found.bound - lost - MARGIN)
        self.bound = bound if by_peak or bound <= slowest else inf

    def bound_within(self, device: int) -> float:
        """Units that no plan takes less than within another device budget, by the prices that are known."""
        prices, now = self._relaxed.prices, self._chances
        more = paid(prices, device, now.host) - prices.paid(now.device, now.host)
        return self._relaxed.bound - float(more[0]) - MARGIN

    def best(self, below: int | None = None, work: float = WORK) -> Found | None:
        """The plan that takes the least time, then the fewest host bytes, then the lowest peak.

        Where very many plans take equally long, not all of them are looked at. None where nothing fits, or
        not in less than ``below`` units; ``bound`` says whether that is proven. ``work`` is the most that is
        done, ``done`` what was.
        """
        if self.bound == inf or (below is not None and self.bound >= below):
            return None
        found, limit = None, Limit() if below is None else Limit.below(below)
        climbed = inf
        for turn, width in enumerate(self._widths(work)):
            if found is not None:
                strict = turn > _TIED
                limit = Limit.below(found.time) if strict else Limit.as_good_as(found, self._chances.tie)
            better = self._run(limit, width)
            self._improved = better is not None
            found = found if better is None else better
            least = min(inf if found is None else found.time, inf if below is None else below)
            if not self._cut:
                self.bound = max(self.bound, least)
                break
            if least < climbed:
                proven = self._chances.climb(least)
                # Where that proves no more than the prices do, it will not for a somewhat faster plan.
                climbed, self.bound = least if proven > self.bound else 0, max(self.bound, proven)
            if turn and self.bound >= least:
                break
        return found

    def lowest(self) -> Found | None:
        """The plan of the lowest peak within the host budget, then the fewest host bytes; where one fits."""
        found = None
        for turn, width in enumerate(self._widths(WORK)):
            # What fits has to need less than what was found; first, as much with fewer host bytes.
            strict = turn > _TIED
            if found is not None:
                self._chances.device = found.need - int(strict)
            better = self._run(Limit(MARGIN if found else inf), width)
            self._improved = better is not None
            found = found if better is None else better
            if not self._cut or (found is not None and turn and found.need <= self.bound):
                break
        return found

    def _widths(self, work: float) -> Iterator[int]:
        """Of one search after the other: as wide as the work allows that is left."""
        each = sum(len(t) * len(o) for t, o in zip(self._chances.times, self._parts, strict=True))
        first = width = max(1, min(_NARROW, int(work / _FIRST / each)))
        self._improved = False
        for turn in itertools.count():
            before = self.done
            yield width
            share = (work - self.done) / max(1, self.done - before)
            # Half of what is left, since one that finds a better plan makes the next an easy one.
            share = share / 2 if share >= 2 else share
            if share < 1 and not self._improved:
                return
            width = int(width * min(share, _WIDER))
            if width < first:
                if turn:
                    return
                # No more work than the first time, and mostly far less, since a plan is known.
                width = first

    def _run(self, limit: Limit, kept: int) -> Found | None:
        """Search among plans within ``limit``, with at most ``kept`` suffixes for each overlap."""
        self._cut = False
        after = [Suffixes.end()] * len(self._parts[-1].overlaps)
        stages = []
        for i in reversed(range(len(self._parts))):
            groups, behind = range(len(self._parts[i - 1].overlaps) if i else 1), self._behind(after, i)
            after = [self._narrow(self._extend(behind, i, g, limit), i, g, limit, kept) for g in groups]
            stages.append(after)
        (whole,) = after
        if not len(whole):
            return None
        by_peak = (whole.hosted, whole.need)
        first = np.lexsort(by_peak if self._by_peak else (whole.need, whole.hosted, whole.time))
        return followed(self._parts, stages, int(first[0]))

    def _behind(self, after: Sequence[Suffixes], i: int) -> _Behind:
        """What may stand behind part i, by what it is worth, and the choices that it may stand behind."""
        following = Following.of(after)
        worth = self._chances.worth(following.suffixes, i + 1)
        by_group = []
        for group in range(len(after)):
            rows = np.flatnonzero(following.group == group)
            order = rows[np.argsort(worth[rows], kind="stable")]
            by_group.append((np.flatnonzero(self._parts[i].group == group), order, worth[order]))
        return following, by_group

    def _extend(self, behind: _Behind, i: int, g: int, limit: Limit) -> Suffixes:
        """Every choice of part i, after overlap g, before every suffix that it can stand before.

        Those that the first price rules out are never made.
        """
        following, by_group = behind
        spare = self._chances.spare(i, g, limit)
        choices, rows = [], []
        for own, order, worth in by_group:
            counts = np.searchsorted(worth, spare[own], "right")
            choices.append(np.repeat(own, counts))
            places = np.arange(len(choices[-1])) - np.repeat(np.cumsum(counts) - counts, counts)
            rows.append(order[places])
        time = self._chances.times[i][g]
        return following.behind(self._parts[i], time, np.concatenate(choices), np.concatenate(rows))

    def _narrow(self, all_: Suffixes, i: int, g: int, limit: Limit, kept: int) -> Suffixes:
        """Those that may lead to the best plan, sorted by time; the ``kept`` most promising of them."""
        before = self._parts[i - 1] if i else None
        flights = np.zeros(1, np.int64) if before is None else before.flight[before.group == g]
        self.done += len(all_) + _NARROWING
        # A first moment that needs less than all later ones, whatever is in flight, might as well need more.
        first = np.maximum(all_.first, all_.need - flights.max())
        some = replace(all_, first=first, need=np.maximum(all_.need, first + flights.min()))
        some, proven = self._chances.among(some, i, g, limit)
        promising = self._promising(some, proven)
        rank = np.empty(len(some), np.int64)
        rank[promising] = np.arange(len(some))
        best, seen = promising[:0], 0
        # What beats another promises no less: where the most promising are enough, no more are compared.
        while seen < len(some) and len(best) <= kept:
            count = max(_FEW * kept, seen)
            rows = np.concatenate([best, promising[seen : seen + count]])
            rows = rows[np.lexsort((some.first[rows], some.need[rows], some.hosted[rows], some.time[rows]))]
            few = some.rows(rows)
            best = rows[frontier(few.hosted, few.need, few.first, few.first <= few.need - flights.max())]
            self.done += _COMPARED * len(rows)
            seen += count
        if len(best) > kept:
            self._cut = True
            best = best[np.sort(np.argsort(rank[best])[:kept])]
        return some.rows(best)

    def _promising(self, some: Suffixes, proven: Floats) -> Whole:
        """Rows by their chances; of nearly equal ones those first that leave most of the scarcer memory."""
        device, host = max(1, self._chances.device), max(1, self._chances.host)
        taken = np.maximum(some.need / device, some.hosted / host)
        return np.lexsort((taken, np.floor(proven / _ALIKE)))
