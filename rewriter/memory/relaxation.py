"""The prices of memory at which the bounds of a step are tightest: the duals of its linear relaxation.

A step is a path through (part, choice), each arc of which knows the overlap that it comes with. Letting a
path split into fractions makes the search a linear program: one flow, a bound for each moment, one for the
host. Its duals are the prices that no other prices beat. ``bounds.py`` turns any prices into a bound, so that
nothing rests on the solver's tolerance, nor on all choices being in it: of many, those that some price makes
the cheapest are. SciPy's HiGHS solves it: 0.1 s for 80 parts with 12 choices.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from rewriter.memory.bounds import NOTHING, Options, Overlap, Prices, time_of

Entries = Iterable[tuple[int, float]]


def best_prices(parts: Sequence[Options], device: int, host: int, *, by_peak: bool = False) -> Prices:
    """One row of prices, in time units per byte; zeros where not even fractions of plans fit.

    With ``by_peak``, the prices that bound the lowest peak, whatever the time, in bytes per byte; ``device``
    is not read.
    """
    # Solvers want numbers near 1.
    parts = _few(parts)
    largest = max(1, device, *(int(options.peak.max()) for options in parts))
    slowest = max(1, *(int(options.forward.max() + options.backward.max()) for options in parts))
    program = _Program()
    saved = program.variable()
    program.equal([(saved, 1.0)], 0.0)
    peak = program.variable(1.0) if by_peak else None
    before: tuple[Overlap, ...] = (NOTHING,)
    arriving: list[list[int]] = [[]]
    in_host: list[tuple[int, float]] = []
    for i, options in enumerate(parts):
        time = time_of(options, before)
        if i == len(parts) - 1:
            waits = np.array([overlap.offload + overlap.reload for overlap in options.overlaps])
            time = time + waits[options.group]
        arcs = program.variables(time * (0.0 if by_peak else 1 / slowest))
        for leaving, inflow in zip(arcs, arriving, strict=True):
            flow = [*((arc, 1.0) for arc in leaving), *((arc, -1.0) for arc in inflow)]
            program.equal(flow, 0.0 if inflow else 1.0)
        flight = np.array([[overlap.flight] for overlap in before])
        moment = [(saved, 1.0), *_weighted(arcs, (options.peak + flight) / largest)]
        if peak is None:
            program.at_most(moment, device / largest)
        else:
            program.at_most([*moment, (peak, -1.0)], 0.0)
        after = program.variable()
        own = _weighted(arcs, np.broadcast_to(-options.saved / largest, arcs.shape))
        program.equal([(after, 1.0), (saved, -1.0), *own], 0.0)
        in_host += _weighted(arcs, np.broadcast_to(options.hosted / largest, arcs.shape))
        arriving = [arcs[:, options.group == g].ravel().tolist() for g in range(len(options.overlaps))]
        before, saved = options.overlaps, after
    program.at_most(in_host, host / largest)
    duals = program.duals()
    if duals is None:
        return Prices(np.zeros((1, len(parts))), np.zeros(1))
    # With a peak, they add up to one byte for a byte of it, but for the solver's rounding.
    duals *= 1 / (duals[:-1].sum() or 1.0) if by_peak else slowest / largest
    return Prices(duals[None, :-1], duals[-1:])


# More choices than this are thinned out.
_MANY = 48
# Of each price the so many cheapest choices are taken, at prices of bytes from little to much.
_CHEAPEST = 8
_PRICES = (0.0, 0.05, 0.2, 0.8, 3.2, 12.8)


def _few(parts: Sequence[Options]) -> list[Options]:
    """``parts`` with the choices that matter to prices."""
    made = {id(o): _thinned(o) if len(o) > _MANY else o for o in parts}
    return [made[id(o)] for o in parts]


def _thinned(options: Options) -> Options:
    time = (options.forward + options.backward).astype(float)
    copies = np.array([o.offload + o.reload for o in options.overlaps])[options.group]
    flight = np.array([o.flight for o in options.overlaps])[options.group]
    unit = (time.max() - time.min()) / max(1, int(options.saved.max()), int(options.hosted.max()))
    taken: set[int] = set()
    for here, there, at_once in itertools.product(_PRICES, repeat=3):
        price = here * options.saved + there * options.hosted + at_once / 2 * (options.peak + flight)
        for waiting in (0.0, 0.3):
            total = time + unit * price + waiting * copies
            taken.update(np.argpartition(total, _CHEAPEST)[:_CHEAPEST].tolist())
    rows = np.array(sorted(taken))
    names = ("index", "saved", "hosted", "peak", "forward", "backward")
    left = {name: getattr(options, name)[rows] for name in names}
    groups, group = np.unique(options.group[rows], return_inverse=True)
    return Options(**left, group=group, overlaps=tuple(options.overlaps[g] for g in groups))


def _weighted(arcs: np.ndarray, weights: np.ndarray) -> list[tuple[int, float]]:
    return list(zip(arcs.ravel().tolist(), weights.ravel().tolist(), strict=True))


class _Rows:
    """Rows of a sparse matrix, and their right-hand sides."""

    def __init__(self):
        self.place: tuple[list[int], list[int]] = [], []
        self.value: list[float] = []
        self.right: list[float] = []

    def add(self, entries: Entries, right: float) -> None:
        for column, value in entries:
            self.place[0].append(len(self.right))
            self.place[1].append(column)
            self.value.append(value)
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

    def duals(self) -> np.ndarray | None:
        """What a unit more of each bound would save; None where no values satisfy them."""
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
        return np.maximum(0.0, -solved.ineqlin.marginals) if solved.status == 0 else None
