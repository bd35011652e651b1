"""A region as traced stages: what a layer consists of, before it is known how it will run."""

import functools
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from sympy import Symbol
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.canonical import value_of
from rewriter.memory.at_once import AtOnce, CompileGraph, Once, compiled_graph
from rewriter.memory.fakes import dense_strides, is_dense, memory_order
from rewriter.memory.growth import AS_TRACED, Growth, SizesAt, whole
from rewriter.memory.layer import LayerStages
from rewriter.memory.operations import int_hint
from rewriter.memory.schedule import StageValues, Wiring
from rewriter.memory.stage_graphs import StageGraphs, Unstaged, stage_graphs
from rewriter.memory.stage_run import StageRun
from rewriter.memory.stages import Stage, stages
from rewriter.regions.program import Region


@dataclass(frozen=True, eq=False)
class LayerGraphs:
    """The stages of one region, traced, and the names of the values between them.

    Attributes:
        region: what they compute together.
        tokens: the length of the sequence, as expected where it varies.
        graphs: the stages.
        wiring: what passes between them.
        shared: inputs that live anyway.
    """

    region: Region
    tokens: int
    graphs: tuple[StageGraphs, ...]
    wiring: Wiring
    shared: frozenset[str]

    @property
    def own_inputs(self) -> tuple[str, ...]:
        """Inputs that nobody reads after the layer: made by the one before."""
        return tuple(name for name in self.wiring.inputs if name not in self.shared)

    @property
    def longest(self) -> int:
        """Tokens of a tile that its kernels were made for, at most."""
        return min(int_hint(graphs.fakes.tokens) for graphs in self.graphs)

    def tokens_of(self, growth: Growth) -> int:
        """Of a batch of that ``growth``, for each sequence of the traced one."""
        return whole(self.tokens * growth.tokens)

    def sizes(self, growth: Growth = AS_TRACED) -> dict[str, int]:
        """Bytes of every value, of a batch of that ``growth`` since it was traced."""
        nodes = {n.name: n for n in self.region.module.graph.nodes}
        inputs = zip(self.wiring.inputs, self.region.symbolic_inputs, strict=True)
        outside = SizesAt(growth, self.graphs[0].fakes.rows)
        found = {n: outside.bytes(x) for n, x in inputs}
        tokens = self.tokens_of(growth)
        for graphs, given in zip(self.graphs, self.wiring.gives, strict=True):
            at = graphs.fakes.sizes_at(tokens, growth)
            for name, value in zip(given, graphs.results, strict=True):
                size = outside.bytes(value_of(nodes[name])) if name in nodes else 0
                found[name] = size or at.bytes(value)
        return found

    @cached_property
    def saved_in_tiles(self) -> frozenset[str]:
        """What stages in tiles save for their own backward alone, tile by tile."""
        found: set[str] = set()
        for graphs, given in zip(self.graphs, self.wiring.gives, strict=True):
            count = len(graphs.signature.results)
            if graphs.stage.row_wise:
                rows = graphs.forward_rows[count:]
                found.update(n for n, row in zip(given[count:], rows, strict=True) if row is not None)
        return frozenset(found)

    def label(self, name: str) -> str:
        """What a value is, for people: by the whole stage, as attention, that makes it or is next to it."""
        if name in self.wiring.inputs:
            return "its input"
        place = next(i for i, given in enumerate(self.wiring.gives) if name in given)
        whole = {i: _operation(g.stage) for i, g in enumerate(self.graphs) if not g.stage.row_wise}
        if place in whole:
            return f"results of {whole[place]}"
        if after := [i for i in whole if i > place]:
            return f"what is before {whole[after[0]]}"
        return f"what is after {whole[max(whole)]}" if whole else "what is inside"

    @property
    def titles(self) -> tuple[str, ...]:
        """A name for each stage, for people: a whole one's operation, others by where they are."""
        return tuple(
            f"stage_{i + 1}" if g.stage.row_wise else _operation(g.stage).replace(" ", "_")
            for i, g in enumerate(self.graphs)
        )

    def values(self) -> tuple[StageValues, ...]:
        """What each stage reads and gives, without what is shared."""
        found = []
        for index, graphs in enumerate(self.graphs):
            needs = graphs.signature.needs
            reads = tuple(dict.fromkeys(n for n in self.wiring.takes[index] if n not in self.shared))
            back = tuple(dict.fromkeys(n for n in self.wiring.reads_back[index] if n not in self.shared))
            wanted = dict(zip(self.wiring.takes[index], needs, strict=True))
            gradients = tuple(n for n in reads if wanted[n])
            found.append(StageValues(f"stage {index + 1}", reads, self.wiring.gives[index], back, gradients))
        return tuple(found)

    def at_once(self, direction: str, place: int) -> AtOnce | None:
        """What may take the place of a stage's graph, of its "run" or its "backward"."""
        graphs = self.graphs[place]
        if direction == "run":
            return graphs.forward_parted
        return graphs.backward_parted or graphs.backward_with_heads_at_once

    def compiled(self, compile_graph: CompileGraph, once: Once = frozenset()) -> LayerStages:
        """Compile every stage, those of ``once`` by what takes the place of their graph.

        Raises:
            AtOnceUncompiled: one of these cannot be compiled.
        """
        runs = []
        for index, graphs in enumerate(self.graphs):
            compiled = functools.partial(compiled_graph, compile_graph, graphs.fakes.mode)
            other = self.at_once("run", index) if ("run", index) in once else None
            forward, backward = compiled(graphs.forward, graphs.forward_inputs(), other), None
            if graphs.backward is not None:
                other = self.at_once("backward", index) if ("backward", index) in once else None
                backward = compiled(graphs.backward, graphs.backward_inputs(), other)
            runs.append(StageRun(graphs, forward, backward))
        return LayerStages(tuple(runs), self.wiring)


# Longer tiles do not run faster, and kernels that index what is past 2^31 elements in 64 bits run slower.
LONGEST_TILE = 32768


def layer_graphs(
    region: Region,
    shared: frozenset[int],
    *,
    saving: bool = False,
    silent: frozenset[str] = frozenset(),
    reach: float = 1.0,
    rows: Set[Symbol] = frozenset(),
) -> LayerGraphs:
    """Part ``region`` into stages and trace each.

    Args:
        shared: places of the inputs that live anyway.
        saving: row-wise stages save the results of their products.
        reach: how many times as long as the one at hand sequences may be.
        silent: values between stages that get no gradient, though they could have one; found here.
        rows: symbols that count sequences.

    Raises:
        Unstaged: it cannot run in stages.
    """
    traced, parts = _Traced(region), stages(region)
    tokens = _tokens(parts)
    most = longest_tile(ceil(tokens * reach))
    for stage in parts:
        traced.add(stage, most, saving=saving, silent=silent, rows=rows)
    outputs = _outputs(region)
    if unanswered := traced.unanswered().difference(outputs):
        silent |= unanswered
        return layer_graphs(region, shared, saving=saving, silent=silent, reach=reach, rows=rows)
    living = frozenset(name for i, name in enumerate(traced.inputs) if i in shared)
    return LayerGraphs(region, tokens, tuple(traced.graphs), traced.wiring(outputs), living)


class _Traced:
    """The stages of a region that are traced so far, and what passes between them, by name."""

    def __init__(self, region: Region):
        self.inputs = tuple(n.name for n in region.module.graph.find_nodes(op="placeholder"))
        self.graphs: list[StageGraphs] = []
        self._takes: list[tuple[str, ...]] = []
        self._gives: list[tuple[str, ...]] = []
        self._reads_back: list[tuple[str, ...]] = []
        # Of each value: what it is like in the whole region, and whether it gets a gradient.
        self._fakes = dict(zip(self.inputs, region.symbolic_inputs, strict=True))
        given = zip(self.inputs, region.inputs, strict=True)
        self._needs = {n: isinstance(x, Tensor) and x.requires_grad for n, x in given}

    def add(
        self, stage: Stage, most: int, *, saving: bool, silent: frozenset[str], rows: Set[Symbol]
    ) -> None:
        """Trace ``stage``, the next one, for tiles of at most ``most`` tokens, as ``layer_graphs`` says."""
        names, results = [n.name for n in stage.inputs], [n.name for n in stage.outputs]
        values, wanted = [self._fakes[n] for n in names], [self._needs[n] for n in names]
        graphs = stage_graphs(stage, values, wanted, most, saving=saving, silent=silent, rows=rows)
        if aliased := [n for n in results if n in self._fakes]:
            raise Unstaged(f"`{aliased[0]}` is handed through")
        tiled = zip(results, stage.rows_out, strict=True)
        if stage.row_wise and (untiled := [n for n, dim in tiled if dim is None]):
            raise Unstaged(f"`{untiled[0]}` of a stage that runs in tiles does not depend on tokens")
        # As the whole region has them: a stage's own fakes have a tile's length.
        for node, has in zip(stage.outputs, graphs.signature.differentiable, strict=True):
            self._fakes[node.name] = _without_gaps(value_of(node))
            self._needs[node.name] = has
        number = len(self.graphs) + 1
        extras = [f"saved_{number}_{i}" for i in range(graphs.saved.extras if graphs.saved else 0)]
        self.graphs.append(graphs)
        self._takes.append(tuple(names))
        self._gives.append((*results, *extras))
        self._reads_back.append(_reads_back(graphs, names, results, extras))

    def unanswered(self) -> frozenset[str]:
        """Values between stages that could have a gradient, and that no stage's backward makes one of."""
        taken = zip(self.graphs, self._takes, strict=True)
        given = zip(self.graphs, self._gives, strict=True)
        answered = {name for graphs, names in taken for name in _answered(graphs, names)}
        return frozenset(n for graphs, names in given for n in _differentiable(graphs, names)) - answered

    def wiring(self, outputs: tuple[str, ...]) -> Wiring:
        """Of all stages, the region's results being ``outputs``."""
        trained = frozenset(n for n in outputs if self._needs[n])
        between = tuple(self._takes), tuple(self._gives), tuple(self._reads_back)
        return Wiring(*between, self.inputs, outputs, trained)


def _outputs(region: Region) -> tuple[str, ...]:
    """The names of its results.

    Raises:
        Unstaged: one of them is an input, or part of a larger tensor.
    """
    (output,) = region.module.graph.find_nodes(op="output")
    results = output.args[0]
    if given := [n.name for n in results if n.op == "placeholder"]:
        raise Unstaged(f"its input `{given[0]}` is also its result")
    values = {n.name: value_of(n) for n in results}
    if gaps := [name for name, x in values.items() if isinstance(x, Tensor) and not is_dense(x)]:
        raise Unstaged(f"its result `{gaps[0]}` is part of a larger tensor")
    return tuple(n.name for n in results)


def _without_gaps(value: Any) -> Any:
    """What a stage makes of ``value``, in its own fake mode."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        strides = dense_strides(value.shape, memory_order(value))
        return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)


def _differentiable(graphs: StageGraphs, gives: Sequence[str]) -> list[str]:
    return [n for n, has in zip(gives, graphs.signature.differentiable, strict=False) if has]


def _answered(graphs: StageGraphs, takes: Sequence[str]) -> list[str]:
    """The inputs that the stage's backward makes a gradient of."""
    if graphs.backward is None:
        return []
    (output,) = graphs.backward.graph.find_nodes(op="output")
    wanted = [n for n, need in zip(takes, graphs.signature.needs, strict=True) if need]
    return [n for n, made in zip(wanted, output.args[0], strict=True) if made is not None]


def _operation(stage: Stage) -> str:
    """What a whole stage is whole for: the first name in its reason."""
    quoted = stage.reason.split("`")
    return re.sub(r"_\d+$", "", quoted[1]) if len(quoted) > 1 else "the rest"


def longest_tile(tokens: int) -> int:
    """Of a sequence of ``tokens``: all of it, unless it is very long."""
    return tokens if tokens <= 2 * LONGEST_TILE else LONGEST_TILE


def _tokens(parts: Sequence[Stage]) -> int:
    for stage in parts:
        for node, rows in zip(stage.inputs, stage.rows_in, strict=True):
            if rows is not None:
                return int_hint(value_of(node).shape[rows])
    raise Unstaged("none of it works token by token")


def _reads_back(
    graphs: StageGraphs, names: list[str], results: list[str], extras: list[str]
) -> tuple[str, ...]:
    if graphs.backward is None:
        return ()
    if graphs.saved is None:
        return tuple(names)
    saved = graphs.saved
    return (*(names[i] for i in saved.inputs), *(results[i] for i in saved.results), *extras)
