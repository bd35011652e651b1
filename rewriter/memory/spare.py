"""Device memory that a plan leaves free while a part runs: there more copies may be under way.

A plan sets one window aside for the whole step, and few of its moments fill the budget. With the window
alone, a layer whose MLP makes two GiB in some milliseconds waits for the bus, which then idles while the next
layer's attention runs: on an H200, 8 layers of 8B at 32,768 tokens waited for a tenth of the step.

What one part leaves free must be free still where it can stay: a copy out until the next part that bounds
what is held, a copy back until its layer's backward asks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    rooms = [plan.problem.device_budget - moment.device for moment in plan.moments]
    count = len(bounds)
    ahead, behind = rooms[:count], rooms[: count - 1 : -1]
    back = list(accumulate(behind, min))
    found: list[Spare] = []
    # After the last part the backward begins, beside what is still on its way out.
    after: float = min(behind)
    for room, bound, early in zip(reversed(ahead), reversed(bounds), reversed(back), strict=True):
        out = int(min(room, after))
        found.append(Spare(max(out, 0), max(early, 0)) if bound else Spare())
        after = inf if bound else out
    return found[::-1]
