"""Layers cut into stages by hand: what runs by a schedule is tested without what finds the stages."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, Proxy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import GraphAppendingTracer

from rewriter.memory.arena import HostArena
from rewriter.memory.fakes import dense_strides, is_dense, memory_order
from rewriter.memory.layer import LayerStages, ScheduledLayer
from rewriter.memory.layer_graphs import LayerGraphs, layer_graphs
from rewriter.memory.schedule import Fate, schedule
from rewriter.memory.stages import Stage
from rewriter.memory.transfer import Transfers
from rewriter.regions.program import Region
from tests.memory.late_copies import late_transfers


@dataclass(frozen=True)
class Piece:
    """A stage to be: a function of the values ``takes`` that returns the values ``gives``.

    ``rows``: of each of both that counts tokens, the dimension that does; none of a whole stage.
    """

    function: Callable
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    rows: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class SmallLayer:
    """Pieces, the layer's inputs by name, what it returns, and which inputs live anyway.

    ``saving``: row-wise stages save the results of their products.
    """

    pieces: tuple[Piece, ...]
    inputs: Mapping[str, Any]
    outputs: tuple[str, ...]
    shared: frozenset[str]
    saving: bool = False

    def with_inputs(self, **inputs: Any) -> "SmallLayer":
        return replace(self, inputs={**self.inputs, **inputs})

    @functools.cached_property
    def traced(self) -> tuple[Region, tuple[Stage, ...]]:
        graph = Graph()
        tracer = GraphAppendingTracer(graph)
        values = {name: Proxy(graph.placeholder(name), tracer) for name in self.inputs}
        for piece in self.pieces:
            results = piece.function(*(values[name] for name in piece.takes))
            for name, result in zip(piece.gives, results, strict=True):
                result.node._rename(name)
                assert result.node.name == name, f"{name} is the name of something else"
                values[name] = result
        graph.output(tuple(values[name].node for name in self.outputs))
        module = GraphModule(nn.Module(), graph)
        fakes = _fakes(self.inputs.values())
        _give_values(module, fakes)
        nodes = {name: value.node for name, value in values.items()}
        return Region("layer", module, tuple(fakes)), tuple(_stage(p, nodes) for p in self.pieces)

    @functools.cached_property
    def graphs(self) -> LayerGraphs:
        region, parts = self.traced
        names = list(self.inputs)
        with patch("rewriter.memory.layer_graphs.stages", lambda _: parts):
            shared = frozenset(names.index(name) for name in self.shared)
            return layer_graphs(region, shared, saving=self.saving)

    @functools.cached_property
    def compiled(self) -> LayerStages:
        """The layer's stages, run as PyTorch runs them, given what a compiler would have been promised."""
        return self.graphs.compiled(as_promised)

    def eager(self, inputs: Sequence[Any] | None = None) -> tuple:
        """The results of the layer in one."""
        return self.traced[0].module(*(self.inputs.values() if inputs is None else inputs))


def _fakes(inputs) -> list[Any]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for x in inputs:
        if not isinstance(x, Tensor):
            fakes.append(x)
            continue
        with mode, torch.no_grad():
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        fakes.append(fake.requires_grad_(x.requires_grad))
    return fakes


class _Values(Interpreter):
    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def _give_values(module: GraphModule, fakes: Sequence[Any]) -> None:
    mode = next(x.fake_mode for x in fakes if isinstance(x, Tensor))
    with mode, torch.enable_grad():
        _Values(module).run(*fakes)


def _stage(piece: Piece, nodes: Mapping[str, Node]) -> Stage:
    module = torch.fx.symbolic_trace(_star(piece.function, piece.takes))
    _give_values(module, [nodes[name].meta["example_value"] for name in piece.takes])
    inputs, outputs = [nodes[n] for n in piece.takes], [nodes[n] for n in piece.gives]
    rows = [[piece.rows.get(n) for n in names] for names in (piece.takes, piece.gives)]
    return Stage(module, tuple(inputs), tuple(outputs), tuple(rows[0]), tuple(rows[1]))


def _star(function: Callable, names: Sequence[str]) -> nn.Module:
    """A module whose ``forward`` has ``names`` for arguments."""

    scope = {"function": function}
    arguments = ", ".join(names)
    exec(f"def forward(self, {arguments}):\n    return tuple(function({arguments}))", scope)
    return type("Piece", (nn.Module,), {"forward": scope["forward"]})()


def as_promised(module: GraphModule, inputs: Sequence[Any], mode: Any) -> Callable:
    """``module``, given tensors in the memory order of the fake ``inputs`` alone, as Inductor checks."""

    def run(*values: Any) -> Any:
        for number, (value, fake) in enumerate(zip(values, inputs, strict=True)):
            if not isinstance(fake, Tensor):
                continue
            strides = fake.stride()
            if any(isinstance(s, SymInt) for s in (*fake.shape, *strides)):
                assert is_dense(fake), f"input {number} was promised to have gaps"
                strides = dense_strides(value.shape, memory_order(fake))
            told = zip(value.shape, value.stride(), strides, strict=True)
            same = all(size == 1 or stride == promised for size, stride, promised in told)
            assert same and value.dtype == fake.dtype, f"input {number}: {value.stride()}, not {strides}"
        return module.forward(*values)

    return run


def scheduled(
    layer: SmallLayer,
    fates: Mapping[str, Fate],
    tile: int | None = None,
    *,
    stages: LayerStages | None = None,
    transfers: Transfers | None = None,
    owns_gradient: bool = True,
) -> ScheduledLayer:
    """The layer under ``fates``; what is given up is filled with NaN."""
    graphs = layer.graphs
    plan = schedule(graphs.values(), graphs.own_inputs, graphs.wiring.outputs, fates)
    made = transfers or new_transfers()
    return ScheduledLayer(stages or layer.compiled, plan, tile, graphs.shared, lambda: made, owns_gradient)


def new_transfers() -> Transfers:
    return late_transfers(HostArena(64 << 20, pin=False, growth=1 << 20))


def every_fate(layer: SmallLayer) -> Iterator[dict[str, Fate]]:
    """A fate for the layer's own inputs, and one for the results of each stage."""
    graphs = layer.graphs
    groups = [(graphs.own_inputs, ("keep", "offload"))]
    read = {name for stage in graphs.values() for name in stage.backward_reads}
    given = [stage.gives for stage in graphs.values() if read.intersection(stage.gives)]
    groups += [(names, ("keep", "offload", "recompute")) for names in given]
    for fates in itertools.product(*(choices for _, choices in groups)):
        yield {name: fate for (names, _), fate in zip(groups, fates, strict=True) for name in names}
