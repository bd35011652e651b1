"""What ``rewriter.prepare`` would gain, read off a graph that Dynamo traced from a model as it is.

A model that is not prepared trains too; its report says what that costs. Three signs are known:

- Outputs that append to an empty cache: ``cat([empty, keys])``. Nobody reads them in training, and they keep
  every layer's keys and values to the end of the step.
- A graph whose only result is an embedding's. Models do not end there: the hook that
  ``enable_input_require_grads`` puts on the embedding breaks the graph behind it.
- 4-bit products that Dynamo traced into, for a third or more of its time.
"""

import math

import torch
from torch.fx import GraphModule, Node

from rewriter.quantised import packed_linear_inside
from rewriter.size_text import size_text


def advice(module: GraphModule) -> list[str]:
    """Lines for the report of ``module``, a graph as Dynamo gave it; none where there is nothing to gain."""
    results = module.graph.output_node().all_input_nodes
    lines = []
    cached = [n for n in results if _appends_to_nothing(n)]
    if cached:
        size = sum(map(_bytes, cached))
        lines.append(
            f"{len(cached)} keys and values are returned for a cache that training never reads"
            f"{f', {size_text(size)}' if size else ''}: rewriter.prepare(model) turns it off."
        )
    if len(results) == 1 and results[0].target is torch.nn.functional.embedding:
        lines.append(
            "this graph ends behind an embedding. Where a hook of enable_input_require_grads() broke it, "
            "rewriter.prepare(model) makes the model one graph."
        )
    traced = sum(packed_linear_inside(n) is not None for n in module.graph.nodes)
    if traced:
        lines.append(
            f"{traced} products of 4-bit layers were traced into, forward and backward, for a third or "
            "more of tracing's time: rewriter.prepare(model) makes each of them one call."
        )
    return lines


def _appends_to_nothing(node: Node) -> bool:
    """``torch.cat([empty, x])``, where ``empty`` has one dimension and no element."""
    if node.target is not torch.cat or len(node.all_input_nodes) != 2:
        return False
    first = node.all_input_nodes[0].meta.get("example_value")
    return isinstance(first, torch.Tensor) and first.shape == (0,)


def _bytes(node: Node) -> int:
    """The size of a node's value; 0 where it depends on a length that is not known."""
    value = node.meta["example_value"]
    known = all(isinstance(size, int) for size in value.shape)
    return math.prod(value.shape) * value.element_size() if known else 0
