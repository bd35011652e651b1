"""Long attention in a stage's graphs: its backward by groups of heads, its keys up to whole blocks.

    attention_backward(grad, q, k, v, ...)  ->  attention_backward_by_groups(grad, q, k, v, ...)
    attention(q, k, v)                      ->  attention(q, pad(k), pad(v))

The first needs less memory at a time, the second less time: see ``kernels/attention_groups.py`` and
``kernels/attention_key_blocks.py``, which pads in the backward. Refused with dropout, whose random numbers
another order or another number of keys would draw for other pairs.
"""

import torch
from torch.fx import GraphModule, Node

from rewriter.kernels.attention_groups import by_groups
from rewriter.kernels.attention_key_blocks import missing_keys, with_keys
from rewriter.memory.operations import argument_of, int_hint

# Query heads of one group alone fill the device from about here.
LONG = 16384

_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def attend_by_groups(module: GraphModule) -> None:
    """Long attention's backward, one group of heads after the other."""
    for node in module.graph.nodes:
        # With dropout, another head's random numbers would be drawn in a head's place.
        if node.target not in by_groups or argument_of(node, "dropout_p"):
            continue
        if int_hint(node.args[1].meta["val"].shape[2]) >= LONG:
            node.target = by_groups[node.target]
    module.recompile()


def attend_to_whole_blocks(module: GraphModule) -> None:
    """Long attention's forward by cuDNN, where its length is a number, with keys that nobody sees."""
    for node in module.graph.find_nodes(op="call_function", target=_cudnn):
        query, key, value = node.args[:3]
        lengths = [n.meta["val"].shape[2] for n in (query, key)]
        if argument_of(node, "dropout_p") or not all(isinstance(length, int) for length in lengths):
            continue
        causal = bool(argument_of(node, "is_causal")) and argument_of(node, "attn_bias") is None
        if missing := missing_keys(query.meta["val"], key.meta["val"], causal):
            with module.graph.inserting_before(node):
                node.args = (query, *(_padded(n, missing) for n in (key, value)), *node.args[3:])
    module.recompile()


def _padded(keys: Node, missing: int) -> Node:
    pad = keys.graph.call_function(torch.ops.aten.constant_pad_nd.default, (keys, [0, 0, 0, missing]))
    fake = keys.meta["val"]
    with fake.fake_mode:
        pad.meta["val"] = with_keys(fake, missing)
    return pad
