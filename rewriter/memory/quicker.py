"""A plan whose layers make their weights once, not once a tile, where it leaves the room.

    plan of ways that dequantise in every tile  ->  the same, of ways that are quicker in what memory is free

Activations come first, as with weights that stay: what a layer makes once is there while one of its stages
runs, and concerns no other layer. So it is decided for each layer by itself, after the search, which has as
much to choose from as without: no plan is slower for it, and none takes more than it may. What it cannot find
is a plan that would be the fastest for that alone.
"""

from dataclasses import replace

from rewriter.memory.plan import Choice, MemoryPlan


def with_quicker(plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with the quickest form of each choice that fits; one that fills the budget grows no more.

    A part that waits for a neighbour's copies either way leaves its room to copies that begin early.
    """
    limit = max(plan.limit, plan.peak)
    own = plan.moments[: len(plan.choices)]
    before = (None, *plan.choices)
    chosen = (
        _quickest(choice, limit - (moment.device - moment.own), neighbour)
        for choice, moment, neighbour in zip(plan.choices, own, before, strict=False)
    )
    return replace(plan, choices=tuple(chosen))


def _quickest(choice: Choice, room: int, before: Choice | None) -> Choice:
    """Of equal ones the one that takes least; ``before``: whose copies pass beside it."""
    out, back = (before.offload_seconds, before.reload_seconds) if before is not None else (0.0, 0.0)

    def seconds(form: Choice) -> float:
        return max(form.forward_seconds, out) + max(form.backward_seconds, back)

    return min((choice, *(form for form in choice.quicker if form.peak <= room)), key=seconds)
