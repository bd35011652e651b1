"""What is made of sizes alone, as the mask of a sliding window: a backward makes it again, and none is kept.

Away from GPUs masked attention is PyTorch's own, with a mask of S×S numbers that its backward reads. Each
layer would keep one, all of them equal. To make it again is to compare positions, little beside attention.
"""

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy


def make_again(joint: Graph) -> None:
    """Mark what of ``joint``, AOTAutograd's graph of forward and backward, reads none of its tensors.

    On a GPU nothing is marked: there a mask is evaluated in registers.
    """
    given = [node.meta.get("val") for node in joint.find_nodes(op="placeholder")]
    if any(isinstance(value, Tensor) and value.is_cuda for value in given):
        return
    made: set[Node] = set()
    for node in joint.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        tensors = {n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)}
        if isinstance(node.target, OpOverload) and made.issuperset(tensors) and not _differs(node.target):
            made.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0


def _differs(target: OpOverload) -> bool:
    """Whether two calls may give two values; of operations that are not PyTorch's own nothing is known."""
    own = target.namespace in ("aten", "prims")
    return not own or torch.Tag.nondeterministic_seeded in target.tags or "empty" in target.name()
