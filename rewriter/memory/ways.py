"""The ways in which each region of a program may run: as without a budget, or in stages, costed."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from sympy import Symbol
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.memory.at_once import Once
from rewriter.memory.choices import StagedChoice, StagesOnce, cost_on, staged_choices
from rewriter.memory.costs import value_bytes
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.in_host import InHost, in_host_of
from rewriter.memory.in_place import Inseparable
from rewriter.memory.kept import KeptCost, forward_cost, kept_graphs, least_choice
from rewriter.memory.layer_graphs import LayerGraphs, layer_graphs
from rewriter.memory.lengths import rows_of
from rewriter.memory.plan import Choice
from rewriter.memory.stage_graphs import Unstaged
from rewriter.memory.walk import Cost, Link
from rewriter.memory.weights_ahead import BUFFERS, buffer_bytes
from rewriter.regions.program import Program, Region

log = logging.getLogger(__name__)

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Aside:
    """Device bytes that are set aside: for copies under way, and for layers' weights that come a layer ahead.

    The first grow with the tokens, the second do not.
    """

    window: int = 0
    weights: int = 0

    @property
    def nbytes(self) -> int:
        return self.window + self.weights


ByAside = dict[Aside, dict[Region, list[StagedChoice]]]


class Ways:
    """The ways to run the regions of ``program``, traced once each, costed for sequences of any length.

    Regions between the first and the last call, or that repeat, may run in stages. One that fails to be cut
    keeps everything; the others are planned.

    Args:
        in_host: weights in host memory.
        reach: how many times as long as the ones at hand sequences may be.

    Attributes:
        notes: why some regions cannot run in stages.
        compiled: the graphs of those that may run as without a budget, if they may run otherwise; None: all.
    """

    def __init__(self, program: Program, machine: Link, in_host: Set[Node] = frozenset(), reach: float = 1.0):
        self._program, self._machine, self._reach = program, machine, reach
        self._rows = rows_of(program)
        self._weights = {region: in_host_of(program, region, in_host) for region in program.regions}
        self._refused: set[StagesOnce] = set()
        self.notes: list[str] = []
        self.compiled: Set[GraphModule] | None = None

    def kept(self, growth: Growth = AS_TRACED) -> dict[Region, list[StagedChoice]]:
        """Each region as it runs without a budget; weights in host memory are read over the bus."""
        found = {}
        for region, cost in self._kept.items():
            weights = self._weights[region]
            choice = _waiting(cost(self._machine, growth), weights, self._machine)
            found[region] = [StagedChoice(choice, in_host=weights)]
        return found

    def all(self, growth: Growth = AS_TRACED) -> ByAside:
        """Every way to run each region, of a batch of that ``growth`` since it was traced.

        By the device memory that is set aside: none, which needs least; room for two layers' weights, where
        they are in host memory; and a window for copies under way beside it.
        """
        kept, layers = self.kept(growth), self._layers
        room, cost = self._room_for_weights(), cost_on(self._machine, growth)
        windows = _windows(layers, growth)
        asides = dict.fromkeys([Aside(), Aside(0, room), *(Aside(window, room) for window in windows)])
        found = {aside: {region: list(ways) for region, ways in kept.items()} for aside in asides}
        for region, graphs in layers.items():
            if self.compiled is not None and region.module not in self.compiled:
                for ways in found.values():
                    ways[region].clear()
            owns, weights = owns_gradient(self._program, region), self._weights[region]
            left = [layer for layer in graphs if not StagesOnce(layer, Once()).needs(self._refused)]
            staged = functools.partial(
                _staged_ways, left, self._machine, owns, tuple(asides), cost, weights, growth
            )
            for aside, ways in (_or_noted(self.notes, region, staged) or {}).items():
                found[aside][region] += [way.without(self._refused) for way in ways]
        return found

    def refuse(self, stages: StagesOnce) -> None:
        """Let none that is asked for from now on run what needs ``stages``: those and more at once."""
        self._refused.add(stages)

    @property
    def refused(self) -> bool:
        """Whether there were more ways, that may have taken less memory than those that are left."""
        return any(not stages.once for stages in self._refused)

    @cached_property
    def _kept(self) -> dict[Region, KeptCost]:
        return {region: _kept_cost(self._program, region, self._rows) for region in self._program.regions}

    @cached_property
    def _layers(self) -> dict[Region, list[LayerGraphs]]:
        """Of each region that may run in stages, two forms of these."""
        found = {}
        for region in _repeated_or_inner(self._program):
            cut = functools.partial(_cut, self._program, region, self._reach, self._rows)
            if (graphs := _or_noted(self.notes, region, cut)) is not None:
                found[region] = graphs
        return found

    def _room_for_weights(self) -> int:
        """Device bytes for those of a layer that runs and of the one that runs next."""
        sizes = (
            buffer_bytes(value_bytes(region.inputs[i]) for i in self._weights[region].places(region))
            for region in self._layers
        )
        return BUFFERS * max(sizes, default=0)


def _waiting(choice: Choice, weights: InHost, machine: Link) -> Choice:
    """``choice``, whose kernels wait for the bus in both directions."""
    seconds = weights.nbytes / machine.to_device
    return replace(
        choice,
        name=choice.name + weights.words,
        forward_seconds=choice.forward_seconds + seconds,
        backward_seconds=choice.backward_seconds + (seconds if choice.backward_seconds else 0.0),
    )


def _kept_cost(program: Program, region: Region, rows: Set[Symbol]) -> KeptCost:
    """By the region's forward and backward; where they cannot be traced, by as much as can be."""
    shared = _shared(program, region)
    try:
        return kept_graphs(region, shared, rows).choice
    except Inseparable as reason:
        log.info("%s is foreseen from its forward: %s", region.name, reason)
    except Exception as error:
        log.warning("%s is foreseen from sizes alone: %s", region.name, error, exc_info=True)
    try:
        return forward_cost(region, rows)
    except Exception as error:
        log.warning("%s cannot be traced: %s", region.name, error, exc_info=True)
        return functools.partial(least_choice, region, rows)


def _staged_ways(
    layers: Sequence[LayerGraphs],
    machine: Link,
    owns_gradient: bool,
    asides: Sequence[Aside],
    cost: Cost,
    weights: InHost,
    growth: Growth,
) -> dict[Aside, list[StagedChoice]]:
    """By what is set aside, the ways to run one region, of whose stages ``layers`` has two forms."""
    found = {}
    for aside in asides:
        in_host = replace(weights, ahead=bool(aside.weights and weights.names))
        found[aside] = [
            way
            for layer in layers
            for way in staged_choices(layer, machine, owns_gradient, aside.window, cost, in_host, growth)
        ]
    return found


def _repeated_or_inner(program: Program) -> list[Region]:
    times = program.times()
    ends = {program.calls[0].region, program.calls[-1].region}
    return [region for region in program.regions if times[region] > 1 or region not in ends]


def _or_noted(notes: list[str], region: Region, make: Callable[[], _Made]) -> _Made | None:
    """What ``make`` makes; None, and a note, where it fails: the region then keeps everything."""
    try:
        return make()
    except Unstaged as reason:
        note = f"{region.name} keeps what its backward reads: {reason}"
    except Exception as error:
        log.warning("%s cannot be planned and keeps everything: %s", region.name, error, exc_info=True)
        note = f"{region.name} keeps everything, planning it failed: {type(error).__name__}: {error}"
    if note not in notes:
        notes.append(note)
    return None


def _cut(program: Program, region: Region, reach: float, rows: Set[Symbol]) -> list[LayerGraphs]:
    shared = _shared(program, region)
    return [layer_graphs(region, shared, saving=saving, reach=reach, rows=rows) for saving in (False, True)]


def _windows(layers: Mapping[Region, Sequence[LayerGraphs]], growth: Growth) -> list[int]:
    """Device bytes for copies under way: half of the most that one layer saves in tiles, and all of it.

    It is made in half of the layer's forward, and takes about all of it to leave. With room for all of it, it
    is back when the layer's backward begins.
    """
    largest = 0
    for layer in (layer for graphs in layers.values() for layer in graphs):
        sizes = layer.sizes(growth)
        largest = max(largest, sum(sizes[name] for name in layer.saved_in_tiles))
    # The first of two tiles is a little more than half.
    return [share + share // 50 for share in (largest // 2, largest)]


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
