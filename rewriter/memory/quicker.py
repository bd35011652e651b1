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
    """``plan`` with the quickest form of each choice that fits; one that fills the budget grows no more."""
    limit = max(plan.limit, plan.peak)
    own = plan.moments[: len(plan.choices)]
    chosen = (
        _quickest(choice, limit - (moment.device - moment.own))
        for choice, moment in zip(plan.choices, own, strict=True)
    )
    return replace(plan, choices=tuple(chosen))


def _quickest(choice: Choice, room: int) -> Choice:
    fitting = [form for form in choice.quicker if form.peak <= room]
    return min((choice, *fitting), key=lambda form: form.forward_seconds + form.backward_seconds)
