"""The prices of memory at which the bounds of a step are tightest: the duals of its linear relaxation.

A step is a path through (part, choice), each arc of which knows the overlap that it comes with. Letting a
path split into fractions makes the search a linear program: one flow, a bound for each moment, one for the
host. Its duals are the prices that no other prices beat. ``bounds.py`` turns any prices into a bound, so that
nothing rests on the solver's tolerance.

Few choices are in its solution, so that it is solved with few, and those that its prices make the cheapest
are added until they are all there (column generation). SciPy's HiGHS solves each. Where it gives up, the
best prices of the programs before are taken, or of a few that are tried: a weaker bound, and a bound still.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rewriter.memory.bounds import Floats, Prices, cheapest_prefixes, cheapest_suffixes, times_of
from rewriter.memory.options import Options, Whole

log = logging.getLogger(__name__)

Entries = Iterable[tuple[int, float]]

# Programs that are solved at most: each adds choices to the next.
_ROUNDS = 12
# Choices that are added to a part in a round.
_ADDED = 4
# A bound as near as this to the relaxation's own value is as good.
_NEAR = 1e-7
# A byte too many costs as much as so many whole steps.
_FORBIDDEN = 1e3


@dataclass(frozen=True)
class Relaxed:
    """The best prices found, one row, and the bound that they give: units, or bytes where memory counts."""

    prices: Prices
    bound: float


def relaxed(parts: Sequence[Options], device: int, host: int, *, by_peak: bool = False) -> Relaxed:
    """The best prices in time units per byte; where not even fractions of plans fit, forbidding ones.

    With ``by_peak``, the prices that bound the lowest peak, in bytes per byte; ``device`` is not read.
    """
    device = 0 if by_peak else device
    times = times_of(parts)
    chosen = _first_choices(parts)
    best: Relaxed | None = None
    for _ in range(_ROUNDS):
        solved = _solved(parts, times, chosen, device, host, by_peak)
        if solved is None:
            break
        prices, value = solved
        priced = prices.of(parts)
        before = cheapest_prefixes(parts, times, priced)
        bound = float(before[-1].min() - prices.paid(device, host)[0])
        if best is None or bound > best.bound:
            best = Relaxed(prices, bound)
        after = cheapest_suffixes(parts, times, priced)
        added = False
        for i, options in enumerate(parts):
            through = (before[i][0][:, None] + times[i]).min(axis=0) + priced[i][0]
            through = through + after[i + 1][0][options.group] - prices.paid(device, host)[0]
            order = np.argsort(through)[:_ADDED]
            new = set(order[through[order] < value - _NEAR * abs(value)].tolist()) - chosen[i]
            added = added or bool(new)
            chosen[i] |= new
        if not added or value - bound <= _NEAR * abs(value):
            break
    return best or _tried(parts, times, device, host, by_peak)


# Of a step's time over all bytes: what those may be worth that are tried.
_WORTHS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


def _tried(
    parts: Sequence[Options], times: Sequence[Whole], device: int, host: int, by_peak: bool
) -> Relaxed:
    """Of prices that are the same for the last moments, or for all, those that bound the most."""
    last, evenly = np.eye(len(parts))[-1], np.full(len(parts), 1 / len(parts))
    if by_peak:
        prices = Prices(np.stack([last, evenly]), np.zeros(2))
    else:
        slowest = sum(int(time.max()) for time in times)
        largest = max(1, *(int((o.saved + o.peak).max()) for o in parts))
        hosted = max(1, sum(int(o.hosted.max()) for o in parts))
        rows = list(itertools.product(_WORTHS, _WORTHS, (last, evenly)))
        on_device = np.stack([worth * slowest / (largest * len(parts)) * where for worth, _, where in rows])
        prices = Prices(on_device, np.array([worth * slowest / hosted for _, worth, _ in rows]))
    bounds = cheapest_prefixes(parts, times, prices.of(parts))[-1].min(axis=1) - prices.paid(device, host)
    row = int(bounds.argmax())
    return Relaxed(Prices(prices.device[row : row + 1], prices.host[row : row + 1]), float(bounds[row]))


def _first_choices(parts: Sequence[Options]) -> list[set[int]]:
    """Of each part, those that some prices of bytes, from little to much, make the cheapest."""
    made = {key: _cheapest(o) for key, o in {id(o): o for o in parts}.items()}
    return [set(made[id(o)]) for o in parts]


_PRICES = (0.0, 0.05, 0.2, 0.8, 3.2, 12.8, 1e3)


def _cheapest(options: Options) -> set[int]:
    time = (options.forward + options.backward).astype(float)
    unit = max(1.0, time.max() - time.min()) / max(1, int(options.saved.max()), int(options.hosted.max()))
    taken: set[int] = set()
    for here, there, at_once in itertools.product(_PRICES, repeat=3):
        price = here * options.saved + there * options.hosted + at_once / 2 * (options.peak + options.flight)
        taken.add(int(np.argmin(time + unit * price)))
    return taken


def _solved(
    parts: Sequence[Options],
    times: Sequence[Whole],
    chosen: Sequence[set[int]],
    device: int,
    host: int,
    by_peak: bool,
) -> tuple[Prices, float] | None:
    """Prices and value of the relaxation with the choices in ``chosen`` alone; None if not solved."""
    # Solvers want numbers near 1.
    largest = max(1, device, *(int(options.peak.max()) for options in parts))
    slowest = max(1, *(int(time.max()) for time in times))
    program = _Program()
    saved = program.variable()
    program.equal([(saved, 1.0)], 0.0)
    # What is bounded may be exceeded: at the peak's own price, or at one that no plan is worth.
    excess = program.variable(1.0 if by_peak else _FORBIDDEN * len(parts))
    arriving: dict[int, list[int]] = {0: []}
    flying: Entries = []
    in_host: list[tuple[int, float]] = []
    for i, options in enumerate(parts):
        rows = np.array(sorted(chosen[i]))
        groups = np.array(sorted(arriving))
        arcs = program.variables(times[i][np.ix_(groups, rows)] * (0.0 if by_peak else 1 / slowest))
        for leaving, g in zip(arcs, groups.tolist(), strict=True):
            inflow = arriving[g]
            flow = [*((arc, 1.0) for arc in leaving.tolist()), *((arc, -1.0) for arc in inflow)]
            program.equal(flow, 0.0 if inflow else 1.0)
        moment = [(saved, 1.0), *flying, *_weighted(arcs, options.peak[rows] / largest)]
        program.at_most([*moment, (excess, -1.0)], device / largest)
        flying = _weighted(arcs, options.flight[rows] / largest)
        after = program.variable()
        program.equal([(after, 1.0), (saved, -1.0), *_weighted(arcs, -options.saved[rows] / largest)], 0.0)
        in_host += _weighted(arcs, options.hosted[rows] / largest)
        own = options.group[rows]
        arriving = {g: arcs[:, own == g].ravel().tolist() for g in np.unique(own).tolist()}
        saved = after
    over = program.variable(_FORBIDDEN * len(parts))
    program.at_most([*in_host, (over, -1.0)], host / largest)
    if (solved := program.duals()) is None:
        return None
    duals, value = solved
    # With a peak, they add up to one byte for a byte of it, but for the solver's rounding.
    scale = 1 / (duals[:-1].sum() or 1.0) if by_peak else slowest / largest
    return Prices(duals[None, :-1] * scale, duals[-1:] * scale), value * (largest if by_peak else slowest)


def _weighted(arcs: Whole, weights: Floats) -> list[tuple[int, float]]:
    spread = np.broadcast_to(weights, arcs.shape)
    return [(a, w) for a, w in zip(arcs.ravel().tolist(), spread.ravel().tolist(), strict=True) if w]


class _Rows:
    """Rows of a sparse matrix, and their right-hand sides."""

    def __init__(self):
        self.place: tuple[list[int], list[int]] = [], []
        self.value: list[float] = []
        self.right: list[float] = []

    def add(self, entries: Entries, right: float) -> None:
        entries = list(entries)
        self.place[0].extend([len(self.right)] * len(entries))
        self.place[1].extend([column for column, _ in entries])
        self.value.extend([value for _, value in entries])
        self.right.append(right)


class _Program:
    """A linear program in the making: least cost of variables that are not negative."""

    def __init__(self):
        self.costs: list[float] = []
        self.bounds, self.equations = _Rows(), _Rows()

    def variable(self, cost: float = 0.0) -> int:
        self.costs.append(cost)
        return len(self.costs) - 1

    def variables(self, costs: np.ndarray) -> np.ndarray:
        """Numbers of new variables, in the shape of their costs."""
        first = len(self.costs)
        self.costs += costs.ravel().tolist()
        return np.arange(first, len(self.costs)).reshape(costs.shape)

    def at_most(self, entries: Entries, right: float) -> None:
        self.bounds.add(entries, right)

    def equal(self, entries: Entries, right: float) -> None:
        self.equations.add(entries, right)

    def duals(self) -> tuple[np.ndarray, float] | None:
        """What a unit more of each bound would save, and the least cost; None where the solver gives up."""
        # Imported where it is needed: half a second that a step without a budget need not wait for.
        from scipy.optimize import linprog
        from scipy.sparse import csr_array

        def matrix(rows: _Rows):
            return csr_array((rows.value, rows.place), shape=(len(rows.right), len(self.costs)))

        solved = linprog(
            self.costs,
            matrix(self.bounds),
            self.bounds.right,
            matrix(self.equations),
            self.equations.right,
            method="highs",
        )
        if solved.status != 0:
            log.info("the relaxation of a plan is not solved, its bound is weaker: %s", solved.message)
            return None
        return np.maximum(0.0, -solved.ineqlin.marginals), float(solved.fun)
