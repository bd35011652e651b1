"""The prices of memory at which the bounds of a step are tightest: the duals of its linear relaxation.

A step is a path through (part, choice), each arc of which knows the overlap that it comes with. Letting a path
split into fractions makes the search a linear program: one flow, a bound for each moment, one for the host. Its
duals are the prices that no other prices beat (``bounds.py`` turns any prices into a bound, so that nothing
rests on the solver's tolerance).
"""

from collections.abc import Sequence

import numpy as np
from rewriter.memory.bounds import NOTHING, Floats, Options, Overlap, Prices, time_of


def best_prices(parts: Sequence[Options], device: int, host: int, *, by_peak: bool = False) -> Prices | None:
    """One row of prices; with ``by_peak`` for the lowest peak, whatever the time, and ``device`` is not read.

    None where not even fractions of plans stay within the budgets.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    scale = max(1, device, *(int(o.peak.max()) for o in parts))
    program = _Program()
    before: tuple[Overlap, ...] = (NOTHING,)
    arriving: list[list[int]] = [[]]
    saved = program.variable(0.0)
    program.equal([(saved, 1.0)], 0.0)
    peak = program.variable(1.0) if by_peak else None
    hosted = []
    for options in parts:
        time = np.zeros((len(before), len(options))) if by_peak else time_of(options, before)
        arcs = np.array([[program.variable(t) for t in row] for row in time])
        for g, inflow in enumerate(arriving):
            flow = [(arc, 1.0) for arc in arcs[g].tolist()]
            program.equal(flow + [(arc, -1.0) for arc in inflow], 0.0 if inflow else 1.0)
        bytes_ = (options.peak + np.array([[o.hosted] for o in before])) / scale
        moment = [(saved, 1.0), *zip(arcs.ravel().tolist(), bytes_.ravel().tolist(), strict=True)]
        if peak is None:
            program.at_most(moment, device / scale)
        else:
            program.at_most([*moment, (peak, -1.0)], 0.0)
        after = program.variable(0.0)
        each = zip(arcs.T.tolist(), (options.saved / scale).tolist(), strict=True)
        program.equal(
            [(after, 1.0), (saved, -1.0)] + [(arc, -s) for column, s in each for arc in column], 0.0
        )
        each = zip(arcs.T.tolist(), (options.hosted / scale).tolist(), strict=True)
        hosted += [(arc, h) for column, h in each for arc in column]
        arriving = [arcs[:, options.group == g].ravel().tolist() for g in range(len(options.overlaps))]
        before, saved = options.overlaps, after
    for overlap, inflow in zip(before, arriving, strict=True):
        for arc in inflow:
            program.costs[arc] += 0.0 if by_peak else overlap.offload + overlap.reload
    program.at_most(hosted, host / scale)
    costs = np.array(program.costs)
    unit = max(1.0, costs.max())
    solved = linprog(
        costs / unit,
        program.bounds.matrix(csr_array, len(costs)),
        program.bounds.right,
        program.equations.matrix(csr_array, len(costs)),
        program.equations.right,
        method="highs",
    )
    if solved.status != 0:
        return None
    duals = np.maximum(0.0, -solved.ineqlin.marginals) * (unit / scale)
    if by_peak:
        duals *= scale / unit
        duals /= duals[:-1].sum()
    return Prices(duals[None, :-1], duals[-1:])


class _Rows:
    def __init__(self):
        self.row, self.column, self.value, self.right = [], [], [], []

    def add(self, entries, right):
        for column, value in entries:
            self.row.append(len(self.right))
            self.column.append(column)
            self.value.append(value)
        self.right.append(right)

    def matrix(self, make, columns):
        return make((self.value, (self.row, self.column)), shape=(len(self.right), columns))


class _Program:
    def __init__(self):
        self.costs: list[float] = []
        self.bounds, self.equations = _Rows(), _Rows()

    def variable(self, cost: float) -> int:
        self.costs.append(float(cost))
        return len(self.costs) - 1

    def at_most(self, entries, right):
        self.bounds.add(entries, right)

    def equal(self, entries, right):
        self.equations.add(entries, right)
