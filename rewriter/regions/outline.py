"""Outlines the repeated parts of a graph: one long graph to a short program of regions.

    embedding, 32 layers of 40 operations, loss   ->   beginning, layer_a × 32, end

Each kind of layer is compiled once, however many there are, so that the time to compile hardly depends on the
depth. A layer's weights, and what all layers share, become arguments. Two layers are of one kind where their
operations, constants, shapes, and the layout and need of a gradient of every input are equal: layer 0, whose
frozen, quantised projections need no gradient of their input, is a kind of its own.

A graph without repetition stays one. Refused with a reason, and left as one graph: a tensor written in place
after another region has made or read it; a result of unknown size that one region makes and another
needs.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from rewriter.canonical import value_of
from rewriter.effects import Effects
from rewriter.nested import duplicate, subgraph
from rewriter.regions.blocks import Block, blocks, levels
from rewriter.regions.equal_numbers import hold_equal_numbers
from rewriter.regions.invariants import share_invariants, share_masks, varying
from rewriter.regions.modes import ModeSwitches
from rewriter.regions.names import region_names
from rewriter.regions.program import Program, Region, RegionCall
from rewriter.regions.signature import input_key, signature
from rewriter.regions.waists import Units, is_operation, waists


class Unsplittable(Exception):
    """Why a graph stays one: a reason for the report, not a failure."""


def outline(module: GraphModule, example_inputs: Sequence[Any]) -> Program | None:
    """The program of ``module``'s regions, or None where nothing repeats; ``module`` is left as it was.

    Args:
        example_inputs: fake tensors and sizes, one a placeholder, with the layouts that the inputs will have.

    Raises:
        Unsplittable: it repeats, but to part it would not be sound.
    """
    source = duplicate(module)
    graph = source.graph
    effects = Effects.of(graph, torch.is_grad_enabled())
    _complete_tuples(graph, effects)
    units = Units.of(graph)
    chain = waists(units, _results(graph))
    if not chain:
        return None
    hold_equal_numbers(graph)
    moving = varying(graph, chain[0])
    level = levels(units, chain, moving)
    share_invariants(graph, moving, {node: level[unit] for node, unit in units.unit.items()}, effects)
    share_masks(graph, moving, effects)
    parts = blocks(graph, Units.of(graph), chain, moving)
    if not parts:
        return None
    _refuse_writes_across(parts, effects)
    examples = dict(zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    return _Outliner(source, effects, _fake_mode(graph, example_inputs), examples).program(parts)


def _fake_mode(graph: Graph, example_inputs: Sequence[Any]) -> FakeTensorMode:
    """The mode that lowering will use, not Dynamo's own; the graph's where it is not being compiled."""
    values = [value_of(n) for n in graph.nodes]
    mode = detect_fake_mode(example_inputs) or detect_fake_mode(values)
    if mode is None:
        raise Unsplittable("nothing is known of its values")
    return mode


def _complete_tuples(graph: Graph, effects: Effects) -> None:
    """Read every element of every tuple, in order: a result that one layer leaves unread then matters not."""
    for node in list(graph.nodes):
        values = value_of(node)
        if not is_operation(node) or not isinstance(values, (tuple, list)) or not node.users:
            continue
        readers = {u.args[1]: u for u in reversed(node.users) if u.target is operator.getitem}
        if len(readers) < len(node.users):
            continue
        for index in reversed(range(len(values))):
            if index in readers:
                node.append(readers[index])
                continue
            with graph.inserting_after(node):
                item = graph.call_function(operator.getitem, (node, index))
            item.meta["example_value"] = values[index]
            effects.position[item], effects.mode[item] = effects.position[node], effects.mode[node]


def _results(graph: Graph) -> list[Node]:
    (output,) = graph.find_nodes(op="output")
    return output.all_input_nodes


def _refuse_writes_across(parts: Sequence[Block], effects: Effects) -> None:
    """A tensor may be written in one part, and read there and later, in the order that the graph has."""
    place = {node: (i, k) for i, part in enumerate(parts) for k, node in enumerate(part.nodes)}
    for storage, writes in effects.writes.items():
        sharing = effects.sharing[storage]
        touching = {n for n in (*sharing, *(user for node in sharing for user in node.users)) if n in place}
        for write in writes:
            home, _ = place[write]
            for node in touching:
                kept = (place[node] < place[write]) == (effects.position[node] < effects.position[write])
                if place[node][0] < home or (node in writes and place[node][0] != home) or not kept:
                    raise Unsplittable(f"`{write.name}` writes in place into what other parts of it read")


@dataclass
class _Outliner:
    """Builds the regions in order, knowing at each what its inputs will look like.

    A fake tensor is costly, and a model has a thousand weights: those that look alike share one while calls
    are told apart (``_like``), and only what is compiled has its own (``_fake``).
    """

    source: GraphModule
    effects: Effects
    fake_mode: FakeTensorMode
    examples: dict[Node, Any]
    fakes: dict[Node, Any] = field(default_factory=dict)
    alike: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, tuple[Region, tuple[Any, ...]]] = field(default_factory=dict)

    def program(self, parts: Sequence[Block]) -> Program:
        results = _results_by_kind(parts)
        drafts = [self._draft(part, results[part.kind]) for part in parts]
        names = region_names([key for key, *_ in drafts], {n.name for n in self.source.graph.nodes})
        regions = {
            key: Region(names[key], region.module, region.inputs) for key, (region, _) in self.regions.items()
        }
        calls = tuple(RegionCall(regions[key], inputs, outputs) for key, inputs, outputs in drafts)
        return Program(self.source, calls)

    def _draft(self, part: Block, results: Sequence[int]) -> tuple[str, tuple[Node, ...], tuple[Node, ...]]:
        nodes = self._with_scalars(part.nodes)
        inside = set(nodes)
        inputs = self._inputs(nodes, inside)
        outputs = tuple(part.nodes[i] for i in results)
        module = self._build(nodes, inputs, outputs)
        key = signature(module)
        if key not in self.regions:
            self.regions[key] = self._region(module, inputs)
        for node, value in zip(outputs, self.regions[key][1], strict=True):
            self.fakes[node] = value
        return key, inputs, outputs

    def _region(self, module: GraphModule, inputs: Sequence[Node]) -> tuple[Region, tuple[Any, ...]]:
        """What is compiled, by the inputs of its first call, and what it will return."""
        fakes = tuple(map(self._fake, inputs))
        for placeholder, fake in zip(module.graph.find_nodes(op="placeholder"), fakes, strict=True):
            placeholder.meta["example_value"] = fake
        given = tuple(self.examples.get(n, fake) for n, fake in zip(inputs, fakes, strict=True))
        return Region("", module, given), self._predicted(module, fakes)

    def _with_scalars(self, nodes: Sequence[Node]) -> list[Node]:
        """``nodes`` and, in front, the numbers and graphs that they read, which cannot cross a border."""
        inside, more = set(nodes), []
        waiting = [s for n in nodes for s in n.all_input_nodes]
        while waiting:
            node = waiting.pop()
            copied = is_operation(node) and isinstance(value_of(node), (SymFloat, SymBool, float, bool))
            if node in inside or not (copied or _is_body(node)):
                continue
            inside.add(node)
            more.append(node)
            waiting += node.all_input_nodes
        return [*sorted(more, key=self.effects.position.__getitem__), *nodes]

    def _inputs(self, nodes: Sequence[Node], inside: set[Node]) -> tuple[Node, ...]:
        found = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside)
        for name in sorted({name for n in found for name in _symbols(self._like(n))}):
            if name not in self.sizes:
                raise Unsplittable(f"the size {name} is known in one part of it only")
            found[self.sizes[name]] = None
        # Sizes first, in an order that does not depend on who reads them.
        numbers = [n for n in found if not isinstance(self._like(n), Tensor)]
        return (
            *sorted(numbers, key=lambda n: str(self._like(n))),
            *(n for n in found if isinstance(self._like(n), Tensor)),
        )

    @functools.cached_property
    def sizes(self) -> dict[str, Node]:
        """The inputs that are sizes, by what their size is called."""
        return {str(v.node.expr): n for n in self.examples if isinstance(v := value_of(n), SymInt)}

    def _like(self, node: Node) -> Any:
        """What compilation knows of a value, but for which tensor it is: those that look alike share one."""
        if node in self.fakes:
            return self.fakes[node]
        value = self._known(node)
        key = input_key(value)
        if key not in self.alike:
            self.alike[key] = self._border(value)
        return self.alike[key]

    def _fake(self, node: Node) -> Any:
        """What compilation knows of a value that is there before the region runs."""
        if node not in self.fakes:
            self.fakes[node] = self._border(self._known(node))
        return self.fakes[node]

    def _known(self, node: Node) -> Any:
        return getattr(self.source, str(node.target)) if node.op == "get_attr" else value_of(node)

    def _build(self, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
        graph = Graph()
        env: dict[Node, Node] = {}
        bodies: dict[str, Any] = {}
        for index, node in enumerate(inputs):
            env[node] = graph.placeholder(f"in_{index}")
            env[node].meta = {
                k: v for k, v in node.meta.items() if k == "tensor_dict" and node.op == "placeholder"
            }
            env[node].meta["example_value"] = self._like(node)
        switches = ModeSwitches(graph, self.effects.mode, torch.is_grad_enabled())
        for node in nodes:
            if node.op == "get_attr":
                name = f"body_{len(bodies)}"
                bodies[name] = getattr(self.source, str(node.target))
                env[node] = graph.get_attr(name)
                env[node].meta = dict(node.meta)
                continue
            switches.enter(node)
            env[node] = graph.node_copy(node, env.__getitem__)
        switches.leave()
        graph.output(tuple(env[n] for n in outputs))
        graph.lint()
        return GraphModule(bodies, graph)

    def _predicted(self, module: GraphModule, given: Iterable[Any]) -> tuple[Any, ...]:
        """What the region will return, as the compilation of the next regions sees it."""
        # Without the dispatcher, padding and the like read sizes in C++ and thereby fix them.
        with enable_python_dispatcher(), self.fake_mode:
            results = _Abstractly(module).run(*given)
        return tuple(map(self._border, results))

    def _border(self, value: Any) -> Any:
        """A fake tensor like ``value``, without its history."""
        if not isinstance(value, Tensor):
            return value
        with self.fake_mode, torch.no_grad():
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if isinstance(value, nn.Parameter):
            return nn.Parameter(made, value.requires_grad)
        return made.requires_grad_(value.requires_grad)


class _Abstractly(Interpreter):
    """Runs a graph on fake tensors, which do not know the numbers that they hold; tracing did."""

    def run_node(self, n: Node) -> Any:
        known = value_of(n)
        if n.op == "call_method" and n.target == "item" and isinstance(known, (SymFloat, float)):
            return known
        return super().run_node(n)


def _results_by_kind(parts: Sequence[Block]) -> dict[str, list[int]]:
    """Places of the nodes that other blocks read: for each kind, those that any of its blocks gives."""
    found: dict[str, set[int]] = {part.kind: set() for part in parts}
    for part in parts:
        inside = set(part.nodes)
        found[part.kind] |= {i for i, n in enumerate(part.nodes) if any(u not in inside for u in n.users)}
    return {kind: sorted(places) for kind, places in found.items()}


def _is_body(node: Node) -> bool:
    return node.op == "get_attr" and subgraph(node) is not None


def _symbols(value: Any) -> set[str]:
    sizes = (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, Tensor) else (value,)
    return {str(s) for size in sizes if isinstance(size, SymInt) for s in size.node.expr.free_symbols}
