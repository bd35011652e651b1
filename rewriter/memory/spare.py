"""Device memory that a plan leaves free while a part runs: there more copies may be under way.

A plan sets one window aside for the whole step, and few of its moments fill the budget. With the window
alone, a layer whose MLP makes two GiB in some milliseconds waits for the bus, which then idles while the next
layer's attention runs.

What a part leaves free must be free as long as a copy stays: one on its way out until the next part that
bounds what is held, one on its way back while each part down to its own layer runs (``Transfers`` counts what
is there for each).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from rewriter.memory.plan import MemoryPlan


@dataclass(frozen=True)
class Spare:
    """Bytes beyond the window of copies: on their way ``out`` in a forward, ``back`` early in a backward."""

    out: int = 0
    back: int = 0


def spare_of(plan: MemoryPlan, bounds: Sequence[bool]) -> list[Spare]:
    """What each part of ``plan`` leaves free of its budget.

    Args:
        bounds: of each part, whether it bounds by its own number what is held when it begins.
    """
    problem = plan.problem
    budget = problem.roomy if plan.leaves_room else problem.device_budget
    rooms = [budget - moment.device for moment in plan.moments]
    count = len(bounds)
    ahead, behind = rooms[:count], rooms[: count - 1 : -1]
    found: list[Spare] = []
    # After the last part the backward begins, beside what is still on its way out.
    after: float = min(behind)
    above: float = inf
    parts = list(zip(ahead, behind, bounds, plan.choices, strict=True))
    for room, early, bound, choice in reversed(parts):
        out, back = min(room, after), min(early, above)
        found.append(Spare(max(int(out), 0), max(int(back), 0)) if bound else Spare())
        after = inf if bound else out
        # What is back early for a layer is there while those above it run that have nothing to come.
        above = inf if bound and choice.hosted else back
    return found[::-1]
