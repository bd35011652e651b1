"""A program of regions: a short list of calls, most of the same few functions with other weights.

``Program`` says what is called with what. ``source_of`` writes it as Python, all arguments told, and ``link``
runs that once the regions are compiled; what a report shows is shorter (``describe.py``).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from rewriter.canonical import value_of


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a graph that is compiled once.

    Attributes:
        name: in the program's text, and no node's of the source graph.
        module: takes the region's inputs, sizes first, and returns a tuple.
        inputs: what its compilation goes by, one an input: fake tensors and sizes.
    """

    name: str
    module: GraphModule
    inputs: tuple[Any, ...]

    @property
    def symbolic_inputs(self) -> list[Any]:
        """``inputs`` with symbols for the sizes that vary: the graph's own inputs are there with numbers."""
        values = map(value_of, self.module.graph.find_nodes(op="placeholder"))
        return [given if value is None else value for value, given in zip(values, self.inputs, strict=True)]


@dataclass(frozen=True, eq=False)
class RegionCall:
    """One call of a region: the source graph's nodes that are its inputs and its results."""

    region: Region
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """``source``, a graph, as calls of regions.

    ``source`` is what the nodes of the calls belong to; its inputs and its output are the program's.
    """

    source: GraphModule
    calls: tuple[RegionCall, ...]

    @property
    def regions(self) -> list[Region]:
        """Each once, in the order of their first call."""
        return list(dict.fromkeys(call.region for call in self.calls))

    @property
    def ending(self) -> set[Region]:
        """Those with results that the program returns."""
        (output,) = self.source.graph.find_nodes(op="output")
        returned = set(output.all_input_nodes)
        return {call.region for call in self.calls if not returned.isdisjoint(call.outputs)}

    def times(self) -> dict[Region, int]:
        """How often each region is called."""
        return dict(Counter(call.region for call in self.calls))


def link(program: Program, compiled: Mapping[Region, Callable]) -> Callable:
    """The program as one function of the source graph's inputs; ``compiled`` runs its regions."""
    scope: dict[str, Any] = {region.name: function for region, function in compiled.items()}
    scope |= {n.name: getattr(program.source, str(n.target)) for n in tensors_of(program.source)}
    exec(compile(source_of(program), "<rewriter program>", "exec"), scope)
    return scope["program"]


def source_of(program: Program) -> str:
    """Python text of the program: each intermediate result is let go after its last use."""
    graph = program.source.graph
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    (output,) = graph.find_nodes(op="output")
    last: dict[Node, RegionCall] = {n: call for call in program.calls for n in call.inputs}
    made = {n for call in program.calls for n in call.outputs}
    kept = set(output.all_input_nodes)
    lines = ["def program(*inputs):"]
    if inputs:
        lines.append(f"    {_tuple(inputs)} = inputs")
    for call in program.calls:
        results = f"{_tuple([n.name for n in call.outputs])} = " if call.outputs else ""
        lines.append(f"    {results}{call.region.name}({', '.join(n.name for n in call.inputs)})")
        # A result that no later call reads is let go at once.
        spent = [n for n in (*call.inputs, *call.outputs) if n in made and n not in kept]
        dead = [n.name for n in spent if last.get(n, call) is call]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines.append(f"    return {_literal(output.args[0])}")
    return "\n".join(lines) + "\n"


def tensors_of(module: GraphModule) -> list[Node]:
    """The nodes that read the graph's own tensors."""
    return [
        n
        for n in module.graph.find_nodes(op="get_attr")
        if not isinstance(getattr(module, n.target, None), GraphModule)
    ]


def _tuple(names: list[str]) -> str:
    return "".join(f"{name}, " for name in names).rstrip() if len(names) == 1 else ", ".join(names)


def _literal(value: Any) -> str:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = "".join(f"{_literal(v)}, " for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_literal(v)}" for k, v in value.items()) + "}"
    return repr(value)
