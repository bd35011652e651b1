"""A model that is compiled once, for its longest batch, and run under the plans for many budgets and lengths.

What depends on a budget is which stages run in which order, so that a measurement of many budgets need not
trace or compile for each. All regions are compiled as they run without a budget, too, which a plan may choose
for some layers. Two things are not as where a model is compiled for one budget and length: where everything
fits, layers begin with their own norms all the same; and attention's backward goes by groups of heads at
every length, if it does at the longest.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from end_to_end import Step, random_tokens, step_on, timed
from models import Case, model_of
from torch import Tensor, nn
from torch.fx import GraphModule

import rewriter
from rewriter.arrangement import outline_regions
from rewriter.backend import rewrite_graph
from rewriter.deferred import split_deferred
from rewriter.lower_planned import PlanLowering
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import Budgets, budgets, device_of
from rewriter.memory.choices import StagedChoice
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.layer_graphs import LayerGraphs
from rewriter.memory.lengths import reach_of, tokens_at_hand
from rewriter.memory.long_attention import LONG
from rewriter.memory.machine import machine_for
from rewriter.memory.plan import MemoryPlan, Problem
from rewriter.memory.planned import Choosing, PlannedProgram, parts_of
from rewriter.memory.planner import least
from rewriter.memory.ways import Aside, ByAside, Ways
from rewriter.options import Options
from rewriter.regions.program import Region
from rewriter.report import GraphRecord

# What a dry run trains: all of it, so that layers are alike and have few operations.
TINY = Case(2, 1, (64, 64), weights="full")


class Replanned:
    """``model`` compiled; called once, with the longest batch that ever comes, as ``of_any_length``.

    From then on it runs under the last plan that was asked for.
    """

    def __init__(self, model: nn.Module, lowering: str):
        self._options = Options(lowering=lowering)
        model.compile(backend=self._compile)

    def _compile(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        """The backend's own line, but that every region is compiled as it runs without a budget, too."""
        record = GraphRecord("replanned")
        rewritten = rewrite_graph(module, self._options, record)[-1].module
        body, finish = split_deferred(rewritten)
        program = outline_regions(body, example_inputs, self._options, record)
        assert program is not None, record.notes
        if (parted := parted_at_borders(program)) is not None:
            program = outline_regions(parted, example_inputs, self._options, record) or program
        device, self._here = device_of(example_inputs), tokens_at_hand(program)
        machine = machine_for(device)
        ways = RememberedWays(program, machine, reach=reach_of(program, 1.0, LONG))
        self._choosing = Choosing(program, ways, budgets(program, 1.0, None, device), machine, device)
        self._lowering = PlanLowering(self._options)
        kept = ways.kept(AS_TRACED)
        everything = kept_of(self._problem(kept, self._choosing.given))
        for planned in (self._choosing.following(everything, kept), self._choosing.chosen()):
            self._run, _ = self._lowering.first(planned, lambda _: None)
        return finish(lambda *inputs: self._run(*inputs))

    def range_of(self, tokens: int) -> tuple[int, int]:
        """Bytes that tensors take: of the smallest plan, and where everything is kept."""
        given = self._given(tokens)
        problem = self._problem(self._choosing.ways.all(given.growth)[Aside()], given)
        return least(problem).peak, kept_of(problem).peak

    def plan(self, tokens: int, usable: int, resident: bool = False) -> MemoryPlan:
        """Run from now on under the plan for so many tokens, within the bytes that tensors may take.

        Args:
            resident: keep on the device what the plan would offload.
        """
        choosing = replace(self._choosing, given=replace(self._given(tokens), device=usable))
        found = choosing.chosen()
        self._run, followed = self._lowering.again(kept_instead(choosing, found) if resident else found)
        return found.plan if resident else followed.plan

    def _problem(self, ways: Mapping[Region, Sequence[StagedChoice]], given: Budgets) -> Problem:
        parts = parts_of(self._choosing.program.calls, ways)
        return Problem(parts, given.static, given.device, given.host)

    def _given(self, tokens: int) -> Budgets:
        here = self._choosing
        now = budgets(here.program, 1.0, None, here.device)
        times = tokens / self._here
        # Host memory is one arena's, for all plans.
        return replace(now, host=here.given.host, growth=Growth(times, times), reach=here.given.reach)


class RememberedWays(Ways):
    """Asked for each budget, and the same for all."""

    @functools.cache  # noqa: B019
    def all(self, growth: Growth = AS_TRACED) -> ByAside:
        return super().all(growth)

    def refuse(self, layer: LayerGraphs) -> None:
        super().refuse(layer)
        RememberedWays.all.cache_clear()


def kept_of(problem: Problem) -> MemoryPlan:
    """The plan that keeps everything, which is the first choice of all parts."""
    return MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts))


def of_any_length(ids: Tensor) -> Tensor:
    """``ids``, (rows, length), of which compiling sees no length."""
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


def kept_instead(choosing: Choosing, found: PlannedProgram) -> PlannedProgram:
    """The same plan, but what it offloads stays on the device."""
    chosen = list(zip(choosing.program.calls, found.plan.choices, strict=True))
    ways = next(
        ways
        for ways in choosing.ways.all(choosing.given.growth).values()
        if all(any(form.choice is choice for form in forms(ways[call.region])) for call, choice in chosen)
    )
    choices = tuple(twin(ways[call.region], choice.name) for call, choice in chosen)
    return choosing.following(replace(found.plan, choices=choices), ways)


def forms(ways: list[StagedChoice]) -> list[StagedChoice]:
    """Each way, and those that make weights once in its place."""
    return [form for way in ways for form in (way, *way.quicker)]


def twin(ways: list[StagedChoice], name: str):
    """The way that runs as the one of that name, in the same tiles, and offloads nothing."""
    way = next(form for form in forms(ways) if form.choice.name == name)
    if way.schedule is None or not way.schedule.offloaded:
        return way.choice
    kept = {*way.schedule.kept, *way.schedule.offloaded}
    for other in sorted(forms(ways), key=lambda form: form.once != way.once):
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
    first, _ = timed(step, longest, device)
    print(f"compiled in {first:.1f} s", flush=True)
    return compiled, step
