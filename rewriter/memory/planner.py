"""From a ``Problem`` to the fastest ``MemoryPlan`` within its budgets, quick enough to be asked often.

A choice that another of the same kind beats or equals in every number is left out first. What is left is
searched by ``search.py``, exactly up to a bound on its work. ``MemoryPlan.slack`` is what that bound may have
cost: 0 where it was not reached, and under 0.1% of a step in the hardest cases seen, 80 parts with 24 choices
under two budgets that both bind.

Seconds are counted in whole units of about 1e-10 of the slowest step, so that plans that take equally long
are known to: of those, the one with the fewest host bytes is taken, then the one with the lowest peak. A
larger budget allows every plan of a smaller one: it is no slower where the slack is 0, else by at most that.
"""

from collections.abc import Callable, Sequence
from math import ceil, log2

import numpy as np

from rewriter.memory.bounds import Options, Overlap
from rewriter.memory.plan import Choice, Infeasible, MemoryPlan, Moment, Part, Problem
from rewriter.memory.search import fastest, smallest

_UNITS = 1e10


def plan(problem: Problem) -> MemoryPlan:
    """The choices that take the least time, with every moment and all offloads within their budgets.

    Raises:
        Infeasible: where nothing fits; names the least device budget that would do, what of it is the largest
            part, and the host memory that it takes.
    """
    options, unit = _options(problem.parts)
    device = problem.device_budget - problem.static - problem.window
    found = fastest(options, device, problem.host_budget) if device >= 0 else None
    if found is None:
        raise _infeasible(problem)
    return _as_plan(problem, found.choices, (found.time - found.bound) * unit)


def best(problems: Sequence[Problem]) -> MemoryPlan:
    """The fastest plan of ``problems``, which ask for the same in other ways; of equal ones the first.

    Raises:
        Infeasible: where nothing fits the first.
    """
    found = plan(problems[0])
    for problem in problems[1:]:
        try:
            other = plan(problem)
        except Infeasible:
            continue
        found = other if other.seconds < found.seconds else found
    return found


def least(problem: Problem) -> MemoryPlan:
    """The plan with the lowest peak within the host budget, whatever the device budget and the time.

    Raises:
        Infeasible: where the host budget is too small for any.
    """
    found = smallest(_options(problem.parts)[0], problem.host_budget)
    if found is None:
        needed = sum(min(choice.hosted for choice in part.choices) for part in problem.parts)
        raise Infeasible(
            f"rewriter: {_size(problem.host_budget)} of host memory cannot hold {problem.name}: "
            f"what has to go there takes at least {_size(needed)}. Raise host_budget.",
            None,
            needed,
        )
    return _as_plan(problem, found.choices)


def largest(
    problem_at: Callable[[int], Problem], at_most: int, *, at_least: int = 256, step: int = 256
) -> int:
    """The most tokens whose plan fits, a multiple of ``step`` (or ``at_least``), by bisection.

    ``problem_at(tokens)`` must not need less memory for more tokens. 0 where not even ``at_least`` fits.
    """
    if not fits(problem_at(at_least)):
        return 0
    low, high = at_least // step, at_most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(problem_at(middle * step)) else (low, middle - 1)
    return max(low * step, at_least)


def fits(problem: Problem) -> bool:
    """Whether any plan stays within both budgets."""
    try:
        return least(problem).peak <= problem.device_budget
    except Infeasible:
        return False


def _infeasible(problem: Problem) -> Infeasible:
    lowest = least(problem)
    worst = lowest.worst
    amount, largest_part = max(_pieces(problem, worst))
    return Infeasible(
        f"rewriter: {_size(problem.device_budget)} cannot hold {problem.name}: "
        f"at least {_size(lowest.peak)} are needed, of which {_size(amount)} are {largest_part}, "
        f"at the {worst.name}, with {_size(lowest.hosted)} of {_size(problem.host_budget)} of host memory. "
        "Raise memory_budget or host_budget, or train on fewer tokens at once.",
        lowest.peak,
        lowest.hosted,
    )


def _pieces(problem: Problem, worst: Moment) -> list[tuple[int, str]]:
    return [
        (worst.static, problem.static_name),
        (worst.earlier, "what earlier parts save"),
        (worst.flight, "copies under way"),
        (worst.own, f"the {worst.name} itself"),
    ]


def _as_plan(problem: Problem, choices: Sequence[int], slack: float = 0.0) -> MemoryPlan:
    chosen = tuple(part.choices[c] for part, c in zip(problem.parts, choices, strict=True))
    return MemoryPlan(problem, chosen, slack)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 / 10 else f"{count:,} bytes"


def _options(parts: Sequence[Part]) -> tuple[list[Options], float]:
    """One ``Options`` for each part, the same object for equal choices, and the seconds of a time unit."""
    slowest = sum(max(sum(_seconds(choice)) for choice in part.choices) for part in parts)
    # A power of two, so that seconds that are round stay so.
    unit = 2.0 ** ceil(log2(slowest / _UNITS)) if slowest else 1.0
    made: dict[tuple[Choice, ...], Options] = {}
    for part in parts:
        if part.choices not in made:
            made[part.choices] = _kind(part.choices, unit)
    return [made[part.choices] for part in parts], unit


def _seconds(choice: Choice) -> tuple[float, float, float, float]:
    return choice.forward_seconds, choice.backward_seconds, choice.offload_seconds, choice.reload_seconds


def _kind(choices: Sequence[Choice], unit: float) -> Options:
    memory = [(choice.saved, choice.hosted, choice.peak, choice.flight) for choice in choices]
    times = [tuple(round(seconds / unit) for seconds in _seconds(choice)) for choice in choices]
    rows = np.array([m + t for m, t in zip(memory, times, strict=True)], np.int64)
    no_worse = (rows[:, None] <= rows[None]).all(axis=2)
    equal = no_worse & no_worse.T
    # Of equal choices the first stays.
    beaten = (no_worse & ~equal) | np.triu(equal, 1)
    index = np.flatnonzero(beaten.sum(axis=0) == 0)
    saved, hosted, peak, flight, forward, backward, offload, reload = rows[index].T
    copies = list(zip(flight.tolist(), offload.tolist(), reload.tolist(), strict=True))
    overlaps = sorted(set(copies))
    group = np.array([overlaps.index(copy) for copy in copies])
    return Options(index, saved, hosted, peak, forward, backward, group, tuple(Overlap(*o) for o in overlaps))
