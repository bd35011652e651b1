"""Where a graph is narrow: the operations that every way to its last result goes through.

A decoder is a chain of blocks around a residual stream, and each sum into that stream is such a waist: all
paths from the embedding to the loss meet there, while nothing meets inside attention or an MLP, which the
residual goes round. So the waists cut a program into its blocks without knowing what a block is. They are the
post-dominators of the graph's beginning (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm").

Results of a tuple, and what else cannot pass a border between compiled graphs, stay with what makes them: the
elements here are units, an operation with those.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch.fx import Graph, Node

from rewriter.canonical import value_of
from rewriter.effects import is_mode_switch
from rewriter.nested import subgraph

_CROSSES = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


@dataclass(frozen=True)
class Units:
    """A graph's operations, in order, each with the nodes that may not be parted from it.

    Attributes:
        unit: a node's unit, named by its first node. Placeholders and attributes belong to none.
        members: of each unit, in the graph's order; units in the graph's order.
        flow: edges from each unit to those that read it.
    """

    unit: dict[Node, Node]
    members: dict[Node, list[Node]]
    flow: nx.DiGraph

    @classmethod
    def of(cls, graph: Graph) -> "Units":
        groups: nx.utils.UnionFind = nx.utils.UnionFind()
        body = [n for n in graph.nodes if is_operation(n)]
        for node in body:
            for source in node.all_input_nodes:
                if is_operation(source) and not crosses(source):
                    groups.union(source, node)
        first: dict[Node, Node] = {}
        unit, members = {}, {}
        for node in body:
            head = first.setdefault(groups[node], node)
            unit[node] = head
            members.setdefault(head, []).append(node)
        flow = nx.DiGraph()
        flow.add_nodes_from(members)
        edges = ((unit[s], unit[n]) for n in body for s in n.all_input_nodes if s in unit)
        flow.add_edges_from((source, reader) for source, reader in edges if source is not reader)
        return cls(unit, members, flow)


def is_operation(node: Node) -> bool:
    """Whether ``node`` computes: no input, attribute, output, nor switch of grad mode or autocast."""
    return node.op in ("call_function", "call_method", "call_module") and not is_mode_switch(node)


def operations(node: Node) -> int:
    """How many operations ``node`` stands for: more than one where it runs graphs of its own."""
    bodies = [body for source in node.all_input_nodes if (body := subgraph(source)) is not None]
    return 1 + sum(operations(inner) for body in bodies for inner in body.graph.nodes)


def crosses(node: Node) -> bool:
    """Whether the node's value can go from one compiled graph to another."""
    return isinstance(value_of(node), _CROSSES)


def waists(units: Units, results: Sequence[Node]) -> list[Node]:
    """The units that all paths from the graph's beginning to its deepest result go through, in order.

    Args:
        results: the graph's outputs. Those that leave on the way, as keys and values do, do not widen it.

    Returns:
        of all chains of such units, one from each operation on, that which cuts the work into most parts.
    """
    ends = {units.unit[r] for r in results if r in units.unit}
    if not ends or not nx.is_directed_acyclic_graph(units.flow):
        return []
    depth: dict[Node, int] = {}
    for unit in nx.topological_sort(units.flow):
        depth[unit] = 1 + max((depth[p] for p in units.flow.predecessors(unit)), default=0)
    order = {unit: i for i, unit in enumerate(units.members)}
    end = max(ends, key=lambda u: (depth[u], order[u]))
    after = dict(nx.immediate_dominators(units.flow.reverse(copy=False), end))
    above = _ancestors(units)
    work = _work(units, above)
    # Many parts count, and large ones more: the positions' chain is long, but all layers are one part.
    parts = {end: 0.0}
    for unit in sorted(after, key=depth.__getitem__, reverse=True):
        if unit is not end:
            parts[unit] = parts[after[unit]] + math.sqrt(work[after[unit]] - work[unit])
    chain = [max(parts, key=lambda u: (parts[u] + math.sqrt(work[u]), -order[u]))]
    while chain[-1] is not end:
        chain.append(after[chain[-1]])
    return _without_branch(units, above, chain)


def _ancestors(units: Units) -> dict[Node, int]:
    """Each unit and all that it depends on, as bits in the order of the units."""
    bit = {unit: 1 << i for i, unit in enumerate(units.members)}
    above: dict[Node, int] = {}
    for unit in nx.topological_sort(units.flow):
        above[unit] = bit[unit]
        for source in units.flow.predecessors(unit):
            above[unit] |= above[source]
    return above


def _work(units: Units, above: Mapping[Node, int]) -> dict[Node, int]:
    """The number of operations of each unit and all that it depends on."""
    of_size: dict[int, int] = {}
    for i, members in enumerate(units.members.values()):
        size = sum(map(operations, members))
        of_size[size] = of_size.get(size, 0) | 1 << i
    return {
        unit: sum(size * (bits & mask).bit_count() for size, mask in of_size.items())
        for unit, bits in above.items()
    }


def _without_branch(units: Units, above: Mapping[Node, int], chain: list[Node]) -> list[Node]:
    """The chain from where nothing goes round it.

    It may begin inside a branch of the first layer, whose operations all lie on the way from there on. Values
    that pass the middle of the program, as cosines do, are for all layers, and may pass anywhere.
    """
    bit = {unit: 1 << i for i, unit in enumerate(units.members)}

    def passing(waist: Node, allowed: int) -> list[Node]:
        around = above[waist] & ~bit[waist] & ~allowed
        nodes = (u for u, b in bit.items() if b & around)
        return [
            u for u in nodes if any(not bit[r] & above[waist] for r in units.flow.successors(u) if r in read)
        ]

    read = {unit for unit in units.members if above[chain[-1]] & bit[unit]}
    shared = 0
    middle = next(w for w in chain if 2 * above[w].bit_count() >= above[chain[-1]].bit_count())
    for unit in passing(middle, 0):
        shared |= above[unit]
    # What only leads into the branch is alone; from the first layer on, one waist follows another.
    narrow = [not passing(waist, shared) for waist in chain]
    begin = next((i for i, pair in enumerate(pairwise(narrow)) if all(pair)), len(chain) - 1)
    return chain[begin:]
