"""Device memory that a plan leaves free while a part runs: there more copies may be under way.

A plan sets one window aside for the whole step, and few of its moments fill the budget. With the window
alone, a layer whose MLP makes two GiB in some milliseconds waits for the bus, which then idles while the next
layer's attention runs; and a layer that sends nothing would leave the bus idle, though those below it wait
for what they sent.

What a part leaves free must be free as long as a copy stays: one on its way out until the next part that
bounds what is held, one on its way back while each part down to its own layer runs (``Transfers`` counts what
is there for each).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from rewriter.memory.plan import MemoryPlan

# Times the peak that is foreseen, what copies may fill: a step is to take what its plan says.
_NEARLY = 1.02


@dataclass(frozen=True)
class Spare:
    """Bytes of copies that may be under way for a part: its window, and what is free beside it.

    What a layer sends as a whole has its place while that layer runs, and is not counted then.

    Attributes:
        out: on their way out while its forward runs.
        left: of those, once it has run.
        back: on the device early while its backward runs, its own and those of parts below it.
        below: of those of parts below it, while it runs and what stands between them.
        above: of the next part that has one.
    """

    out: float = inf
    left: float = inf
    back: float = inf
    below: float = inf
    above: "Spare | None" = None

    def until(self, running: "Spare") -> float:
        """What of its part's copies may be back while those above it run, from ``running`` on."""
        least, spare = inf, self
        while spare is not running and (spare := spare.above) is not None:
            least = min(least, spare.below)
        return least


def spare_of(
    plan: MemoryPlan, bounds: Sequence[bool], window: int, taken: Mapping[int, int] | None = None
) -> list[Spare]:
    """Of the parts of ``plan`` that bound what is under way when they begin, in the order of the forward.

    Args:
        bounds: of each part, whether it does.
        window: of what is set aside, bytes for these copies.
        taken: of what is free in the forward of a part, bytes that have another use.
    """
    taken = taken or {}
    others = plan.problem.window - window
    # What is in flight has its place beside the window, for the part that comes next.
    most = min(plan.limit, int(_NEARLY * plan.peak))
    free = [most - m.device - (0 if m.backward else taken.get(m.part, 0)) for m in plan.moments]
    rooms = [max(f, 0) + m.flight - others for f, m in zip(free, plan.moments, strict=True)]
    ahead, behind = rooms[: len(bounds)], rooms[: len(bounds) - 1 : -1]
    last = max((i for i, bound in enumerate(bounds) if bound), default=-1)
    # The backward begins beside what is still on its way out.
    left = min((*ahead[last + 1 :], *behind[last + 1 :]), default=inf)
    above, found = None, []
    for i in reversed(range(last + 1)):
        if not bounds[i]:
            left = min(left, ahead[i])
            continue
        between = itertools.takewhile(lambda k: not bounds[k], reversed(range(i)))
        below = min((behind[i], *(behind[k] for k in between)))
        above, left = Spare(ahead[i], left, behind[i], below, above), inf
        found.append(above)
    return found[::-1]
