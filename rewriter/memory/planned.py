"""A program under a memory budget: which of its layers run how, and the program that says so.

The layers of a program are parted into stages, each way to run them is costed, and the planner chooses for
every call. Calls of one region that run differently become regions of their own, so that the program's text
shows what the plan does.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.memory.arena import HostArena
from rewriter.memory.budgets import Budgets
from rewriter.memory.choices import Cost, Link, StagedChoice, cost_on, staged_choices
from rewriter.memory.kept import kept_choice
from rewriter.memory.layer import LayerStages, ScheduledLayer
from rewriter.memory.layer_graphs import LayerGraphs, layer_graphs
from rewriter.memory.lengths import grown
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.planner import best
from rewriter.memory.room import made_bytes
from rewriter.memory.stage_graphs import Unstaged
from rewriter.memory.transfer import Transfers
from rewriter.regions.program import Program, Region, RegionCall

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")
# Of host memory, for blocks that begin at multiples of 512 bytes.
_SPARE = 1 << 20


@dataclass(frozen=True, eq=False)
class StagedRegion:
    """How a region of a planned program runs in stages."""

    layer: LayerGraphs
    way: StagedChoice
    owns_gradient: bool
    growth: float = 1.0

    def scheduled(self, stages: LayerStages, transfers: Callable[[], Transfers]) -> ScheduledLayer:
        """What stands for the region, once its stages are compiled."""
        assert self.way.schedule is not None
        way = self.way
        assert way.schedule is not None
        return ScheduledLayer(
            stages,
            way.schedule,
            way.tile,
            self.layer.shared,
            transfers,
            self.owns_gradient,
            way.in_tiles,
            None if way.window is None else ceil(way.window * self.growth),
        )


@dataclass(frozen=True, eq=False)
class PlannedProgram:
    """A program whose regions are those of ``program`` under a plan.

    Attributes:
        program: each region once for every way in which it runs.
        staged: those that run in stages; the others are compiled as they are.
        plan: what was chosen, and what it comes to.
        notes: why layers could not be run in stages.
        transfers: to host memory and back, made when they are first asked for.
    """

    program: Program
    staged: Mapping[Region, StagedRegion]
    plan: MemoryPlan
    notes: tuple[str, ...]
    transfers: Callable[[], Transfers]

    def reserve_host_memory(self) -> None:
        """Have what the plan offloads in one piece: grown bit by bit, it would leave a rest in each."""
        if self.plan.hosted:
            self.transfers().arena.reserve(self.plan.hosted + _SPARE)


def planned(program: Program, given: Budgets, machine: Link, device: torch.device) -> PlannedProgram:
    """Choose for every call of ``program`` how it runs: as without a budget wherever everything fits.

    Raises:
        Infeasible: no plan stays within the budgets.
    """
    kept = kept_ways(program, machine)
    if found := _everything_kept(program, kept, given, device):
        return found
    everything, notes = all_ways(program, machine, kept)
    problems = [_problem(program, ways, given, window) for window, ways in everything.items()]
    found = best(problems)
    ways = next(w for w, p in zip(everything.values(), problems, strict=True) if p is found.problem)
    staged_program, staged = _apply(program, ways, found, given.growth)
    return PlannedProgram(staged_program, staged, found, tuple(notes), _transfers(given, device))


def everything_kept(
    program: Program, given: Budgets, machine: Link, device: torch.device
) -> PlannedProgram | None:
    """``program`` as it runs without a budget; None where that does not fit."""
    return _everything_kept(program, kept_ways(program, machine), given, device)


def _everything_kept(
    program: Program, kept: Mapping[Region, list[StagedChoice]], given: Budgets, device: torch.device
) -> PlannedProgram | None:
    found = _kept_plan(program, kept, given)
    if found.peak > given.device:
        return None
    return PlannedProgram(program, {}, found, (), _transfers(given, device))


def kept_plan(program: Program, given: Budgets, machine: Link) -> MemoryPlan:
    """The plan that keeps everything, whether it fits or not."""
    return _kept_plan(program, kept_ways(program, machine), given)


def _kept_plan(program: Program, kept: Mapping[Region, list[StagedChoice]], given: Budgets) -> MemoryPlan:
    problem = _problem(program, kept, given)
    return MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts))


def _transfers(given: Budgets, device: torch.device) -> Callable[[], Transfers]:
    return functools.partial(transfers_of, str(device), given.host)


def _problem(
    program: Program, ways: Mapping[Region, list[StagedChoice]], given: Budgets, window: int = 0
) -> Problem:
    parts = parts_of(program.calls, ways, given.growth)
    window = ceil(window * given.growth)
    return Problem(parts, given.static, given.device, max(given.host - _SPARE, 0), window=window)


def parts_of(
    calls: Sequence[RegionCall], ways: Mapping[Region, list[StagedChoice]], growth: float = 1.0
) -> tuple[Part, ...]:
    """What the planner decides for each call; calls of one region share their choices."""
    choices = {region: tuple(grown(way.choice, growth) for way in found) for region, found in ways.items()}
    return tuple(
        Part(f"{call.region.name} {i}", call.region.name, choices[call.region])
        for i, call in enumerate(calls)
    )


def kept_ways(program: Program, machine: Link) -> dict[Region, list[StagedChoice]]:
    """Each region as it runs without a budget."""
    return {region: [StagedChoice(_kept_choice(program, region, machine))] for region in program.regions}


def _kept_choice(program: Program, region: Region, machine: Link) -> Choice:
    """By the region's forward and backward; where they cannot be traced, by the sizes of its values."""
    try:
        return kept_choice(region, _shared(program, region), machine)
    except Exception as error:
        log.warning("%s is foreseen from sizes alone: %s", region.name, error, exc_info=True)
        made = made_bytes(region.module)
        return Choice("keep all, foreseen from sizes alone", made, 0, made, 3 * made, 0.0, 0.0)


def all_ways(
    program: Program, machine: Link, kept: Mapping[Region, list[StagedChoice]] | None = None
) -> tuple[dict[int, dict[Region, list[StagedChoice]]], list[str]]:
    """Every way to run each region, and why some cannot run in stages; ``kept`` where it is known already.

    By the window of device memory that is set aside for copies under way: none, which needs least, and one.
    Regions between the first and the last call, or that repeat, may run in stages. One that fails to be cut
    keeps everything; the others are planned.
    """
    notes: list[str] = []
    kept = kept or kept_ways(program, machine)
    layers = {
        region: graphs
        for region in _repeated_or_inner(program)
        if (graphs := _or_noted(notes, region, functools.partial(_cut, program, region))) is not None
    }
    windows, cost = (0, _window(layers)), cost_on(machine)
    found = {window: {region: list(ways) for region, ways in kept.items()} for window in windows}
    for region, graphs in layers.items():
        owns = _owns_gradient(program, region)
        staged = functools.partial(_staged_ways, graphs, machine, owns, windows, cost)
        for window, ways in (_or_noted(notes, region, staged) or {}).items():
            found[window][region] += ways
    return found, notes


def _staged_ways(
    layers: Sequence[LayerGraphs], machine: Link, owns_gradient: bool, windows: Sequence[int], cost: Cost
) -> dict[int, list[StagedChoice]]:
    """By the window, the ways to run one region, of whose stages ``layers`` has two forms."""
    return {
        window: [
            way
            for layer in layers
            for way in staged_choices(layer, layer.tokens, machine, owns_gradient, window, cost)
        ]
        for window in windows
    }


def _repeated_or_inner(program: Program) -> list[Region]:
    times = program.times()
    ends = {program.calls[0].region, program.calls[-1].region}
    return [region for region in program.regions if times[region] > 1 or region not in ends]


def _or_noted(notes: list[str], region: Region, make: Callable[[], _Made]) -> _Made | None:
    """What ``make`` makes; None, and a note, where it fails: the region then keeps everything."""
    try:
        return make()
    except Unstaged as reason:
        notes.append(f"{region.name} keeps what its backward reads: {reason}")
    except Exception as error:
        log.warning("%s cannot be planned and keeps everything: %s", region.name, error, exc_info=True)
        failed = f"planning it failed: {type(error).__name__}: {error}"
        notes.append(f"{region.name} keeps everything, {failed}")
    return None


def _cut(program: Program, region: Region) -> list[LayerGraphs]:
    shared = _shared(program, region)
    return [layer_graphs(region, shared, saving=saving) for saving in (False, True)]


def _window(layers: Mapping[Region, Sequence[LayerGraphs]]) -> int:
    """Device bytes for copies under way: half of the most that one layer saves in tiles.

    It is made in half of the layer's forward, and takes about all of it to leave.
    """
    sizes = (
        sum(layer.sizes()[name] for name in layer.saved_in_tiles)
        for graphs in layers.values()
        for layer in graphs
    )
    return max(sizes, default=0) // 2


def _shared(program: Program, region: Region) -> frozenset[int]:
    """Inputs that live anyway: all but those that one call makes and this one alone reads.

    Where calls differ, as where the first layer reads an input of the graph, they are the layer's own.
    """
    readers: dict[Any, int] = {}
    for call in program.calls:
        for node in call.inputs:
            readers[node] = readers.get(node, 0) + 1
    (output,) = program.source.graph.find_nodes(op="output")
    made = {n for call in program.calls for n in call.outputs} - set(output.all_input_nodes)
    calls = [call for call in program.calls if call.region is region]
    return frozenset(
        i
        for i, value in enumerate(region.inputs)
        if not isinstance(value, Tensor)
        or all(call.inputs[i] not in made or readers[call.inputs[i]] > 1 for call in calls)
    )


def _owns_gradient(program: Program, region: Region) -> bool:
    """Whether each result has one reader, whose backward makes its gradient for this region alone."""
    (output,) = program.source.graph.find_nodes(op="output")
    returned = set(output.all_input_nodes)
    read = [node for call in program.calls for node in call.inputs]
    results = [n for call in program.calls if call.region is region for n in call.outputs]
    return all(read.count(n) == 1 and n not in returned for n in results)


def _apply(
    program: Program,
    ways: Mapping[Region, list[StagedChoice]],
    found: MemoryPlan,
    growth: float,
) -> tuple[Program, dict[Region, StagedRegion]]:
    taken = {n.name for n in program.source.graph.nodes} | {r.name for r in program.regions}
    made: dict[tuple[Region, str], Region] = {}
    staged: dict[Region, StagedRegion] = {}
    calls: list[RegionCall] = []
    for call, choice in zip(program.calls, found.choices, strict=True):
        region, key = call.region, (call.region, choice.name)
        if key not in made:
            name = region.name
            if any(r is region for r, _ in made):
                numbers = (f"{region.name}_{i}" for i in itertools.count(2))
                name = next(n for n in numbers if n not in taken)
                taken.add(name)
            made[key] = Region(name, region.module, region.inputs)
            way = next(w for w in ways[region] if w.choice.name == choice.name)
            if way.layer is not None:
                staged[made[key]] = StagedRegion(way.layer, way, _owns_gradient(program, region), growth)
        calls.append(RegionCall(made[key], call.inputs, call.outputs))
    return replace(program, calls=tuple(calls)), staged


@functools.cache
def transfers_of(device: str, host_budget: int) -> Transfers:
    """The process's own to and from ``device``: all graphs share its host memory."""
    return Transfers(HostArena(host_budget), device)
