"""Walks the steps of a layer with the bytes that live at each, and sums their seconds.

    Schedule, length of a tile  ->  Direction(bytes between its runs, what each run takes), for each direction

A run that may do at once what it does in parts (``at_once.py``) is costed twice: that takes less time, and
more memory at that moment alone.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from rewriter.memory.at_once import Once
from rewriter.memory.before_tiles import Parted
from rewriter.memory.costs import GraphCost
from rewriter.memory.durations import Rates
from rewriter.memory.in_host import InHost
from rewriter.memory.layer_graphs import LayerGraphs
from rewriter.memory.schedule import Schedule, StageValues
from rewriter.memory.stage_run import tile_length

# Of a graph, its fakes and a number of tokens; kept for the choices of one layer, which share their graphs.
Cost = Callable[..., GraphCost]


class Link(Rates, Protocol):
    """Rates of a machine with those of its bus."""

    @property
    def to_host(self) -> float: ...


@dataclass(frozen=True)
class Ran:
    """One run of a stage: bytes at its worst moment, and seconds; ``once``: both, where it runs at once.

    ``graph`` is named as in ``Once``.
    """

    graph: tuple[str, int]
    peak: int
    seconds: float
    once: tuple[int, float] | None = None

    def at(self, once: Once) -> tuple[int, float]:
        """Bytes and seconds where the graphs of ``once`` run so."""
        return self.once if self.once and self.graph in once else (self.peak, self.seconds)


@dataclass(frozen=True)
class Direction:
    """A layer's forward or backward: bytes at its worst moment between runs, and its runs."""

    between: int
    runs: tuple[Ran, ...]

    def peak(self, once: Once) -> int:
        return max([self.between, *(run.at(once)[0] for run in self.runs)])

    def seconds(self, once: Once) -> float:
        return sum(run.at(once)[1] for run in self.runs)


@dataclass(frozen=True)
class _Graph:
    """What one run over all tiles takes: bytes beside its values, and seconds; those of each tile."""

    peak: int
    seconds: float
    tile_seconds: float


class Walk:
    """Of one layer, in tiles of one length.

    Attributes:
        in_tiles: of what is offloaded, that which is on the device one tile at a time.
    """

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
        self.in_tiles = layer.saved_in_tiles if self.tile and window else frozenset()
        self.owns_gradient = owns_gradient
        self.size, self.values = sizes, values

    def forward(self, plan: Schedule) -> Direction:
        live = {name: self.size[name] for name in self.layer.own_inputs}
        between, runs = sum(live.values()), []
        streamed = self.in_tiles.intersection(plan.offloaded)
        for step in plan.forward:
            if step.kind == "run":
                runs.append(self._run(step.stage, live, streamed))
            # The caller holds the inputs until the layer is done, and a copy on its way its source.
            elif step.kind == "free" and step.value not in (*self.layer.own_inputs, *plan.offloaded):
                live.pop(step.value, None)
        return Direction(between, tuple(runs))

    def backward(self, plan: Schedule) -> Direction:
        live = {name: self.size[name] for name in plan.kept}
        streamed = self.in_tiles.intersection(plan.offloaded)
        wholes = {name: self.size[name] for name in plan.offloaded if name not in streamed}
        # A window is there for what returns before its use. What exceeds it is back when the backward begins.
        if sum(wholes.values()) > self.window:
            live |= wholes
        above = {n for n in self.layer.wiring.outputs if n in self.layer.wiring.differentiable}
        gradients = {name: self.size[name] for name in above}
        between, runs = sum(live.values()) + sum(gradients.values()), []
        for step in plan.backward:
            here = sum(gradients.values())
            if step.kind == "reload":
                if step.value not in streamed:
                    live[step.value] = self.size[step.value]
                between = max(between, sum(live.values()) + here)
            elif step.kind == "run":
                runs.append(self._run(step.stage, live, streamed, here))
            elif step.kind == "backward" and self.layer.graphs[step.stage].backward is not None:
                runs.append(self._backward(step.stage, live, gradients, above, streamed))
            elif step.kind == "free":
                live.pop(step.value, None)
        return Direction(between, tuple(runs))

    def _run(self, index: int, live: dict[str, int], streamed: Set[str], beside: int = 0) -> Ran:
        graphs, takes = self.layer.graphs[index], self.layer.wiring.takes[index]
        _, count = self._tiles(index)
        gives = {name: self.size[name] for name in self.layer.wiring.gives[index] if name not in streamed}
        whole = sum(size for name, size in gives.items() if name not in live) if count > 1 else 0
        before = beside + sum(live.values()) + whole
        live.update(gives)
        # Each tile's results are copied to their place.
        placing = 2 * sum(gives.values()) / self.bandwidth if count > 1 else 0.0
        each = self._each(index, graphs.forward, takes)
        peak, seconds = before + each.peak, each.seconds + placing
        made = self._once(index, graphs.forward_parted, takes) if count > 1 else None
        once = made and (before + made.peak, made.seconds + placing)
        return Ran(("run", index), peak, seconds, once)

    def _backward(
        self,
        index: int,
        live: dict[str, int],
        gradients: dict[str, int],
        above: set[str],
        streamed: Set[str],
    ) -> Ran:
        graphs, stage = self.layer.graphs[index], self.values[index]
        reads = self.layer.wiring.reads_back[index]
        assert graphs.backward is not None
        tile, count = self._tiles(index)
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
        before += sum(made.values()) - reused if count > 1 else 0
        for name in stage.gives:
            # The engine holds what it has given until the layer is done.
            if name in gradients and (name not in above or name in taken):
                del gradients[name]
        gradients.update(made)
        # Each tile's gradients are copied to their place, or added to what is there.
        placing = 2 * sum(made.values()) + 3 * sum(self.size[n] for n in stage.gradients if n not in made)
        placed = placing / self.bandwidth if count > 1 else 0.0

        def taking(graph: _Graph) -> tuple[int, float]:
            back = returning / self.to_device
            waits = _waiting(count, graph.tile_seconds, back, self.window / self.to_device)
            return before + graph.peak, graph.seconds + placed + waits

        each, heads = self._each(index, graphs.backward, reads), graphs.backward_with_heads_at_once
        if heads is not None:
            once = self._each(index, heads.graph, reads)
        else:
            once = self._once(index, graphs.backward_parted, reads) if count > 1 else None
        return Ran(("backward", index), *taking(each), once and taking(once))

    def _each(self, index: int, graph: GraphModule, names: Sequence[str]) -> _Graph:
        """``graph``, whose first arguments are ``names``, in every tile."""
        tile, count = self._tiles(index)
        cost = self.cost(graph, self.layer.graphs[index].fakes, tile)
        seconds = cost.seconds + self._reading(graph, names)
        return _Graph(cost.peak_bytes, seconds * count, seconds)

    def _once(self, index: int, apart: Parted | None, names: Sequence[str]) -> _Graph | None:
        """The same where what is ``apart`` is made before the tiles."""
        if apart is None:
            return None
        fakes = self.layer.graphs[index].fakes
        before, tiles = self.cost(apart.before, fakes, self.tokens), self._each(index, apart.tile, names)
        reading = self._reading(apart.before, [names[i] for i in apart.takes])
        return _Graph(
            max(before.peak_bytes, before.result_bytes + tiles.peak),
            before.seconds + reading + tiles.seconds,
            tiles.tile_seconds,
        )

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
