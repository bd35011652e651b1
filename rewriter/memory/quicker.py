"""A plan whose layers make weights once, not once a tile, and have heads at once, where it leaves the room.

    plan of ways that do in parts what they may do at once  ->  the same, quicker in what memory is free

Activations come first, as with weights that stay: what a layer does at once (``at_once.py``) takes memory
while one of its stages runs, and concerns no other layer. So it is decided for each layer by itself, after
the search, which has as much to choose from as without: no plan is slower for it, and none takes more than it
may. A plan that would only be the fastest for what it does at once is not found.
"""

from collections.abc import Sequence
from dataclasses import replace

from rewriter.memory.plan import Choice, MemoryPlan, Part


def with_quicker(plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with the quickest form of each choice that fits; one that fills the budget grows no more.

    In tiles of another length, too: what a layer holds and sends is the same. A part that waits for a
    neighbour's copies either way leaves its room to copies that begin early.
    """
    limit = max(plan.limit, plan.peak)
    own = plan.moments[: len(plan.choices)]
    parts = zip(plan.problem.parts, plan.choices, own, (None, *plan.choices), strict=False)
    chosen = (
        _quickest(choice, _forms(part, choice), limit - (moment.device - moment.own), before)
        for part, choice, moment, before in parts
    )
    return replace(plan, choices=tuple(chosen))


def alike(part: Part, choice: Choice) -> list[Choice]:
    """``choice``, then all of ``part`` that no other part can tell from it; each may have quicker forms."""
    return [choice, *(other for other in part.choices if _held(other) == _held(choice))]


def _forms(part: Part, choice: Choice) -> list[Choice]:
    """Those that do something at once."""
    return [form for other in alike(part, choice) for form in other.quicker]


def _held(choice: Choice) -> tuple[float, ...]:
    copies = choice.offload_seconds, choice.reload_seconds
    return choice.saved, choice.hosted, choice.flight, *copies


def _quickest(choice: Choice, forms: Sequence[Choice], room: int, before: Choice | None) -> Choice:
    """Of equal ones the first; ``before``: whose copies pass beside it."""
    out, back = (before.offload_seconds, before.reload_seconds) if before is not None else (0.0, 0.0)

    def seconds(form: Choice) -> float:
        return max(form.forward_seconds, out) + max(form.backward_seconds, back)

    return min((choice, *(form for form in forms if form.peak <= room)), key=seconds)
