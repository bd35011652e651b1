"""A program, its budgets and the machine to a plan: what the backend calls, once a graph."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rewriter.memory import timeline
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import Budgets, budgets, device_of
from rewriter.memory.choices import Link
from rewriter.memory.lengths import (
    growth_of,
    hold_to,
    length_at_hand,
    length_of,
    reach_of,
    tokens_at_hand,
    tokens_of,
)
from rewriter.memory.longer import Longer
from rewriter.memory.machine import ASSUMED, machine_for
from rewriter.memory.movable import in_cards, movable_bytes
from rewriter.memory.plan import Infeasible, MemoryPlan
from rewriter.memory.planned import PlannedProgram, everything_kept, planned
from rewriter.memory.resident_program import with_residents
from rewriter.memory.room import Need, cannot_keep_all
from rewriter.memory.stage_graphs import LONG
from rewriter.memory.unwrapped import without_checkpoints
from rewriter.regions.outline import outline
from rewriter.regions.program import Program
from rewriter.report import MemoryRecord

# Of batches that vary, how many times as long as the ones at hand have to fit beside weights that stay.
_REACH = 4.0


def under_budget(
    program: Program,
    example_inputs: Sequence[Any],
    memory_budget: int | float | None,
    host_budget: int | float | None,
    max_tokens: int | None = None,
    recorded: bool = False,
) -> PlannedProgram:
    """Plan ``program``, checkpoints unwrapped, for batches of at most ``max_tokens`` where lengths vary.

    Where not everything fits, layers begin with their own norms, so that one tensor passes each border.
    Without a ``memory_budget`` what the device has free is taken; where that is too small by the planner's
    numbers, the least that would do, with a warning.

    Args:
        recorded: whether steps as long as the one at hand are recorded where everything is kept.

    Raises:
        Infeasible: the budget is too small for any plan; ``least_device`` is what to ask for.
    """
    device = device_of(example_inputs)
    machine, given = machine_for(device), budgets(program, memory_budget, host_budget, device)
    growth = growth_of(program, max_tokens)
    given = replace(given, growth=growth, reach=reach_of(program, growth.tokens, LONG))
    whole, notes = program, []
    if machine.name.endswith(ASSUMED):
        notes.append(f"memory: too little was free to measure this device; planned for {machine.name}")
    if (unwrapped := without_checkpoints(program)) is not None:
        program = outline(unwrapped, example_inputs) or program
        notes.append("gradient checkpointing: what is computed again is as the memory plan says")
    # Without a budget, that it does not fit as it is was seen before.
    asked = memory_budget is not None or program is not whole
    beside = functools.partial(
        _with_residents, max_tokens=max_tokens, recorded=recorded, machine=machine, device=device
    )
    asked = asked and not cannot_keep_all(program, example_inputs, given)
    if asked and (found := everything_kept(program, given, machine, device)):
        if memory_budget is not None:
            found = beside(found, program, given)
        hold_to(whole, Need.of(found.plan).growth(program, given.growth.tokens))
        return replace(found, notes=(*notes, *found.notes))
    if (parted := parted_at_borders(program)) is not None:
        program = outline(parted, example_inputs) or program

    def within(choose: Callable[[Budgets], PlannedProgram], given: Budgets) -> PlannedProgram:
        return _planned_within(choose, given, memory_budget is not None, whole, device)

    found = within(lambda given: planned(program, given, machine, device), given)
    longer = None
    if (count := tokens_of(program)) is not None and (choosing := found.choosing) is not None:

        def now(inputs: Sequence[Any]) -> Budgets:
            # Host memory is one arena's, for all plans.
            return replace(budgets(program, memory_budget, host_budget, device, inputs), host=given.host)

        def chosen(given: Budgets) -> PlannedProgram:
            return replace(choosing, given=given).chosen()

        at_worst = functools.partial(within, chosen)
        longer = Longer(
            count,
            length_of(program),
            tokens_at_hand(program),
            length_at_hand(program),
            given.growth.tokens,
            given.reach,
            now,
            chosen,
            at_worst,
        )
    most = given.growth.tokens if longer is None else given.reach
    if found.choosing is None:  # everything is kept
        if memory_budget is not None:
            found = beside(found, program, given)
        most = Need.of(found.plan).growth(program, given.growth.tokens)
    hold_to(whole, most)
    return replace(found, notes=(*notes, *found.notes), longer=longer)


def _with_residents(
    found: PlannedProgram,
    program: Program,
    given: Budgets,
    *,
    max_tokens: int | None,
    recorded: bool,
    machine: Link,
    device: torch.device,
) -> PlannedProgram:
    """``found``, which keeps everything, with dequantised weights in the room that nothing else will need.

    A recording needs as much again as a step. Where lengths vary, and nobody said how far, batches four times
    as long need theirs, if those fit at all.
    """
    reach = given.growth.tokens
    if tokens_of(program) is not None and max_tokens is None:
        reach = min(_REACH * reach, Need.of(found.plan).growth(program, given.growth.tokens))

    def fits(plan: MemoryPlan) -> bool:
        needed = (2 if recorded else 1) * plan.beside
        return (
            plan.problem.static + needed <= plan.problem.roomy
            and Need.of(plan).growth(program, given.growth.tokens) >= reach
        )

    return with_residents(found, machine, device, fits)


def _planned_within(
    choose: Callable[[Budgets], PlannedProgram],
    given: Budgets,
    asked: bool,
    whole: Program,
    device: torch.device,
) -> PlannedProgram:
    """What is chosen within ``given``; unless they are ``asked`` for, within the least that would do.

    Raises:
        Infeasible: with the card that would do, and what could leave the device.
    """
    try:
        return choose(given)
    except Infeasible as error:
        if (least := error.least_device) is None:
            raise
        said = in_cards(error, movable_bytes(whole), device)
        if asked:
            raise said from None
    warnings.warn(f"rewriter: this step may run out of memory. {said}", stacklevel=2)
    found = choose(replace(given, device=least))
    return replace(found, notes=(f"memory: this step may run out of it. {said}", *found.notes))


def memory_record(plan: MemoryPlan) -> MemoryRecord:
    """The plan as plain numbers and text."""
    problem = plan.problem
    return MemoryRecord(
        plan.peak,
        plan.where,
        problem.static,
        problem.device_budget,
        plan.hosted,
        problem.host_budget,
        plan.foreseen_seconds,
        tuple((kind, choice, count) for (kind, choice), count in plan.counts.items()),
        tuple(plan.timeline()),
        timeline.text(plan),
        timeline.svg(plan),
        plan.slack,
    )
