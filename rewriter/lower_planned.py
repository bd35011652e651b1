"""A planned program to a callable: each stage compiled once, for all ways in which layers run, and all plans.

Where lengths vary, a batch that is longer than its plan holds for is planned for when it comes, and what the
new plan runs and is not compiled yet is compiled then: stages, which have fake tensors of their own. Regions
that run as without a budget do not: guards on sizes that their compilation finds are Dynamo's, which has its
own for this program by then. Plans made later run those that are compiled, and stages.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch._guards import CompileContext, compile_context
from torch.fx import GraphModule

from rewriter import lower
from rewriter.options import Options
from rewriter.progress import progress_line
from rewriter.regions.program import Region, link
from rewriter.regions.signature import compilation_key

if TYPE_CHECKING:
    from rewriter.memory.choices import StagesOnce
    from rewriter.memory.layer import LayerStages
    from rewriter.memory.planned import PlannedProgram

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def lower_planned(
    planned: "PlannedProgram", options: Options, say: Say, tell: "Callable[[PlannedProgram], None]"
) -> Callable:
    """Compile what a planned program calls.

    Args:
        say: told what is being compiled, and how many there are.
        tell: told the plan, another one where stages could not be compiled; and each made later.
    """
    lowering = PlanLowering(options)
    run, planned = lowering.first(planned, say)
    tell(planned)
    if planned.longer is None:
        return run
    from rewriter.memory.longer import PlannedByLength

    return PlannedByLength(planned.longer, run, lowering.again, tell)


class _Uncompiled(Exception):
    """``stages`` cannot be compiled, for ``error``."""

    def __init__(self, stages: "StagesOnce", error: Exception):
        self.stages, self.error = stages, error


class PlanLowering:
    """Compiles what plans of one program call, each stage and region once."""

    def __init__(self, options: Options):
        self._options = options
        self._stages: dict[StagesOnce, LayerStages] = {}
        self._graphs: dict[str, Callable] = {}
        self._regions: dict[GraphModule, Callable] = {}
        self._context = CompileContext.try_get()

    def first(self, planned: "PlannedProgram", say: Say) -> "tuple[Callable, PlannedProgram]":
        """The code, and the plan that it follows."""
        return self._with_stages(planned, say, self._with_regions)

    def _with_regions(self, planned: "PlannedProgram", say: Say) -> Callable:
        number, count = len(planned.layers), planned.compilations
        for region in planned.whole:
            if region.module not in self._regions:
                number += 1
                say(f"compiling {region.name}, {number} of {count}")
                self._regions[region.module] = lower.lower_beside(region.module, region.inputs, self._options)
        if planned.choosing is not None:
            planned.choosing.ways.compiled = frozenset(self._regions)
        return self._linked(planned)

    def again(self, planned: "PlannedProgram") -> "tuple[Callable, PlannedProgram]":
        """The same of a plan made later."""
        with progress_line() as line, self._in_context():
            return self._with_stages(planned, line.now, lambda planned, _: self._linked(planned))

    def _linked(self, planned: "PlannedProgram") -> Callable:
        compiled: dict[Region, Callable] = {
            region: lower.short_call(planned.program, region, self._regions[region.module])
            for region in planned.whole
        }
        for region, staged in planned.staged.items():
            compiled[region] = staged.scheduled(self._stages[staged.stages], planned.transfers)
        if planned.head is not None:
            compiled[planned.head.region] = planned.head.copier
        return planned.announced(link(planned.program, compiled))

    def _with_stages(
        self, planned: "PlannedProgram", say: Say, rest: "Callable[[PlannedProgram, Say], Callable]"
    ) -> "tuple[Callable, PlannedProgram]":
        """Compile the stages of a plan, and ``rest``; another one's where some cannot be compiled.

        Host memory is locked meanwhile: that of a plan that is not run would stay locked for good.
        """
        while True:
            try:
                with planned.host_memory():
                    self._compile_stages(planned, say)
                    return rest(planned, say), planned
            except _Uncompiled as failed:
                planned = planned.without(failed.stages, failed.error)

    def _compile_stages(self, planned: "PlannedProgram", say: Say) -> None:
        """Compile what the plan runs and is not compiled yet; raises _Uncompiled for the first that fails."""

        def compile_graph(module: GraphModule, inputs: Sequence[Any], fake_mode: Any) -> Callable:
            # The first layer has stages of the others, and every form of a layer the same attention.
            key = compilation_key(module, inputs)
            if key not in self._graphs:
                self._graphs[key] = lower.lower_stage(module, inputs, fake_mode, self._options)
            return self._graphs[key]

        for number, (stages, name) in enumerate(planned.layers.items(), 1):
            if stages in self._stages:
                continue
            say(f"compiling the stages of {name}, {number} of {planned.compilations}")
            try:
                self._stages[stages] = stages.compiled(compile_graph)
            except Exception as error:
                log.warning("the stages of %s cannot be compiled: %s", name, error, exc_info=True)
                raise _Uncompiled(stages, error) from error

    def _in_context(self) -> AbstractContextManager:
        """What is compiled while a step runs belongs to the compilation of its graph."""
        return nullcontext() if self._context is None else compile_context(self._context)
