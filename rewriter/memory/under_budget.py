"""A program, its budgets and the machine to a plan: what the backend calls, once a graph."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewriter.memory import timeline
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import budgets, card_bytes
from rewriter.memory.lengths import growth_of
from rewriter.memory.machine import machine_for
from rewriter.memory.plan import Infeasible, MemoryPlan
from rewriter.memory.planned import PlannedProgram, everything_kept, planned
from rewriter.memory.unwrapped import without_checkpoints
from rewriter.regions.outline import outline
from rewriter.regions.program import Program
from rewriter.report import MemoryRecord


def under_budget(
    program: Program,
    example_inputs: Sequence[Any],
    memory_budget: int | float,
    host_budget: int | float | None,
    max_tokens: int | None = None,
) -> PlannedProgram:
    """Plan ``program``, checkpoints unwrapped, for batches of at most ``max_tokens`` where lengths vary.

    Where not everything fits, layers begin with their own norms, so that one tensor passes each border.

    Raises:
        Infeasible: the budget is too small for any plan; ``least_device`` is what to ask for.
    """
    device = next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
    machine, given = machine_for(device), budgets(program, memory_budget, host_budget, device)
    given = replace(given, growth=growth_of(program, max_tokens))
    notes = []
    if (unwrapped := without_checkpoints(program)) is not None:
        program = outline(unwrapped, example_inputs) or program
        notes.append("gradient checkpointing: what is computed again is as the memory plan says")
    if found := everything_kept(program, given, machine, device):
        return replace(found, notes=(*notes, *found.notes))
    if (parted := parted_at_borders(program)) is not None:
        program = outline(parted, example_inputs) or program
    try:
        found = planned(program, given, machine, device)
    except Infeasible as error:
        if error.least_device is None:
            raise
        card = card_bytes(error.least_device, device)
        message = (
            f"{error} With what driver and allocator take, memory_budget={card} is the least that would do."
        )
        raise Infeasible(message, card, error.least_host) from None
    return replace(found, notes=(*notes, *found.notes))


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
        plan.seconds,
        tuple((kind, choice, count) for (kind, choice), count in plan.counts.items()),
        tuple(plan.timeline()),
        timeline.text(plan),
        timeline.svg(plan),
    )
