"""A stage's own graph, made of a region's nodes.

That of a row-wise stage runs at any length: where the region's sizes stand in views, the length of the tile
is read from one of its inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from rewriter.effects import Effects
from rewriter.memory.rows import Tokens
from rewriter.regions.modes import ModeSwitches
from rewriter.rowwise.ruling import Place


def stage_module(
    source: GraphModule,
    nodes: Sequence[Node],
    inputs: Sequence[Node],
    outputs: Sequence[Node],
    effects: Effects,
    tokens: Tokens | None,
) -> GraphModule:
    """A module that takes ``inputs`` and returns a tuple of ``outputs``.

    Args:
        source: the region's.
        nodes: to be copied, in order, under the modes that they have.
        tokens: of the region, to free sizes of the length of the sequence; None for a whole stage.
    """
    graph = Graph()
    env: dict[Node, Node] = {}
    attributes: dict[str, Any] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    length = None
    if tokens is not None:
        length = _length(graph, env, inputs, tokens)
        env[length] = length
    switches = ModeSwitches(graph, effects.mode, torch.is_grad_enabled())
    for node in nodes:
        if node.op == "get_attr":
            attributes[str(node.target)] = getattr(source, str(node.target))
            env[node] = graph.node_copy(node)
            continue
        switches.enter(node)
        args, kwargs = map_arg((_at_length(node, tokens, length), node.kwargs), env.__getitem__)
        env[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        env[node].meta = dict(node.meta)
    switches.leave()
    graph.output(tuple(env[n] for n in outputs))
    if length is not None and not length.users:
        graph.erase_node(length)
    graph.lint()
    return GraphModule(attributes, graph)


def operands(node: Node, tokens: Tokens | None) -> list[Node]:
    """What ``node`` reads in a stage: not the length of the sequence, where the tile's replaces it."""
    found: dict[Node, None] = {}
    map_arg((_at_length(node, tokens, None), node.kwargs), lambda n: found.setdefault(n))
    return list(found)


def _at_length(node: Node, tokens: Tokens | None, length: Node | None) -> tuple:
    """The arguments of ``node``, with ``length`` for that of the sequence where it is row-wise."""
    ruling = tokens.rulings.get(node) if tokens is not None else None
    if ruling is None or ruling.size is None:
        return node.args
    return _replaced(node.args, ruling.size, length)


def _length(graph: Graph, env: dict[Node, Node], inputs: Sequence[Node], tokens: Tokens) -> Node:
    node = next(n for n in inputs if n in tokens.rows)
    length = graph.call_method("size", (env[node], tokens.rows[node]))
    length.meta["example_value"] = tokens.length
    return length


def _replaced(args: tuple, place: Place, length: Any) -> tuple:
    index, *inner = place
    if inner:
        return (
            *args[:index],
            type(args[index])(_replaced(tuple(args[index]), tuple(inner), length)),
            *args[index + 1 :],
        )
    return args if args[index] == -1 else (*args[:index], length, *args[index + 1 :])
