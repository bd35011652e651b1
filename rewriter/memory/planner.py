"""From a ``Problem`` to the fastest ``MemoryPlan`` within its budgets, quick enough to be asked often.

What it may choose from is thinned out and counted in whole numbers by ``options.py``, and searched by
``search.py``, exactly up to a bound on its work. ``MemoryPlan.slack`` is what that bound may have cost, 0
where it was not reached.

Seconds are counted in whole units of about 1e-10 of the slowest step, so that plans that take equally long
are known to: of those that it sees, the one with the fewest host bytes is taken, then the one with the lowest
peak. It sees all of them, unless there are thousands. A larger budget allows every plan of a smaller one: it
is no slower where the slack is 0, else by at most that. What is done at once in what a plan leaves
(``quicker.py``) comes after the search: neither counts that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf

from rewriter.memory.crowding import crowded, in_pieces
from rewriter.memory.options import options_of, unit_of
from rewriter.memory.plan import Infeasible, MemoryPlan, Moment, Problem
from rewriter.memory.quicker import with_quicker
from rewriter.memory.search import WORK, Found, Search
from rewriter.size_text import size_text

_size = partial(size_text, digits=1)


def plan(problem: Problem) -> MemoryPlan:
    """The choices that take the least time, with every moment and all offloads within their budgets.

    Raises:
        Infeasible: where nothing fits; names the least device budget that would do, what of it is the largest
            part, and the host memory that it takes.
    """
    return best([problem])


def best(problems: Sequence[Problem]) -> MemoryPlan:
    """The fastest plan of ``problems``, which ask for the same in other ways; of equal ones the first.

    Raises:
        Infeasible: where nothing fits; speaks of the first.
    """
    found, _ = _best(problems)
    if found is None:
        raise _infeasible(problems[0])
    return found


def roomy(problems: Sequence[Problem]) -> MemoryPlan:
    """The plan that is foreseen to be the fastest, with its waits for the allocator.

    What may be done at once is, where it leaves the room for that (``quicker.py``).

    Just above the least budget that leaves some, a plan that does is the slowest of all. A larger budget is
    never foreseen to be slower, but for what is done at once: what leaves room in a smaller one
    leaves it here, and what did not may.

    Raises:
        Infeasible: where nothing fits; speaks of the first.
    """
    found: list[MemoryPlan] = []
    bound_within: _Bound | None = None
    least_of_all = min(map(_computing, problems))
    for within, longer in _fillings(problems):
        below = min((plan.foreseen_seconds for plan in found), default=inf) / longer
        # Mostly the prices of memory say already that to fill more of the budget would not gain as much.
        if found and bound_within and below <= max(least_of_all, bound_within(within)):
            continue
        plan, bound = _best(within, below)
        bound_within = bound_within or bound
        if plan is not None:
            asked = problems[next(i for i, problem in enumerate(within) if problem is plan.problem)]
            found.append(replace(plan, problem=asked))
    if not found:
        raise _infeasible(problems[0])
    return min(map(with_quicker, found), key=lambda plan: plan.foreseen_seconds)


def _fillings(problems: Sequence[Problem]) -> Iterator[tuple[list[Problem], float]]:
    """``problems`` within what leaves the allocator less and less, and times as long as computed that is."""
    if any(p.host_budget for p in problems):
        yield [replace(p, device_budget=p.spacious) for p in problems], 1.0
    yield [replace(p, device_budget=p.roomy, host_budget=0) for p in problems], 1.0
    yield [replace(p, device_budget=p.roomy) for p in problems], in_pieces(1.0)
    yield list(problems), crowded(1.0)


# Seconds that no plan takes less than within other device bytes, of each problem.
_Bound = Callable[[Sequence[Problem]], float]


def _best(problems: Sequence[Problem], below: float = inf) -> tuple[MemoryPlan | None, _Bound]:
    """``best`` in less than ``below`` seconds, None where nothing fits, and a bound for other budgets."""
    unit = max(unit_of(problem.parts) for problem in problems)
    asked = [(_search(problem, unit), i) for i, problem in enumerate(problems) if _room(problem) >= 0]
    # The one that promises most: its plan tells how much of the others is worth a look.
    asked.sort(key=lambda pair: pair[0].bound)
    found, place = None, 0
    units = None if below == inf else int(below / unit)
    left = WORK
    for turn, (search, i) in enumerate(asked):
        problem = problems[i]
        # One that stands before the other is taken where it is as fast.
        choices = search.best(None if units is None else units + (i < place), left / (len(asked) - turn))
        left -= search.done
        if choices:
            found, units, place = _as_plan(problem, choices), choices.time, i
        elif units is None and search.bound < inf:
            # The search may miss what just fits. The plan with the lowest peak does not.
            lowest = least(problem)
            if lowest.peak <= problem.device_budget:
                found, units, place = lowest, round(lowest.seconds / unit), i
    if found is not None and units is not None:
        proven = min(search.bound for search, _ in asked)
        found = MemoryPlan(found.problem, found.choices, max(0.0, (units - proven) * unit))

    def bound_within(others: Sequence[Problem]) -> float:
        known = {i: search for search, i in asked}
        bounds = (known[i].bound_within(_room(p)) * unit if i in known else 0.0 for i, p in enumerate(others))
        return min(bounds)

    return found, bound_within


def least(problem: Problem) -> MemoryPlan:
    """The plan with the lowest peak within the host budget, whatever the device budget and the time.

    Raises:
        Infeasible: where the host budget is too small for any.
    """
    found = Search(options_of(problem.parts, inf), None, problem.host_budget).lowest()
    if found is None:
        needed = sum(min(choice.hosted for choice in part.choices) for part in problem.parts)
        raise Infeasible(
            f"rewriter: {_size(problem.host_budget)} of host memory cannot hold {problem.name}: "
            f"what has to go there takes at least {_size(needed)}. Raise host_budget.",
            None,
            needed,
        )
    return _as_plan(problem, found)


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
    given = _size(problem.device_budget)
    holds = f"{given} cannot hold" if problem.device_budget else "the budget leaves no device memory for"
    at_end = lowest.moments[len(problem.parts) - 1].device
    return Infeasible(
        f"rewriter: {holds} {problem.name}: "
        f"at least {_size(lowest.peak)} are needed, of which {_size(amount)} are {largest_part}, "
        f"at the {worst.name}, with {_size(lowest.hosted)} of {_size(problem.host_budget)} of host memory. "
        "Raise memory_budget or host_budget, or train on fewer tokens at once.",
        lowest.peak,
        lowest.hosted,
        at_end,
    )


def _pieces(problem: Problem, worst: Moment) -> list[tuple[int, str]]:
    return [
        (worst.static, problem.static_name),
        (worst.earlier, "what earlier parts save"),
        (worst.flight, "copies under way"),
        (worst.own, f"the {worst.name} itself"),
    ]


def _computing(problem: Problem) -> float:
    """Seconds that no plan takes less than: those of the fastest choices, whatever they need."""
    return sum(min(c.forward_seconds + c.backward_seconds for c in part.choices) for part in problem.parts)


def _room(problem: Problem) -> int:
    return problem.device_budget - problem.static - problem.window


def _search(problem: Problem, unit: float) -> Search:
    return Search(options_of(problem.parts, unit), _room(problem), problem.host_budget)


def _as_plan(problem: Problem, found: Found) -> MemoryPlan:
    chosen = tuple(part.choices[c] for part, c in zip(problem.parts, found.choices, strict=True))
    return MemoryPlan(problem, chosen)
