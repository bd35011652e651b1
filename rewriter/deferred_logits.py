"""Logits that a model returns beside its loss: made when somebody reads them, of what the head is given.

The output holds ``deferred`` in their place, with a module of the calls from the head to what was returned:
the head itself, scale, softcap and casts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import Call, canonical, dtype_of, number
from rewriter.deferred import deferred
from rewriter.kernels.host_weight import host_weight


def defer(module: GraphModule, value: Node, head: Node, output: Node) -> None:
    """Let ``output`` hold ``deferred`` in the place of ``value``, which calls make of ``head``, a linear."""
    operands = [operand for operand in _call(head).args if operand is not None]
    inputs = [n.args[1] if n.target is host_weight else n for n in operands]
    name = f"deferred_{value.name}"
    module.add_submodule(name, _copied(value, head, operands))
    with module.graph.inserting_before(output):
        call = module.graph.call_function(deferred, (module.graph.get_attr(name), *inputs))
    call.meta = dict(value.meta)
    output.replace_input_with(value, call)


def _copied(value: Node, head: Node, read: list[Node]) -> GraphModule:
    """A module of the calls from ``head`` to ``value``; autocast's casts are written out.

    Args:
        read: operands of ``head``. A weight from host memory is copied again: nothing keeps it until then.
    """
    graph = Graph()
    given = [graph.placeholder(name) for name in ("x", "weight", "bias")[: len(read)]]
    if read[1].target is host_weight:
        given[1] = graph.call_function(host_weight, (given[0], given[1]))
    dtype = dtype_of(head)
    operands = [
        operand if dtype_of(outer) == dtype else graph.call_method("to", (operand, dtype))
        for operand, outer in zip(given, read, strict=True)
    ]
    copies = {head: graph.call_function(F.linear, tuple(operands))}

    def copy(node: Node) -> Any:
        if not isinstance(known := number(node), Node):
            return known
        call = _call(node)
        if node not in copies and call.name == "alias":
            return copy(call.args[0])
        if node not in copies and call.name == "cast":  # `type_as` would read a second tensor
            copies[node] = graph.call_method("to", (copy(call.args[0]), dtype_of(node)))
        elif node not in copies:
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    graph.output(copy(value))
    return GraphModule(torch.nn.Module(), graph)


def _call(node: Node) -> Call:
    call = canonical(node)
    assert call is not None, "the way to the head was walked before"
    return call
