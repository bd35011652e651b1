"""The ways to run one class of layers, and what each costs: what the planner chooses from.

Every stage's results are kept, sent to host memory or computed again, the layer's own input is kept or sent;
tiles are of a few lengths. A layer that keeps everything its backward reads, compiled as it is without a
budget, is the fastest, and one of them.

With a *window* of device memory set aside for copies under way, what a stage in tiles saves for its own
backward leaves and returns tile by tile: gate and up of an MLP, the largest of what a layer saves, are then
never on the device as a whole.

Weights in host memory are read over the bus, once for each tile that reads them, while nothing else runs; or,
with room for two layers' set aside, copied while the layer before runs: with its reloads in the backward, on
a bus that is idle in this direction in the forward.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from rewriter.memory.costs import GraphCost, graph_cost
from rewriter.memory.durations import Rates
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.in_host import NONE, InHost
from rewriter.memory.layer_graphs import LayerGraphs, longest_tile
from rewriter.memory.plan import Choice
from rewriter.memory.schedule import Fate, Schedule, StageValues, schedule
from rewriter.memory.stage_run import tile_length

# Of a graph, its fakes and a number of tokens; kept for the choices of one layer, which share their graphs.
Cost = Callable[..., GraphCost]

_TILES = (None, 32768, 16384, 8192, 4096, 2048)


class Link(Rates, Protocol):
    """Rates of a machine with those of its bus."""

    @property
    def to_host(self) -> float: ...


@dataclass(frozen=True, eq=False)
class StagedChoice:
    """A choice, and how it is run: a layer's stages by a schedule, in tiles of at most ``tile`` tokens.

    Without a layer and a schedule: as it is run without a plan. ``in_tiles`` are values that leave and return
    in tiles, ``window`` the bytes that are set aside for copies under way, beside those of a whole layer.
    ``in_host``: its weights in host memory.
    """

    choice: Choice
    schedule: Schedule | None = None
    tile: int | None = None
    layer: LayerGraphs | None = None
    in_tiles: frozenset[str] = frozenset()
    window: int = 0
    in_host: InHost = NONE


def cost_on(machine: Rates, growth: Growth = AS_TRACED) -> Cost:
    """What graphs cost on ``machine``, each worked out once for a length; ``growth`` as of ``graph_cost``."""
    return functools.cache(lambda graph, fakes, length: graph_cost(graph, fakes, length, machine, growth))


def staged_choices(
    layer: LayerGraphs,
    machine: Link,
    owns_gradient: bool,
    window: int = 0,
    cost: Cost | None = None,
    in_host: InHost = NONE,
    growth: Growth = AS_TRACED,
) -> list[StagedChoice]:
    """Every combination of fates and tile that is not the same as another.

    Args:
        owns_gradient: as in ``ScheduledLayer``.
        window: device bytes that are set aside for copies under way.
        cost: from ``cost_on(machine, growth)``, where other choices share it.
        in_host: the layer's weights in host memory.
        growth: of the batch that the layer was traced with.
    """
    cost, tokens = cost or cost_on(machine, growth), layer.tokens_of(growth)
    most = min(longest_tile(tokens), layer.longest)
    tiles = [t for t in _TILES if (t or tokens) <= most and (t or 0) < tokens] or [most]
    found: dict[tuple, StagedChoice] = {}
    sizes, values = layer.sizes(growth), layer.values()
    for fates in _fates(layer):
        plan = schedule(values, layer.own_inputs, layer.wiring.outputs, fates)
        for tile in tiles:
            if (plan, tile) not in found:
                walk = _Walk(
                    layer, sizes, values, tile, tokens, owns_gradient, cost, window, in_host, machine
                )
                found[plan, tile] = _costed(layer, plan, fates, tile, machine, walk)
    return list(found.values())


def _fates(layer: LayerGraphs) -> Iterator[dict[str, Fate]]:
    """One fate for the layer's inputs, one for the results of each stage that a later backward reads."""
    groups: list[tuple[tuple[str, ...], tuple[Fate, ...]]] = []
    if layer.own_inputs:
        groups.append((layer.own_inputs, ("keep", "offload")))
    read = {name for stage in layer.values() for name in stage.backward_reads}
    for stage in layer.values():
        if read.intersection(stage.gives):
            groups.append((stage.gives, ("keep", "offload", "recompute")))
    for fates in itertools.product(*(choices for _, choices in groups)):
        yield {name: fate for (names, _), fate in zip(groups, fates, strict=True) for name in names}


def _costed(
    layer: LayerGraphs,
    plan: Schedule,
    fates: Mapping[str, Fate],
    tile: int | None,
    machine: Link,
    walk: "_Walk",
) -> StagedChoice:
    size = walk.size
    forward_peak, forward_seconds = walk.forward(plan)
    backward_peak, backward_seconds = walk.backward(plan)
    hosted = sum(size[v] for v in plan.offloaded)
    whole = sum(size[v] for v in plan.offloaded if v not in walk.in_tiles)
    fetching = walk.in_host.nbytes / machine.to_device if walk.in_host.ahead else 0.0
    choice = Choice(
        _named(layer, plan, fates, tile) + walk.in_host.words,
        sum(size[v] for v in plan.kept),
        hosted,
        forward_peak,
        backward_peak,
        # The next layer's weights come meanwhile; in the backward they share the bus with what is reloaded.
        max(forward_seconds, fetching),
        backward_seconds,
        hosted / machine.to_host,
        hosted / machine.to_device + fetching,
        max(0, whole - walk.window),
    )
    in_tiles = walk.in_tiles.intersection(plan.offloaded)
    return StagedChoice(choice, plan, tile, layer, in_tiles, walk.window, walk.in_host)


class _Walk:
    """Walks a schedule's steps with the bytes that live at each."""

    def __init__(
        self,
        layer: LayerGraphs,
        sizes: Mapping[str, int],
        values: Sequence[StageValues],
        tile: int | None,
        tokens: int,
        owns_gradient: bool,
        cost: Cost,
        window: int,
        in_host: InHost,
        machine: Link,
    ):
        self.in_host, self.to_device, self.bandwidth = in_host, machine.to_device, machine.bandwidth
        self.layer, self.tokens, self.cost, self.window = layer, tokens, cost, window
        self.tile = None if tile is None or tile >= tokens else tile_length(tokens, tile)
        # Of what is offloaded, that which is on the device one tile at a time.
        self.in_tiles = layer.saved_in_tiles if self.tile and window else frozenset()
        self.owns_gradient = owns_gradient
        self.size, self.values = sizes, values

    def forward(self, plan: Schedule) -> tuple[int, float]:
        live = {name: self.size[name] for name in self.layer.own_inputs}
        worst, seconds = sum(live.values()), 0.0
        streamed = self.in_tiles.intersection(plan.offloaded)
        for step in plan.forward:
            if step.kind == "run":
                peak, time = self._run(step.stage, live, streamed)
                worst, seconds = max(worst, peak), seconds + time
            # The caller holds the inputs until the layer is done, and a copy on its way its source.
            elif step.kind == "free" and step.value not in (*self.layer.own_inputs, *plan.offloaded):
                live.pop(step.value, None)
        return worst, seconds

    def backward(self, plan: Schedule) -> tuple[int, float]:
        live = {name: self.size[name] for name in plan.kept}
        streamed = self.in_tiles.intersection(plan.offloaded)
        wholes = {name: self.size[name] for name in plan.offloaded if name not in streamed}
        # A window is there for what returns before its use. What exceeds it is back when the backward begins.
        if sum(wholes.values()) > self.window:
            live |= wholes
        above = {n for n in self.layer.wiring.outputs if n in self.layer.wiring.differentiable}
        gradients = {name: self.size[name] for name in above}
        worst, seconds = sum(live.values()) + sum(gradients.values()), 0.0
        for step in plan.backward:
            here = sum(gradients.values())
            if step.kind == "reload":
                if step.value not in streamed:
                    live[step.value] = self.size[step.value]
                worst = max(worst, sum(live.values()) + here)
            elif step.kind == "run":
                peak, time = self._run(step.stage, live, streamed)
                worst, seconds = max(worst, peak + here), seconds + time
            elif step.kind == "backward":
                peak, time = self._backward(step.stage, live, gradients, above, streamed)
                worst, seconds = max(worst, peak), seconds + time
            elif step.kind == "free":
                live.pop(step.value, None)
        return worst, seconds

    def _run(self, index: int, live: dict[str, int], streamed: Set[str]) -> tuple[int, float]:
        graphs = self.layer.graphs[index]
        tile, count = self._tiles(index)
        cost = self.cost(graphs.forward, graphs.fakes, tile)
        gives = {name: self.size[name] for name in self.layer.wiring.gives[index] if name not in streamed}
        whole = sum(size for name, size in gives.items() if name not in live) if count > 1 else 0
        peak = sum(live.values()) + whole + cost.peak_bytes
        live.update(gives)
        reading = self._reading(graphs.forward, self.layer.wiring.takes[index])
        # Each tile's results are copied to their place.
        placing = 2 * sum(gives.values()) / self.bandwidth if count > 1 else 0.0
        return peak, (cost.seconds + reading) * count + placing

    def _backward(
        self,
        index: int,
        live: dict[str, int],
        gradients: dict[str, int],
        above: set[str],
        streamed: Set[str],
    ) -> tuple[int, float]:
        graphs, stage = self.layer.graphs[index], self.values[index]
        if graphs.backward is None:
            return 0, 0.0
        tile, count = self._tiles(index)
        cost = self.cost(graphs.backward, graphs.fakes, tile)
        before = sum(live.values()) + sum(gradients.values())
        returning = sum(self.size[n] * tile // self.tokens for n in stage.backward_reads if n in streamed)
        before += returning
        made = {name: self.size[name] for name in stage.gradients if name not in gradients}
        spare = [n for n in stage.gives if n in gradients and (self.owns_gradient or n not in above)]
        taken = set()
        for name in made if count > 1 else ():
            free = next((n for n in spare if n not in taken and self.size[n] == self.size[name]), None)
            if free is not None:
                taken.add(free)
        reused = sum(self.size[n] for n in taken)
        room = sum(made.values()) - reused if count > 1 else 0
        for name in stage.gives:
            # The engine holds what it has given until the layer is done.
            if name in gradients and (name not in above or name in taken):
                del gradients[name]
        gradients.update(made)
        reading = self._reading(graphs.backward, self.layer.wiring.reads_back[index])
        seconds = cost.seconds + reading
        waiting = _waiting(count, seconds, returning / self.to_device, self.window / self.to_device)
        # Each tile's gradients are copied to their place, or added to what is there.
        placing = 2 * sum(made.values()) + 3 * sum(self.size[n] for n in stage.gradients if n not in made)
        placed = placing / self.bandwidth if count > 1 else 0.0
        return before + room + cost.peak_bytes, seconds * count + placed + waiting

    def _reading(self, graph: GraphModule, names: Sequence[str]) -> float:
        """Seconds in which one run waits for weights over the bus."""
        return self.in_host.read_by(graph, names) / self.to_device

    def _tiles(self, index: int) -> tuple[int, int]:
        """Length of a tile and their number, of a stage."""
        row_wise = self.layer.graphs[index].stage.row_wise
        if self.tile is None or not row_wise:
            return self.tokens, 1
        # The last tile is shorter: seconds are those of as many tiles as it makes.
        return self.tile, -(-self.tokens // self.tile)


def _waiting(count: int, seconds: float, returning: float, there: float) -> float:
    """Seconds for which tiles wait that take ``seconds`` each, and ``returning`` to come back.

    Of all of them, as much as takes ``there`` is back before the first one; the rest comes meanwhile.
    """
    now = 0.0
    for tile in range(1, count + 1):
        now = max(now, tile * returning - there) + seconds
    return now - count * seconds


def _named(layer: LayerGraphs, plan: Schedule, fates: Mapping[str, Fate], tile: int | None) -> str:
    words = {"keep": plan.kept, "offload": plan.offloaded}
    parts = [f"{word} {_list(layer, names)}" for word, names in words.items() if names]
    again = [n for n, fate in fates.items() if fate == "recompute"]
    if again:
        parts.append(f"recompute {_list(layer, again)}")
    parts.append("whole" if tile is None else f"tiles of {tile:,}")
    return " · ".join(parts)


def _list(layer: LayerGraphs, names) -> str:
    return ", ".join(dict.fromkeys(layer.label(name) for name in names))
