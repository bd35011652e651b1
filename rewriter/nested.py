"""Graphs, and graphs inside them: which there are, which of them passes rewrite, sizes and copies.

Dynamo nests a graph for each activation checkpoint and one or two for each custom autograd function. Passes
rewrite the bodies of checkpoints alone; the rest, 640 graphs for 32 layers in 4 bits, are shared by all
copies.
"""

import copy
import itertools
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule


def subgraph(node: Any) -> GraphModule | None:
    """The graph module that a ``get_attr`` node names, or None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    module = getattr(node.graph.owning_module, str(node.target), None)
    return module if isinstance(module, GraphModule) else None


def checkpoint_body(node: Node) -> GraphModule | None:
    """The graph that ``node`` runs as an activation checkpoint, or None where it does not."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "tag_activation_checkpoint":
        return None
    return subgraph(node.args[0])


def count_operations(module: GraphModule) -> int:
    """How many there are in ``module`` itself; a nested graph counts as its one call."""
    return sum(n.op in ("call_function", "call_method") for n in module.graph.nodes)


def graphs_of(module: GraphModule) -> list[GraphModule]:
    """``module`` and the bodies of the activation checkpoints in it: all the graphs that passes rewrite."""
    bodies = map(checkpoint_body, module.graph.nodes)
    nested = [graphs_of(body) for body in bodies if body is not None]
    return [module, *itertools.chain.from_iterable(nested)]


def duplicate(module: GraphModule, *, whole: bool = False) -> GraphModule:
    """A copy whose graphs can be changed: parameters and values are shared.

    Its code is made when it is first run, so that graphs that are only lowered never pay for it.

    Args:
        whole: copy every nested graph, not only those that passes rewrite.
    """
    graph = Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    output.meta = copy.copy(next(iter(module.graph.find_nodes(op="output"))).meta)
    bodies = {id(body) for node in module.graph.nodes if (body := checkpoint_body(node)) is not None}
    attributes: dict[str, Any] = {}
    for name in dict.fromkeys(str(n.target) for n in module.graph.find_nodes(op="get_attr")):
        value = _attribute(module, name)
        copied = isinstance(value, GraphModule) and (whole or id(value) in bodies)
        attributes[name] = duplicate(value, whole=whole) if copied else value
    clone = _LazyGraphModule(attributes, graph, type(module).__name__)
    clone.meta = dict(module.meta)
    return clone


def drop_unread_graphs(module: GraphModule) -> None:
    """Let go of nested graphs that no node names any more."""
    for part in graphs_of(module):
        named = {str(n.target).partition(".")[0] for n in part.graph.find_nodes(op="get_attr")}
        for name, child in list(part.named_children()):
            if name not in named and isinstance(child, GraphModule):
                delattr(part, name)


def _attribute(module: torch.nn.Module, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module
