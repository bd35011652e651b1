"""A model that is compiled once, for its longest batch, and run under the plans for many budgets and lengths.

What depends on a budget is which stages run in which order, so that a measurement of many budgets need not
trace or compile for each. All regions are compiled as they run without a budget, too, which a plan may choose
for some layers. Two things are not as where a model is compiled for one budget and length: where everything
fits, layers begin with their own norms all the same; and attention's backward goes by groups of heads at
every length, if it does at the longest.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from math import inf
from unittest.mock import patch

import torch
from end_to_end import Step, random_tokens, step_on, timed
from models import Case, model_of
from torch import Tensor, nn

import rewriter
from rewriter import lower
from rewriter.lower_planned import _Lowering
from rewriter.memory import longer, planned
from rewriter.memory.budgets import Budgets
from rewriter.memory.choices import StagedChoice
from rewriter.memory.growth import Growth
from rewriter.memory.longer import PlannedByLength
from rewriter.memory.plan import MemoryPlan
from rewriter.memory.planned import Choosing
from rewriter.memory.planner import least
from rewriter.memory.ways import Aside

# What a dry run trains: all of it, so that layers are alike and have few operations.
TINY = Case(2, 1, (64, 64), weights="full")


class Replanned:
    """``model`` compiled; called in ``compiling`` first, then under the last plan that was asked for."""

    def __init__(self, model: nn.Module, lowering: str):
        options = {"memory_budget": 1.0, "lowering": lowering, "cuda_graphs": False}
        model.compile(backend="rewriter", options=options)
        self._made: list[tuple[_Lowering, Choosing, PlannedByLength]] = []

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the first call, of the longest batch that ever comes, as ``of_any_length``."""
        first = _Lowering.first
        seen = []

        def all_compiled(self, plan, say):
            for region in plan.choosing.program.regions:
                say(f"compiling {region.name}")
                self._regions[region.module] = lower.lower_beside(region.module, region.inputs, self._options)
            seen.append((self, plan.choosing))
            return first(self, plan, say)

        def kept(*given):
            code = PlannedByLength(*given)
            self._made.append((*seen[-1], code))
            return code

        with ExitStack() as patches:
            # There is something to choose from, too, where everything fits.
            for name in ("under_budget.everything_kept", "planned._everything_kept"):
                patches.enter_context(patch(f"rewriter.memory.{name}", lambda *_: None))
            patches.enter_context(patch.object(longer, "PlannedByLength", kept))
            patches.enter_context(patch.object(_Lowering, "first", all_compiled))
            yield
        ((self._lowering, self._choosing, self._code),) = self._made
        # Asked for each budget, and the same for all.
        ways = self._choosing.ways
        ways.all = functools.cache(ways.all)

    def range_of(self, tokens: int) -> tuple[int, int]:
        """Bytes that tensors take: of the smallest plan, and where everything is kept."""
        given = self._given(tokens)
        problem = planned._problem(
            self._choosing.program, self._choosing.ways.all(given.growth)[Aside()], given, Aside()
        )
        everything = MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts))
        return least(problem).peak, everything.peak

    def plan(self, tokens: int, usable: int, resident: bool = False) -> MemoryPlan:
        """Run from now on under the plan for so many tokens, within the bytes that tensors may take.

        Args:
            resident: keep on the device what the plan would offload.
        """
        given = replace(self._given(tokens), device=usable)
        with kept_instead() if resident else nullcontext():
            found = replace(self._choosing, given=given).chosen()
        run, followed = self._lowering.again(found)
        self._code._plans[:] = [(inf, run)]
        return followed.plan

    def _given(self, tokens: int) -> Budgets:
        how = self._code._longer
        return replace(how.budgets(()), growth=Growth(tokens / how.here, tokens / how.here))


def of_any_length(ids: Tensor) -> Tensor:
    """``ids``, (rows, length), of which compiling sees no length."""
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


@contextmanager
def kept_instead() -> Iterator[None]:
    """Plans as they are made, but what they offload stays on the device."""
    apply = planned._apply

    def resident(program, ways, found):
        choices = [
            twin(ways[call.region], choice.name)
            for call, choice in zip(program.calls, found.choices, strict=True)
        ]
        return apply(program, ways, replace(found, choices=tuple(choices)))

    with patch.object(planned, "_apply", resident):
        yield


def twin(ways: list[StagedChoice], name: str):
    """The way that runs as the one of that name, in the same tiles, and offloads nothing."""
    way = next(way for way in ways if way.choice.name == name)
    if way.schedule is None or not way.schedule.offloaded:
        return way.choice
    kept = {*way.schedule.kept, *way.schedule.offloaded}
    for other in ways:
        plan = other.schedule
        if plan is None or plan.offloaded or other.layer is not way.layer or other.tile != way.tile:
            continue
        if set(plan.kept) == kept:
            return other.choice
    raise LookupError(f"no way keeps what {name!r} offloads")


def compiled_once(layers: int, lengths: list[int], device: str, tiny: bool) -> tuple[Replanned, Step]:
    """A model compiled at the longest of ``lengths``, and the step that trains it on as many tokens."""
    longest = max(lengths)
    weights = TINY.weights if tiny else "nf4"
    model = model_of(Case(layers, 1, (longest, longest), weights=weights), device, tiny)
    rewriter.prepare(model)
    tokens = random_tokens(model, [(1, length) for length in lengths], device)
    batches = dict(zip(lengths, tokens, strict=True))
    step = step_on(model, lambda length: of_any_length(batches[length]), device)
    compiled = Replanned(model, "eager" if tiny else "inductor")
    with compiled.compiling():
        first, _ = timed(step, longest, device)
    print(f"compiled in {first:.1f} s", flush=True)
    return compiled, step
