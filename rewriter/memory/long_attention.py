"""Long attention in a stage's backward, by groups of heads.

    attention_backward(grad, q, k, v, ...)  ->  attention_backward_by_groups(grad, q, k, v, ...)

It needs less memory at a time: see ``kernels/attention_groups.py``. Refused with dropout, whose random
numbers another order would draw for other pairs.
"""

from torch.fx import GraphModule

from rewriter.kernels.attention_groups import by_groups
from rewriter.memory.operations import argument_of, int_hint

# Query heads of one group alone fill the device from about here.
LONG = 16384


def attend_by_groups(module: GraphModule) -> None:
    """Long attention's backward, one group of heads after the other."""
    for node in module.graph.nodes:
        # With dropout, another head's random numbers would be drawn in a head's place.
        if node.target not in by_groups or argument_of(node, "dropout_p"):
            continue
        if int_hint(node.args[1].meta["val"].shape[2]) >= LONG:
            node.target = by_groups[node.target]
    module.recompile()
