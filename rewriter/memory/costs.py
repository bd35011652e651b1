"""What a stage's graphs cost: seconds, and device memory beside their inputs, from shapes alone.

Seconds are those of ``durations.py``. Memory is what lives at the worst moment when nodes run in order and
values die after their last use. What a kernel needs beside its arguments and results is added where it is
known to be large: attention's backward sums the gradient of the queries in fp32.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.kernels.attention_key_blocks import are_long, missing_keys
from rewriter.memory.durations import Rates, duration
from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import AS_TRACED, Growth, SizesAt
from rewriter.memory.operations import (
    argument_of,
    int_hint,
    is_attention,
    is_attention_backward,
    is_by_groups,
    is_heads,
    is_view,
    name_of,
)

# Bytes of logits that ``linear_cross_entropy`` holds at once on a GPU where its weight is frozen.
_LOGITS = 2**28
# Ops that pad long keys and values when they run.
_PADDING = frozenset(
    {
        "attention_by_length_backward",
        "scaled_dot_product_cudnn_attention_backward_by_groups",
        "scaled_dot_product_cudnn_attention_backward_in_blocks",
    }
)


@dataclass(frozen=True)
class GraphCost:
    """Of one run of a graph over ``tokens`` tokens: seconds, bytes of results, bytes at the worst moment."""

    seconds: float
    result_bytes: int
    peak_bytes: int


def graph_cost(
    module: GraphModule, fakes: StageFakes, tokens: int, rates: Rates, growth: Growth = AS_TRACED
) -> GraphCost:
    """Cost of ``module`` with ``tokens`` for the length of a tile.

    Args:
        growth: of the batch since it was traced, for the sizes that are not a tile's.
    """
    at = fakes.sizes_at(tokens, growth)
    (output,) = module.graph.find_nodes(op="output")
    sizes = {n: _bytes(n, at) for n in module.graph.nodes if n.op == "call_function"}
    results = set(output.all_input_nodes)
    seconds = duration(module, sizes, at, rates)
    result_bytes = sum(sizes.get(n, 0) for n in results)
    return GraphCost(seconds, result_bytes, _peak(module, sizes, results, at))


def value_bytes(value: Any) -> int:
    """Of a tensor, as large as it is expected to be where its size varies; 0 of anything else."""
    return int_hint(value.numel()) * value.element_size() if isinstance(value, Tensor) else 0


def _bytes(node: Node, at: SizesAt) -> int:
    """What the node allocates: nothing for views and for parts of a tuple, which its maker has counted."""
    if is_view(node):
        return 0
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else (values,)
    return sum(map(at.bytes, tensors))


def _peak(module: GraphModule, sizes: dict[Node, int], results: set[Node], at: SizesAt) -> int:
    """Bytes at the worst moment, inputs left out; a view keeps what it views alive."""
    owner: dict[Node, Node] = {}
    for node in sizes:
        source = node.all_input_nodes[0] if is_view(node) and node.all_input_nodes else node
        owner[node] = owner.get(source, source) if source is not node else node
    last: dict[Node, Node] = {}
    for node in sizes:
        for read in node.all_input_nodes:
            last[owner.get(read, read)] = node
    stays = {owner.get(n, n) for n in results}
    live = worst = 0
    dying: dict[Node, list[Node]] = {}
    for value, node in last.items():
        if value not in stays and sizes.get(value):
            dying.setdefault(node, []).append(value)
    for node in sizes:
        live += sizes[node]
        worst = max(worst, live + _workspace(node, at))
        live -= sum(sizes[value] for value in dying.get(node, ()))
        if node not in last and node not in stays:
            live -= sizes[node]
    return worst


def _workspace(node: Node, at: SizesAt) -> int:
    """What the head's loss, or attention, needs beside its results, on a GPU.

    Attention's backward: the gradient of the queries in fp32, and of keys that heads share one for each head.
    """
    name = name_of(node)
    if name == "linear_cross_entropy":
        return _buffer_of_logits(node, at)
    # The kernel of masked attention sums in registers.
    if not (is_attention(node) and is_attention_backward(node)) or name == "attention_backward":
        return 0
    query, key = [n.meta["val"] for n in node.args if isinstance(n, Node) and is_heads(n)][1:3]
    if not query.is_cuda:
        return 0
    groups = int_hint(key.shape[1])
    shared = groups < int_hint(query.shape[1])
    each = 4 + (2 * query.element_size() if shared else 0)
    summed, padded = at.numel(query) * each, _padded_keys(node, query, key, at)
    if is_by_groups(node):
        # Without a group's own results, which go to their place at once: of all that is foreseen to live
        # beside attention's backward, a step of 200,000 tokens had less by more than these.
        return (summed + padded) // groups
    # Gradients of padded keys are cut in place where there is one sequence alone.
    return summed + padded * (1 if int_hint(query.shape[0]) == 1 else 2)


def _padded_keys(node: Node, query: Tensor, key: Tensor, at: SizesAt) -> int:
    """Keys and values up to whole blocks where the op makes them itself; at lengths that vary, as of any."""
    if name_of(node) not in _PADDING:
        return 0
    causal = bool(argument_of(node, "is_causal") or argument_of(node, "causal"))
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(queries, int) and isinstance(keys, int):
        pads = missing_keys(query, key, causal) > 0
    else:
        pads = are_long(at.length(queries), at.length(keys), causal)
    return 2 * at.bytes(key) if pads else 0


def _buffer_of_logits(node: Node, at: SizesAt) -> int:
    """Logits of a chunk of rows."""
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    trained = value_bytes(weight) // 2 if argument_of(node, "needs_weight") else 0
    logits = at.amount(x.shape[0]) * int_hint(weight.shape[0]) * x.element_size()
    return min(max(_LOGITS, trained), logits)
