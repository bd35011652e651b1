"""A program, its budgets and the machine to a plan: what the backend calls, once a graph."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rewriter.memory import timeline
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import Budgets, budgets, device_of
from rewriter.memory.expandable import in_fixed_segments
from rewriter.memory.lengths import (
    growth_of,
    has_pairs,
    hold_to,
    length_at_hand,
    length_of,
    lengthened,
    reach_of,
    tokens_at_hand,
    tokens_of,
)
from rewriter.memory.long_attention import LONG
from rewriter.memory.longer import Longer
from rewriter.memory.machine import ASSUMED, machine_for
from rewriter.memory.movable import in_cards, movable_bytes, moved
from rewriter.memory.plan import Infeasible, MemoryPlan
from rewriter.memory.planned import Choosing, PlannedProgram, everything_kept, planned
from rewriter.memory.resident_program import with_residents
from rewriter.memory.room import Need, cannot_keep_all
from rewriter.memory.unwrapped import UNWRAPPED, without_checkpoints
from rewriter.memory.walk import Link
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
    given = budgets(program, memory_budget, host_budget, device)
    growth = growth_of(program, max_tokens)
    given = replace(given, growth=growth, reach=reach_of(program, growth.tokens, LONG))
    machine, notes = machine_for(device), []
    asked = _Asked(
        program, given, memory_budget, host_budget, max_tokens is not None, recorded, machine, device
    )
    if machine.name.endswith(ASSUMED):
        notes.append(f"memory: too little was free to measure this device; planned for {machine.name}")
    if (unwrapped := without_checkpoints(program)) is not None:
        program = outline(unwrapped, example_inputs) or program
        notes.append(UNWRAPPED)
    found = asked.kept(program, example_inputs)
    if found is None:
        if (parted := parted_at_borders(program)) is not None:
            program = outline(parted, example_inputs) or program
        found = asked.chosen(program)
    notes += in_fixed_segments(found.plan, device)
    return replace(found, notes=(*notes, *found.notes))


@dataclass(frozen=True)
class _Asked:
    """What is asked for, and with what.

    Attributes:
        whole: the program as it came, to which the compilation is held.
        given: what there is to plan with, for the batch that the plan holds for.
        memory_budget, host_budget: the options.
        bounded: whether the longest batch was said.
        recorded: whether steps as long as the one at hand are recorded where everything is kept.
    """

    whole: Program
    given: Budgets
    memory_budget: int | float | None
    host_budget: int | float | None
    bounded: bool
    recorded: bool
    machine: Link
    device: torch.device

    def kept(self, program: Program, example_inputs: Sequence[Any]) -> PlannedProgram | None:
        """``program`` with everything kept; None where that does not fit."""
        # Without a budget, that the whole does not fit as it is was seen before.
        if self.memory_budget is None and program is self.whole:
            return None
        if cannot_keep_all(program, example_inputs, self.given):
            return None
        found = everything_kept(program, self.given, self.machine, self.device)
        return None if found is None else self._held(found, program)

    def chosen(self, program: Program) -> PlannedProgram:
        """``program``, whose layers begin with their own norms, as the planner has it.

        Raises:
            Infeasible: as ``under_budget``.
        """
        found = self._within(lambda given: planned(program, given, self.machine, self.device), self.given)
        if found.choosing is None:
            return self._held(found, program)
        longer = self._longer(program, found.choosing)
        hold_to(self.whole, self.given.growth.tokens if longer is None else self.given.reach)
        return replace(found, longer=longer)

    def _held(self, found: PlannedProgram, program: Program) -> PlannedProgram:
        """``found``, which keeps everything, for batches that fit so; longer ones are compiled anew."""
        if self.memory_budget is not None:
            found = self._with_residents(found, program)
        hold_to(self.whole, Need.of(found.plan).growth(program, self.given.growth.tokens))
        return found

    def _with_residents(self, found: PlannedProgram, program: Program) -> PlannedProgram:
        """``found``, which keeps everything, with dequantised weights in room that nothing else will need.

        A recording needs as much again as a step. Where lengths vary, and nobody said how far, batches four
        times as long need theirs, if those fit at all.
        """
        here = reach = self.given.growth.tokens
        if tokens_of(program) is not None and not self.bounded:
            reach = min(_REACH * reach, Need.of(found.plan).growth(program, here))

        def fits(plan: MemoryPlan) -> bool:
            needed = (2 if self.recorded else 1) * plan.beside
            return (
                plan.problem.static + needed <= plan.problem.roomy
                and Need.of(plan).growth(program, here) >= reach
            )

        return with_residents(found, self.machine, self.device, fits)

    def _longer(self, program: Program, choosing: Choosing) -> Longer | None:
        """How longer batches are planned for; None where lengths do not vary."""
        if (count := tokens_of(program)) is None:
            return None

        def now(inputs: Sequence[Any]) -> Budgets:
            found = budgets(program, self.memory_budget, self.host_budget, self.device, inputs)
            # Host memory is one arena's, for all plans.
            return replace(found, host=self.given.host)

        def chosen(given: Budgets) -> PlannedProgram:
            return replace(choosing, given=given).chosen()

        return Longer(
            count,
            length_of(program),
            tokens_at_hand(program),
            length_at_hand(program),
            self.given.growth.tokens,
            self.given.reach,
            now,
            chosen,
            functools.partial(self._within, chosen),
            lengthened(program),
            has_pairs(program),
        )

    def _within(self, choose: Callable[[Budgets], PlannedProgram], given: Budgets) -> PlannedProgram:
        """What is chosen within ``given``; where no budget was asked for, within the least that would do.

        Raises:
            Infeasible: with the card that would do, and what could leave the device.
        """
        try:
            return choose(given)
        except Infeasible as error:
            if (least := error.least_device) is None:
                raise
            said = in_cards(error, movable_bytes(self.whole), moved(self.whole, self.device), self.device)
            if self.memory_budget is not None:
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
