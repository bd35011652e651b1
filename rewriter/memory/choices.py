"""The ways to run one class of layers, and what each costs: what the planner chooses from.

Every stage's results are kept, sent to host memory or computed again, the layer's own input is kept or sent;
tiles are of a few lengths. A layer that keeps everything its backward reads, compiled as it is without a
budget, is the fastest, and one of them.

With a *window* of device memory set aside for copies under way, what a stage in tiles saves for its own
backward leaves and returns tile by tile: gate and up of an MLP, the largest of what a layer saves, are then
never on the device as a whole.

Weights in host memory are read over the bus, by each tile that makes its own, while nothing else runs; or,
with room for two layers' set aside, copied while the layer before runs: with its reloads in the backward, on
a bus that is idle in this direction in the forward.

What all tiles read alike, as dequantised weights, they make each; or it is made once for all of them
(``before_tiles.py``), in forms of the same way that are quicker and take more memory while a stage runs. So
is a long attention's backward that has all heads at once (``long_attention.py``).
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from rewriter.memory.at_once import AtOnceUncompiled, CompileGraph, Once
from rewriter.memory.costs import graph_cost
from rewriter.memory.durations import Rates
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.in_host import NONE, InHost
from rewriter.memory.layer import LayerStages
from rewriter.memory.layer_graphs import LayerGraphs, longest_tile
from rewriter.memory.plan import Choice
from rewriter.memory.schedule import Fate, Schedule, schedule
from rewriter.memory.walk import Cost, Direction, Link, Walk

# Of a layer's seconds, what is done at once has to spare: for memory, and for graphs that are compiled.
# Graphs are compiled once for many layers, and still weighed by one: where they ask for no memory every layer
# that runs this way takes them, so that all together spare as large a part of their seconds as each does.
_WORTH_MEMORY = 1 / 200
_WORTH_GRAPHS = 1 / 2000
# Times that copies are foreseen to take as measured. Kernels may run some percents faster in a step than a
# machine is measured, copies do not: of all that just hides, each layer would wait for a part.
_MARGIN = 1.07
_TILES = (None, 32768, 16384, 8192, 4096, 2048)


@dataclass(frozen=True, eq=False)
class StagedChoice:
    """A choice, and how it is run: a layer's stages by a schedule, in tiles of at most ``tile`` tokens.

    Without a layer and a schedule: as it is run without a plan. ``in_tiles`` are values that leave and return
    in tiles, ``window`` the bytes that are set aside for copies under way, beside those of a whole layer.
    ``in_host``: its weights in host memory. ``once``: the graphs that do at once what they do in parts
    otherwise; ``quicker``: the same with more of these.
    """

    choice: Choice
    schedule: Schedule | None = None
    tile: int | None = None
    layer: LayerGraphs | None = None
    in_tiles: frozenset[str] = frozenset()
    window: int = 0
    in_host: InHost = NONE
    once: Once = frozenset()
    quicker: tuple["StagedChoice", ...] = ()

    @property
    def stages(self) -> "StagesOnce | None":
        """What is compiled for it; None where it is run without a plan."""
        return None if self.layer is None else StagesOnce(self.layer, self.once)

    def without(self, refused: Set["StagesOnce"]) -> "StagedChoice":
        """The same, with those of its quicker forms that are compiled without any of ``refused``."""
        left = tuple(form for form in self.quicker if form.stages and not form.stages.needs(refused))
        return replace(self, choice=replace(self.choice, quicker=tuple(f.choice for f in left)), quicker=left)


@dataclass(frozen=True)
class StagesOnce:
    """The stages of ``layer``, of which other graphs take the place of those of ``once``."""

    layer: LayerGraphs
    once: Once

    @property
    def words(self) -> str:
        """What is at once, for people; nothing where nothing is."""
        tiled = {self.layer.graphs[place].stage.row_wise for _, place in self.once}
        said = [
            text for text, kind in ((" weights made once", True), (" heads at once", False)) if kind in tiled
        ]
        return " with" + " and".join(said) if said else ""

    def compiled(self, compile_graph: CompileGraph) -> LayerStages:
        return self.layer.compiled(compile_graph, self.once)

    def needs(self, others: Set["StagesOnce"]) -> bool:
        """Whether what is compiled for any of ``others`` is compiled for it, too."""
        return any(self.layer is other.layer and self.once >= other.once for other in others)

    def at_fault(self, error: Exception) -> "StagesOnce":
        """The least that cannot be compiled, by an ``error`` of ``compiled``: it all, or what is at once."""
        failed = error.at_once if isinstance(error, AtOnceUncompiled) else None
        once = (graph for graph in self.once if failed and self.layer.at_once(*graph) is failed)
        return StagesOnce(self.layer, Once(once))


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
                walk = Walk(layer, sizes, values, tile, tokens, owns_gradient, cost, window, in_host, machine)
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
    walk: Walk,
) -> StagedChoice:
    size, forward, backward = walk.size, walk.forward(plan), walk.backward(plan)
    hosted = sum(size[v] for v in plan.offloaded)
    whole = sum(size[v] for v in plan.offloaded if v not in walk.in_tiles)
    fetching = walk.in_host.nbytes / machine.to_device if walk.in_host.ahead else 0.0
    in_tiles = walk.in_tiles.intersection(plan.offloaded)

    def way(once: Once, words: str, quicker: Sequence[StagedChoice] = ()) -> StagedChoice:
        choice = Choice(
            _named(layer, plan, fates, tile) + words + walk.in_host.words,
            sum(size[v] for v in plan.kept),
            hosted,
            forward.peak(once),
            backward.peak(once),
            # The next layer's weights come meanwhile; in the backward they share the bus with reloads.
            max(forward.seconds(once), fetching),
            backward.seconds(once),
            _MARGIN * hosted / machine.to_host,
            _MARGIN * hosted / machine.to_device + fetching,
            max(0, whole - walk.window),
            tuple(form.choice for form in quicker),
        )
        return StagedChoice(
            choice, plan, tile, layer, in_tiles, walk.window, walk.in_host, once, tuple(quicker)
        )

    return way(frozenset(), "", [way(*form) for form in _at_once(layer, forward, backward)])


def _at_once(layer: LayerGraphs, forward: Direction, backward: Direction) -> Iterator[tuple[Once, str]]:
    """Graphs that do at once what they do in parts otherwise, and words for it, by rising memory.

    First those that take no more so than the layer does anyway; then more, where that is worth it.
    """
    runs, none = (*forward.runs, *backward.runs), Once()
    need: dict[tuple[str, int], int] = {}
    for run in runs:
        if run.once:
            # What is computed again in the backward runs in both directions.
            need[run.graph] = max(run.once[0], need.get(run.graph, 0))
    order = sorted(need, key=need.__getitem__)
    most, least = max(forward.peak(none), backward.peak(none)), forward.seconds(none) + backward.seconds(none)
    for count in range(1, len(order) + 1):
        if count < len(order) and need[order[count]] <= most:
            continue
        once = Once(order[:count])
        seconds = forward.seconds(once) + backward.seconds(once)
        worth = _WORTH_GRAPHS if need[order[count - 1]] <= most else _WORTH_MEMORY
        if least - seconds > worth * least:
            least = seconds
            yield once, _words(layer, once, order)


def _words(layer: LayerGraphs, once: Once, possible: Sequence[tuple[str, int]]) -> str:
    tiled = [graph for graph in possible if layer.graphs[graph[1]].stage.row_wise]
    made = len(once.intersection(tiled))
    words = f", weights made once in {made} of {len(tiled)} passes" if made else ""
    return words + (", heads at once" if once.difference(tiled) else "")


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
