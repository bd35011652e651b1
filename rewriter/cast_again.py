"""Casts of weights that a backward takes again, instead of keeping their results from the forward.

Adapters are kept in fp32 and used in 16 bits. A partitioner sees that the forward and the backward read the
same cast, and saves it, since it is half as large as the weight; but the weight is there anyway. In 32 layers
of 8B with adapters of rank 32 the casts are 160 MiB, from the forward to the backward. Casting again reads
the weights once more, 0.34 GB, and writes what the forward did: 0.1 ms on an H200.

A weight that is written between a forward and its backward is then refused by autograd, as any tensor that
was saved is; what is written past autograd, by ``weight.data``, is read as it is then.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from rewriter.canonical import value_of

_aten = torch.ops.aten
_CASTS = frozenset({_aten._to_copy.default, torch.ops.prims.convert_element_type.default})
_REARRANGED = frozenset(
    {_aten.cat.default, _aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.view.default}
)


def weights_of(module: GraphModule) -> tuple[int, ...]:
    """Which inputs of a graph of Dynamo's, or of a part of one, are parameters, there all the time.

    Buffers are not: models write them between a forward and its backward, which autograd would then refuse.
    """
    return tuple(
        i
        for i, node in enumerate(module.graph.find_nodes(op="placeholder"))
        if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        and isinstance(value_of(node), nn.Parameter)
    )


def cast_again(joint: Graph, inputs: Sequence[Any], weights: Sequence[int]) -> None:
    """Mark what of ``joint``, AOTAutograd's graph of forward and backward, is a cast of a weight.

    Args:
        inputs: of the graph that it was made of, ``weights`` their places. Where ``joint`` has others nothing
            is marked, nor is a cast of an input that ``joint`` itself writes, as running statistics.
    """
    primals = {node.name: node for node in joint.find_nodes(op="placeholder")}
    found = {i: primals.get(f"primals_{i + 1}") for i in weights}
    if any(node is None or not _alike(node.meta["val"], inputs[i]) for i, node in found.items()):
        return
    again: set[Node] = set()
    # The backward comes after what the forward writes.
    given = set(found.values()) - _written(joint)
    for node in joint.nodes:
        if node.op != "call_function":
            continue
        read = node.all_input_nodes
        is_cast = node.target in _CASTS and read[0] in given and _is_narrower(node, read[0])
        if is_cast or (node.target in _REARRANGED and again.issuperset(read)):
            again.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0


def _written(joint: Graph) -> set[Node]:
    """What is read by an operation that writes: AOTAutograd leaves none but copies to inputs."""
    writes = (n for n in joint.nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable)
    return {read for node in writes for read in node.all_input_nodes}


def _alike(value: Any, given: Any) -> bool:
    both = isinstance(value, Tensor) and isinstance(given, Tensor)
    return both and value.dtype == given.dtype and value.shape == given.shape


def _is_narrower(cast: Node, source: Node) -> bool:
    return cast.meta["val"].itemsize < source.meta["val"].itemsize
