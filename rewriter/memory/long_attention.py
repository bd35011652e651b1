"""Long attention in a stage's backward: by groups of heads, or where there is memory all at once.

    attention_backward(grad, q, k, v, ...)  ->  attention_backward_by_groups(grad, q, k, v, ...)
                                            ->  attention_backward_in_blocks(grad, q, k, v, ...)

The first needs less memory at a time, and more time: see ``kernels/attention_groups.py``. A plan decides for
each layer; all heads that share one key head are one group. Refused with dropout, whose random numbers
another order would draw for other pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from rewriter.kernels.attention_groups import at_once, by_groups
from rewriter.memory.at_once import AtOnceUncompiled, CompileGraph
from rewriter.memory.operations import argument_of, int_hint

# Query heads of one group alone fill the device from about here.
LONG = 16384


def attend_by_groups(module: GraphModule) -> None:
    """Long attention's backward, one group of heads after the other."""
    for node in module.graph.nodes:
        # With dropout, another head's random numbers would be drawn in a head's place.
        if node.target not in by_groups or argument_of(node, "dropout_p"):
            continue
        query, key = (n.meta["val"] for n in node.args[1:3])
        if int_hint(query.shape[2]) >= LONG:
            grouped = by_groups[node.target]
            node.target = grouped if int_hint(key.shape[1]) > 1 else at_once[grouped]
    module.recompile()


@dataclass(frozen=True, eq=False)
class HeadsAtOnce:
    """A stage's backward whose attention has all heads at once."""

    graph: GraphModule

    def compiled(self, compile_graph: CompileGraph, inputs: Sequence[Any], mode: Any) -> Callable:
        """Of fake ``inputs`` of ``mode``.

        Raises:
            AtOnceUncompiled: it cannot be.
        """
        try:
            return compile_graph(self.graph, list(inputs), mode)
        except Exception as error:
            raise AtOnceUncompiled(self, error) from error


def heads_at_once(module: GraphModule) -> HeadsAtOnce | None:
    """``module`` without groups; None where there are none."""
    if not any(node.target in at_once for node in module.graph.nodes):
        return None
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.target = at_once.get(node.target, node.target)
    return HeadsAtOnce(GraphModule(module, graph))
