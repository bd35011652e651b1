"""Runs a region by its stages: whole, or the row-wise ones tile by tile, as plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node, Tracer

from rewriter.canonical import value_of
from rewriter.memory.stages import Stage, stages
from rewriter.regions.program import Region, link
from tests.golden import trace
from tests.regions.outlined import Outlined


def in_stages(region: Region, tile: int | None = None) -> Callable:
    """A function like ``region.module``; row-wise stages run in tiles of ``tile`` tokens."""
    graph = region.module.graph
    (output,) = graph.find_nodes(op="output")
    parts = stages(region)

    def run(*values: Any) -> tuple:
        env = dict(zip(graph.find_nodes(op="placeholder"), values, strict=True))
        for stage in parts:
            inputs = [env[n] for n in stage.inputs]
            results = in_tiles(stage, inputs, tile) if tile and stage.row_wise else stage.module(*inputs)
            env.update(zip(stage.outputs, results, strict=True))
        return tuple(env[n] for n in output.args[0])

    return run


def in_tiles(stage: Stage, inputs: Sequence[Any], tile: int) -> list[torch.Tensor]:
    """The results of a row-wise stage, from one run a tile; the last tile may be shorter."""
    lengths = {x.shape[d] for x, d in zip(inputs, stage.rows_in, strict=True) if d is not None}
    (length,) = lengths
    tiles = []
    for start in range(0, length, tile):
        count = min(tile, length - start)
        pairs = zip(inputs, stage.rows_in, strict=True)
        tiles.append(stage.module(*(x if d is None else x.narrow(d, start, count) for x, d in pairs)))
    dims = [d for d in stage.rows_out if d is not None]
    return [torch.cat(parts, d) for parts, d in zip(zip(*tiles, strict=True), dims, strict=True)]


def program_in_stages(case: Outlined, tile: int | None = None) -> Callable:
    """The whole program, each region by its stages."""
    assert case.program is not None, case.reason
    return link(case.program, {region: in_stages(region, tile) for region in case.program.regions})


def traced(function: Callable, *inputs: Any, dynamic: bool = False) -> tuple[Region, dict[Node, Any]]:
    """What Dynamo makes of ``function(*inputs)`` as a region, and the values of its inputs."""
    module, values = trace(function, *inputs, dynamic=dynamic)
    placeholders = module.graph.find_nodes(op="placeholder")
    region = Region("test", module, tuple(value_of(n) for n in placeholders))
    return region, dict(zip(placeholders, values, strict=True))


def called(functions: Sequence[Callable], function: Callable, *inputs: Any) -> tuple[Region, dict[Node, Any]]:
    """``function(*inputs)`` as a region in which ``functions`` are calls, as the passes leave them.

    It must call them by names of its own module.
    """
    graph = Tracer(autowrap_functions=tuple(functions)).trace(function)
    (output,) = graph.find_nodes(op="output")
    output.args = ((output.args[0],),)
    module = GraphModule(torch.nn.Module(), graph)
    _Recording(module).run(*inputs)
    placeholders = graph.find_nodes(op="placeholder")
    return Region("test", module, tuple(inputs)), dict(zip(placeholders, inputs, strict=True))


class _Recording(Interpreter):
    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]
