"""The backend, as a straight line: graph, passes, lowering, callable.

``torch.compile(model, backend="rewriter")`` finds ``rewriter`` below through the entry point; Dynamo calls it
once a graph. What no pass matches goes to Inductor as it was.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch._guards import CompileContext
from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from rewriter.advice import advice
from rewriter.deferred import split_deferred
from rewriter.full_collections import defer_full_collections
from rewriter.fusion import apply_all
from rewriter.kernels_ahead import start_processes
from rewriter.lower import lower, lower_beside, lower_program, records_cuda_graphs
from rewriter.lower_planned import lower_planned
from rewriter.memory.budgets import device_of
from rewriter.memory.in_host import over_the_bus
from rewriter.memory.lengths import tokens_at_hand
from rewriter.memory.plan import Infeasible
from rewriter.memory.room import fits_twice, fits_unplanned
from rewriter.nested import count_operations
from rewriter.options import Options
from rewriter.passes import ordered_passes, pass_names
from rewriter.progress import ProgressLine, progress_line, seconds_since_beginning
from rewriter.regions.describe import describe
from rewriter.regions.outline import Unsplittable, outline
from rewriter.regions.program import Program
from rewriter.replay.plan import Plan, plan_recordings
from rewriter.report import GraphRecord, forget, record_graph
from rewriter.saved_hooks import without_saved_hooks
from rewriter.seconds_text import seconds_text
from rewriter.verify import Stage, verified
from rewriter.whole_under_ddp import keep_graphs_whole

if TYPE_CHECKING:
    from rewriter.memory.planned import PlannedProgram

log = logging.getLogger(__name__)


def rewriter(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable:
    """Compile one graph of Dynamo's.

    Args:
        module: the torch-level graph; left unchanged.
        example_inputs: fake tensors and sizes, one a placeholder.
        mode: as Inductor's callers pass it.
        options: see ``Options``.

    Raises:
        OptionError: for an unknown option, pass or mode, or a malformed value, before any work.
    """
    chosen = Options.parse(options, mode, pass_names())
    record = GraphRecord(
        _graph_name(), nodes_before=count_operations(module), graph_break=_graph_break(module)
    )
    if chosen.lowering != "eager":
        start_processes()
    record.notes += advice(module)
    record.seconds["tracing"] = seconds_since_beginning()
    with progress_line() as line, without_saved_hooks():
        line.finished(f"traced {record.nodes_before} operations in {seconds_text(record.seconds['tracing'])}")
        return _compile(module, example_inputs, chosen, record, line)


def _compile(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    record: GraphRecord,
    line: ProgressLine,
) -> Callable:
    _show("before", module)
    line.now("matching")
    with record.timed("rewriting"):
        stages = rewrite_graph(module, options, record)
    rewritten = stages[-1].module
    record.nodes_after = count_operations(rewritten)
    line.finished(f"{sum(done.count for done in record.passes)} rewrites")
    _show("after", rewritten)
    body, finish = split_deferred(rewritten)
    recorded = plan_replay(body, example_inputs, options, record)
    line.now("outlining")
    with record.timed("outlining"):
        program = outline_regions(recorded.module, recorded.example_inputs, options, record)
    line.now("planning")
    with record.timed("planning"):
        short = is_short_of_memory(program, recorded.example_inputs, options, record)
    with record.timed("planning"):
        plan = None
        if program and short and recorded.reading is not None:
            plan = plan_beside_recordings(program, recorded, options, record)
        if plan is not None:
            recorded = recorded.within(plan.plan.left, plan.plan.beside, record.notes)
    if short and plan is None and recorded.module is not body:
        record.notes.append("CUDA graphs: none after all, since memory is planned")
        recorded = Plan(body, example_inputs)
        program = outline_regions(body, example_inputs, options, record)
    with record.timed("planning"):
        if program and short and plan is None:
            plan = plan_memory(program, example_inputs, options, record)
        if plan is None:
            record.notes += over_the_bus(body, device_of(example_inputs))
    with record.timed("lowering"):
        if program is None:
            line.now("compiling")
            backward = partial(line.while_at, "compiling the backward")
            compiled = lower(recorded.module, recorded.example_inputs, options, backward)
        elif plan is not None:
            compiled = lower_planned(plan, options, line.now, lambda made: record_plan(made, record))
        else:
            compiled = lower_program(program, options, line)
        compiled = finish(recorded.replayed(compiled, record.notes))
        if options.verify and rewritten is not module:
            compiled = verified(compiled, lower_beside(module, example_inputs, options), stages, record)
    record_graph(record)
    return compiled


rewriter.reset = forget
# The backend is loaded by its name, before Dynamo traces the first graph for it.
defer_full_collections()
keep_graphs_whole()
start_processes()


def rewrite_graph(module: GraphModule, options: Options, record: GraphRecord) -> list[Stage]:
    """Run the passes that ``options`` asks for, in order, and write down what each did.

    Returns:
        ``module``, then what the passes made of it, if anything; with ``options.verify``, what each one did.
    """
    passes = [fusion for fusion in ordered_passes() if options.runs(fusion.name)]
    done = apply_all(passes, module, keep_stages=options.verify)
    record.passes += done.records
    return [Stage("", module), *(Stage(name, stage) for name, stage in done.stages)]


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
    program: Program | None, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> bool:
    """Whether to plan: where a budget is given, or where keeping everything would not fit what is free."""
    if options.memory_budget == "off":
        return False
    if program is None:
        if options.memory_budget is not None:
            record.notes.append("memory_budget: nothing to plan with, no layer of this graph repeats")
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


def record_plan(plan: "PlannedProgram", record: GraphRecord) -> None:
    """Write down what runs how; of a plan that is made later, in the place of the one before."""
    from rewriter.memory.longer import PLANNED_ANEW
    from rewriter.memory.steps import steps_of
    from rewriter.memory.under_budget import memory_record

    notes = [note for note in record.notes if not note.startswith(PLANNED_ANEW)]
    record.notes[:] = dict.fromkeys((*notes, *plan.notes))
    record.memory = memory_record(plan.plan)
    steps = {region: steps_of(staged.way) for region, staged in plan.staged.items()}
    record.program = describe(plan.program, steps)


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


def _graph_name() -> str:
    compile_id = CompileContext.current_compile_id()
    return str(compile_id) if compile_id is not None else "direct"


def _graph_break(module: GraphModule) -> str | None:
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    frames = getattr(reason, "user_stack", None) or []
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{str(reason.reason).strip().splitlines()[0]}{where}"


def _show(when: str, module: GraphModule) -> None:
    """The graph for ``TORCH_LOGS="+rewriter"``, and as an artifact for ``TORCH_TRACE``."""

    def text() -> str:
        return module.print_readable(print_output=False)

    if log.isEnabledFor(logging.DEBUG):
        log.debug("graph %s the passes:\n%s", when, text())
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": f"rewriter_{when}", "encoding": "string"}, payload_fn=text
    )
