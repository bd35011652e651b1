"""A program, its budgets and the machine to a plan: what the backend calls, once a graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import budgets
from rewriter.memory.machine import machine_for
from rewriter.memory.plan import MemoryPlan
from rewriter.memory.planned import PlannedProgram, planned
from rewriter.regions.outline import outline
from rewriter.regions.program import Program
from rewriter.report import MemoryRecord


def under_budget(
    program: Program,
    example_inputs: Sequence[Any],
    memory_budget: int | float,
    host_budget: int | float | None,
) -> PlannedProgram:
    """Plan ``program``; its layers begin with their own norms, so that one tensor passes each border.

    Raises:
        Infeasible: the budget is too small for any plan.
    """
    device = next((x.device for x in example_inputs if isinstance(x, Tensor)), torch.device("cpu"))
    parted = parted_at_borders(program)
    if parted is not None:
        program = outline(parted, example_inputs) or program
    given = budgets(program, memory_budget, host_budget, device)
    return planned(program, given, machine_for(device), device)


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
    )
