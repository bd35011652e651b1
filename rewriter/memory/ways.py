"""The ways in which each region of a program may run: as without a budget, or in stages, costed."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from rewriter.memory.choices import Cost, Link, StagedChoice, cost_on, staged_choices
from rewriter.memory.kept import kept_choice
from rewriter.memory.layer_graphs import LayerGraphs, layer_graphs
from rewriter.memory.plan import Choice
from rewriter.memory.room import made_bytes
from rewriter.memory.stage_graphs import Unstaged
from rewriter.regions.program import Program, Region

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")


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
        owns = owns_gradient(program, region)
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


def owns_gradient(program: Program, region: Region) -> bool:
    """Whether each result has one reader, whose backward makes its gradient for this region alone."""
    (output,) = program.source.graph.find_nodes(op="output")
    returned = set(output.all_input_nodes)
    read = [node for call in program.calls for node in call.inputs]
    results = [n for call in program.calls if call.region is region for n in call.outputs]
    return all(read.count(n) == 1 and n not in returned for n in results)
