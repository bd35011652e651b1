"""A region's graph in which sizes are read from its inputs, not from the tensors inside.

    view(x, size(y)[0], 16, -1)   ->   view(x, in_0, 16, -1)

Where lengths vary, models ask tensors for sizes that the region is given anyway, as numbers of their own. A
tile of a tensor has another size, and what asks it would hold the tensor's stage and its own together.
"""

from typing import Any

from torch import SymInt
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from rewriter.canonical import fixed, value_of
from rewriter.nested import duplicate
from rewriter.rowwise.sizes import same


def with_named_sizes(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of ``module`` that asks no tensor for what is known, and the original of each of its nodes."""
    clone = duplicate(module)
    originals = dict(zip(clone.graph.nodes, module.graph.nodes, strict=True))
    given = [n for n in clone.graph.find_nodes(op="placeholder") if isinstance(value_of(n), SymInt)]
    known: dict[Node, Any] = {}
    for node in clone.graph.nodes:
        node.args = map_arg(node.args, lambda n: known.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: known.get(n, n))
        if (
            node.op in ("call_function", "call_method")
            and (size := _named(value_of(node), given)) is not None
        ):
            known[node] = size
    for node in reversed(known):
        if not node.users:
            clone.graph.erase_node(node)
    return clone, originals


def _named(value: Any, given: list[Node]) -> Any:
    """A size, or a tuple of sizes, as constants and nodes of ``given``; None where it cannot be said so."""
    if isinstance(value, tuple):
        sizes = tuple(_named(v, given) for v in value)
        return None if None in sizes or not sizes else sizes
    if isinstance(value, bool) or not isinstance(value, (int, SymInt)):
        return None
    number = fixed(value)
    return number if number is not None else next((n for n in given if same(value_of(n), value)), None)
