"""Sizes that a graph computes with, read off the shapes of its arguments.

A partitioner saves sizes as it saves tensors, and make_fx asks them of whatever tensor is at hand; neither is
wanted of a graph whose arguments are tensors, and all that it computes is read.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node

from rewriter.memory.in_place import Inseparable


def read_sizes_off_inputs(module: GraphModule) -> None:
    """A size that is asked of a product would keep it computed where nothing else reads it."""
    inputs = module.graph.find_nodes(op="placeholder")
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        size = node.meta["val"]
        if node.args[0] in inputs or not isinstance(size, SymInt):
            continue
        found = sized(size, inputs)
        if found is not None:
            node.args = found
            inputs[-1].append(node)


def with_arguments(module: GraphModule, arguments: Sequence[Node], sizes: Sequence[Node]) -> GraphModule:
    """``module`` with its placeholders in the order of ``arguments``; ``sizes`` are read off their shapes."""
    graph = Graph()
    env = {node: graph.node_copy(node) for node in arguments}
    for node in sizes:
        tensor, dim = _where(node.meta["val"], arguments)
        env[node] = graph.call_function(torch.ops.aten.sym_size.int, (env[tensor], dim))
        env[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return GraphModule(module, graph)


def _where(size: Any, arguments: Sequence[Node]) -> tuple[Node, int]:
    """The argument and the dimension that are of ``size``."""
    found = sized(size, arguments)
    if found is None:
        raise Inseparable(f"the size {size.node.expr} is read in its backward, and no tensor there has it")
    return found


def sized(size: Any, nodes: Sequence[Node]) -> tuple[Node, int] | None:
    """The first of ``nodes`` with a dimension of ``size``, and which."""
    for node in nodes:
        value = node.meta.get("val")
        for dim, found in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(found, SymInt) and found.node.expr == size.node.expr:
                return node, dim
    return None
