"""What all tiles of a stage read alike, made once before the first of them.

    for each tile: stage(rows, packed)  ->  made = before(packed); for each tile: stage(rows, packed, made)

A stage in tiles dequantises its 4-bit weights, and casts what else its products read, in every tile: a sixth
of a millisecond each time that a layer of 8B runs. Made before the tiles, all weights of a stage are there at
once until the last tile has run, 0.4 GiB of 8B. The graph is parted after it was traced; what its products
read are the same numbers either way.

Left in the tiles: what a compiler would compute together with the rows that read it, and so might round
elsewhere; what is drawn; what is written in place; what no product and no op of ours reads.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from rewriter.memory.at_once import AtOnceUncompiled, CompileGraph
from rewriter.memory.operations import (
    arguments_of,
    flops_of,
    is_compiled,
    is_view,
    readers_of,
    source_of,
    written_by,
)
from rewriter.memory.randomness import is_random


@dataclass(frozen=True, eq=False)
class Parted:
    """A stage's graph in two.

    Attributes:
        before: makes what the tiles read alike.
        takes: the places, among the graph's arguments, of those of ``before``.
        tile: the graph without that, which is given it after its other arguments.
    """

    before: GraphModule
    takes: tuple[int, ...]
    tile: GraphModule

    def compiled(self, compile_graph: CompileGraph, inputs: Sequence[Any], mode: Any) -> "PartedCode":
        """Both compiled; ``inputs``: fake ones of the graph, of ``mode``.

        Raises:
            AtOnceUncompiled: one of them cannot be.
        """
        made = [n.meta["val"] for n in _results(self.before)]
        try:
            before = compile_graph(self.before, [inputs[i] for i in self.takes], mode)
            return PartedCode(before, self.takes, compile_graph(self.tile, [*inputs, *made], mode))
        except Exception as error:
            raise AtOnceUncompiled(self, error) from error


@dataclass(frozen=True, eq=False)
class PartedCode:
    """The same, compiled; called with the graph's arguments as the graph is."""

    before: Callable
    takes: tuple[int, ...]
    tile: Callable

    def __call__(self, *values: Any) -> Any:
        return self.begun(values)(*values)

    def begun(self, values: Sequence[Any]) -> Callable:
        """Takes a tile of ``values``; what it holds of them goes with it."""
        made = self.before(*(values[i] for i in self.takes))
        return lambda *given: self.tile(*given, *made)


def begun(code: Callable, values: Sequence[Any]) -> Callable:
    """``code`` for tiles of ``values``."""
    return code.begun(values) if isinstance(code, PartedCode) else code


def parted(module: GraphModule, tiled: Sequence[bool]) -> Parted | None:
    """``module`` in two; None where its tiles make nothing alike.

    Args:
        tiled: of each argument, whether tiles get a part of it.
    """
    alike = _alike(module, tiled)
    made = _made(module, alike)
    if not made:
        return None
    before, takes, place = _before(module, made)
    return Parted(before, takes, _tile(module, alike, made, place, _results(before)))


def _alike(module: GraphModule, tiled: Sequence[bool]) -> dict[Node, None]:
    """What is the same in every tile, in order."""
    nodes = module.graph.nodes
    written = {source_of(target) for node in nodes for target in written_by(node)}
    arguments = zip(module.graph.find_nodes(op="placeholder"), tiled, strict=True)
    given = {n for n, parts in arguments if not parts and isinstance(n.meta.get("val"), Tensor)}
    found: dict[Node, None] = {}
    for node in nodes:
        computed = node.op in ("call_function", "get_attr") and not is_random(node)
        same = node in given or (computed and all(n in found for n in node.all_input_nodes))
        if same and source_of(node) not in written and not written_by(node):
            found[node] = None
    return found


def _made(module: GraphModule, alike: dict[Node, None]) -> list[Node]:
    """Of ``alike``, what is made once: what kernels read that no compiler writes."""
    # What a compiler may compute in the kernel of its reader, and then would not round.
    fused: set[Node] = set()
    found = []
    for node in reversed(alike):
        others = [n for n in readers_of(node) if n not in alike]
        through = (n for n in readers_of(node) if n in fused and not _stands_alone(n))
        if not all(map(_stands_alone, others)) or any(through):
            fused.add(node)
        if node.op != "call_function" or is_view(node) or not isinstance(node.meta.get("val"), Tensor):
            continue
        returned = any(n.op == "output" for n in others)
        if any(map(_stands_alone, others)) and not returned and (node not in fused or _stands_alone(node)):
            found.append(node)
    return found[::-1]


def _stands_alone(node: Node) -> bool:
    """Whether it reads and writes memory: an op of ours, or a product."""
    return node.op == "call_function" and (not is_compiled(node) or flops_of(node) > 0)


def _before(
    module: GraphModule, made: Sequence[Node]
) -> tuple[GraphModule, tuple[int, ...], dict[Node, int]]:
    """The graph that makes ``made``, the arguments that it takes, and which of its results each is."""
    needed, waiting = set(made), list(made)
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in needed]
        needed.update(new)
        waiting += new
    graph, env, same = Graph(), {}, {}
    arguments = module.graph.find_nodes(op="placeholder")
    for node in module.graph.nodes:
        if node not in needed:
            continue
        copy = graph.node_copy(node, env.__getitem__)
        env[node] = copy if node.op == "placeholder" else same.setdefault(_what(copy), copy)
        if env[node] is not copy:
            graph.erase_node(copy)
    results = list(dict.fromkeys(env[node] for node in made))
    graph.output(tuple(results))
    takes = tuple(i for i, node in enumerate(arguments) if node in needed)
    return GraphModule(module, graph), takes, {node: results.index(env[node]) for node in made}


def _what(node: Node) -> tuple[Any, ...]:
    """What it computes. A forward and a backward that are to keep a weight apart number its uses."""
    said = itertools.zip_longest(node.args, (argument.name for argument in arguments_of(node)))
    args = tuple(given for given, name in said if name != "use")
    return node.op, node.target, repr(args), repr(node.kwargs)


def _tile(
    module: GraphModule,
    alike: dict[Node, None],
    made: Sequence[Node],
    place: dict[Node, int],
    results: Sequence[Node],
) -> GraphModule:
    """``module`` that is given ``results`` in the place of what it would make."""
    graph, env = Graph(), {}
    arguments = module.graph.find_nodes(op="placeholder")
    for node in arguments:
        env[node] = graph.node_copy(node)
    given = []
    for number, result in enumerate(results):
        given.append(graph.placeholder(f"made_{number}"))
        given[-1].meta = dict(result.meta)
    env |= {node: given[place[node]] for node in made}
    for node in module.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    for node in reversed(alike):
        copy = env[node]
        # What checks something is there for nobody who reads it.
        if copy.op != "placeholder" and not copy.users and not copy.is_impure():
            graph.erase_node(copy)
    return GraphModule(module, graph)


def _results(module: GraphModule) -> list[Node]:
    (output,) = module.graph.find_nodes(op="output")
    return list(output.args[0])
