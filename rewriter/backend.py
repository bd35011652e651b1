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
from rewriter.arrangement import arranged
from rewriter.deferred import split_deferred
from rewriter.full_collections import defer_full_collections
from rewriter.fusion import apply, apply_all
from rewriter.kernels_ahead import start_processes
from rewriter.lower import lower, lower_beside, lower_program
from rewriter.lower_planned import lower_planned
from rewriter.nested import count_operations
from rewriter.options import Options
from rewriter.passes import ordered_passes, pass_names
from rewriter.passes.dropout import dropout_pass
from rewriter.progress import ProgressLine, progress_line, seconds_since_beginning
from rewriter.regions.describe import describe
from rewriter.report import GraphRecord, MemoryRecord, forget, record_graph
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
    recorded, program, plan = arranged(body, example_inputs, options, record, line)
    with record.timed("lowering"):
        if program is None:
            line.now("compiling")
            backward = partial(line.while_at, "compiling the backward")
            compiled = lower(recorded.module, recorded.example_inputs, options, backward)
        elif plan is not None:
            compiled = lower_planned(
                plan, options, line.now, lambda made: line.lasting(f"rewriter: {record_plan(made, record)}")
            )
        else:
            compiled = lower_program(program, options, line)
        compiled = finish(recorded.replayed(compiled, record.notes))
        if options.verify and rewritten is not module:
            unrewritten = lower_beside(module, example_inputs, options)
            compiled = verified(compiled, unrewritten, with_equal_dropout(stages), record)
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


def with_equal_dropout(stages: Sequence[Stage]) -> Sequence[Stage]:
    """``stages`` with dropout by position in each, if any has it: others would draw other numbers."""
    if all(stage.pass_name != dropout_pass.name for stage in stages):
        return stages
    return [Stage(stage.pass_name, apply(dropout_pass, stage.module)[0]) for stage in stages]


def record_plan(plan: "PlannedProgram", record: GraphRecord) -> MemoryRecord:
    """Write down what runs how; of a plan that is made later, in the place of the one before."""
    from rewriter.memory.in_host import HEAD_COMES
    from rewriter.memory.longer import PLANNED_ANEW
    from rewriter.memory.steps import steps_of
    from rewriter.memory.under_budget import memory_record

    notes = [note for note in record.notes if not note.startswith((PLANNED_ANEW, HEAD_COMES))]
    record.notes[:] = dict.fromkeys((*notes, *plan.notes))
    record.memory = memory_record(plan.plan)
    steps = {region: steps_of(staged.way) for region, staged in plan.staged.items()}
    record.program = describe(plan.program, steps)
    return record.memory


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
