"""What a graph computes, as hashes: equal for graphs that differ in names and in free order alone."""

import hashlib

import torch
from torch.fx import Graph, Node

from rewriter.effects import Effects, is_mode_switch, mutated_argument
from rewriter.nested import subgraph
from rewriter.regions.invariants import is_random
from rewriter.regions.signature import argument, structure, target


def dataflow(graph: Graph) -> str:
    """The hash of the graph's results, inputs by name; of what writes or draws random numbers, in order.

    Every operation is hashed with the grad mode and the autocast that it runs under.
    """
    effects = Effects.of(graph, torch.is_grad_enabled())
    known: dict[Node, str] = {}
    ordered: list[str] = []

    for node in graph.nodes:
        body = subgraph(node)
        if node.op == "placeholder":
            known[node] = f"input {node.target}"
        elif body is not None:
            known[node] = f"graph {structure(list(body.graph.nodes))}"
        elif node.op == "get_attr":
            known[node] = f"attribute {node.target}"
        elif is_mode_switch(node):
            known[node] = ""
        else:
            parts = [
                node.op,
                target(node.target),
                *(argument(a, known.__getitem__) for a in (node.args, node.kwargs)),
            ]
            if node.op != "output":
                parts.append(str(effects.mode[node]))
            if is_random(node) or mutated_argument(node) is not None:
                parts.append(f"number {len(ordered)}")
                ordered.append(" ".join(parts))
            known[node] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    (output,) = graph.find_nodes(op="output")
    return "\n".join([known[output], *ordered])
