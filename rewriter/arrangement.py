"""How a rewritten graph runs: its regions, what of it is recorded as CUDA graphs, and how within memory.

The three are one question. A recording holds a step's activations a second time, so that under a budget it
takes what the memory plan leaves. A plan that does not keep everything leaves no recording, and is made of
the graph as it was before its labels were separated for one.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.fx import GraphModule

from rewriter.lower import records_cuda_graphs
from rewriter.memory.budgets import device_of
from rewriter.memory.in_host import over_the_bus
from rewriter.memory.lengths import tokens_at_hand
from rewriter.memory.plan import Infeasible
from rewriter.memory.room import fits_twice, fits_unplanned, told_unplanned
from rewriter.options import Options
from rewriter.progress import ProgressLine
from rewriter.regions.describe import describe
from rewriter.regions.outline import Unsplittable, outline
from rewriter.regions.program import Program
from rewriter.replay.plan import Plan, plan_recordings
from rewriter.report import GraphRecord

if TYPE_CHECKING:
    from rewriter.memory.planned import PlannedProgram

log = logging.getLogger(__name__)


class Arrangement(NamedTuple):
    """How a graph runs.

    Attributes:
        recorded: what is compiled, and which steps of it are recorded.
        program: its regions; None where it is compiled as one.
        plan: how they run within memory; None where everything is kept as it is compiled.
    """

    recorded: Plan
    program: Program | None
    plan: "PlannedProgram | None" = None


def arranged(
    body: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
    line: ProgressLine,
) -> Arrangement:
    """Decide for ``body``, which is left as it was; the reasons are put on ``record``.

    Raises:
        Infeasible: the budget is too small for any plan.
    """
    recorded = plan_replay(body, example_inputs, options, record)
    line.now("outlining")
    with record.timed("outlining"):
        program = outline_regions(recorded.module, recorded.example_inputs, options, record)
    line.now("planning")
    with record.timed("planning"):
        found = _within_memory(Arrangement(recorded, program), body, example_inputs, options, record)
        if found.plan is None:
            record.notes += over_the_bus(body, device_of(example_inputs))
    return found


def _within_memory(
    found: Arrangement,
    body: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
) -> Arrangement:
    """``found`` where memory suffices for it; else with a plan, beside its recordings or in their place."""
    recorded, program, _ = found
    if program is None:
        if options.memory_budget not in (None, "off"):
            reason = "no layer of this graph repeats" if options.regions else "regions are turned off"
            record.notes.append(f"memory_budget: nothing to plan with, {reason}")
            told_unplanned(body, example_inputs, options.memory_budget, options.host_budget, reason)
        return found
    if not is_short_of_memory(program, recorded.example_inputs, options, record):
        return found
    if (plan := plan_beside_recordings(program, recorded, options, record)) is not None:
        recorded = recorded.within(plan.plan.left, plan.plan.beside, record.notes)
        return Arrangement(recorded, program, plan)
    if recorded.module is not body:
        record.notes.append("CUDA graphs: none after all, since memory is planned")
        recorded = Plan(body, example_inputs)
        program = outline_regions(body, example_inputs, options, record)
    plan = None if program is None else plan_memory(program, example_inputs, options, record)
    return Arrangement(recorded, program, plan)


def plan_replay(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Plan:
    """What of the program is recorded as CUDA graphs, and why not, on record."""
    budget = options.memory_budget
    asked = budget not in (None, "off")
    roomy = not asked or fits_twice(module, example_inputs, budget, options.host_budget)
    if not options.cuda_graphs or not roomy or records_cuda_graphs(options):
        return Plan(module, example_inputs)
    return plan_recordings(module, example_inputs, record.notes)


def outline_regions(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Program | None:
    """The program of the regions; None where the graph stays one, and why on record if it is refused."""
    if not options.regions:
        return None
    if records_cuda_graphs(options):
        record.notes.append(
            "compiled as one region: CUDA graphs would be recorded anew for each layer's weights"
        )
        return None
    try:
        program = outline(module, example_inputs)
    except Unsplittable as reason:
        record.notes.append(f"compiled as one region: {reason}")
        return None
    except Exception as error:
        log.warning("outlining failed, the graph is compiled as one: %s", error, exc_info=True)
        record.notes.append(f"compiled as one region: outlining failed: {type(error).__name__}: {error}")
        return None
    record.program = None if program is None else describe(program)
    return program


def is_short_of_memory(
    program: Program, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> bool:
    """Whether to plan: where a budget is given, or where keeping everything would not fit what is free."""
    if options.memory_budget == "off":
        return False
    if options.memory_budget is not None:
        return True
    try:
        return not fits_unplanned(
            program, example_inputs, options.host_budget, options.max_tokens, record.notes
        )
    except Exception as error:
        log.warning("foreseeing memory failed, nothing is planned: %s", error, exc_info=True)
        record.notes.append(f"memory: nothing is planned, foreseeing it failed: {error}")
        return False


def plan_beside_recordings(
    program: Program, recorded: Plan, options: Options, record: GraphRecord
) -> "PlannedProgram | None":
    """The plan of a program that may be recorded, within a budget; None unless it keeps everything."""
    if options.memory_budget is None or recorded.limits is None:
        return None
    is_short = tokens_at_hand(program) <= recorded.limits.tokens
    plan = plan_memory(program, recorded.example_inputs, options, record, recorded=is_short)
    return None if plan is None or plan.staged else plan


def plan_memory(
    program: Program,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
    *,
    recorded: bool = False,
) -> "PlannedProgram | None":
    """How the program runs within ``options.memory_budget`` or what is free; None where that fails.

    Args:
        recorded: whether steps of the batch at hand are recorded, where everything is kept.

    Raises:
        Infeasible: the budget is too small for any plan.
    """
    budget = options.memory_budget
    assert budget != "off", "nothing is planned then"
    # Scheduling imports more of PyTorch than a run without a budget needs.
    from rewriter.memory.under_budget import under_budget

    try:
        return under_budget(
            program, example_inputs, budget, options.host_budget, options.max_tokens, recorded
        )
    except Infeasible:
        if budget is not None:
            raise
        record.notes.append("memory: everything is kept, there is no plan within the host's memory")
        return None
    except Exception as error:
        log.warning("planning memory failed, everything is kept: %s", error, exc_info=True)
        record.notes.append(f"memory: everything is kept, planning failed: {error}")
        return None
