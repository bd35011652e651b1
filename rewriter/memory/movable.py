"""Frozen weights on the device that could be in host memory: what to say where a step does not fit."""

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.host_weights import EMBEDDING, LAYERS
from rewriter.memory.costs import value_bytes
from rewriter.memory.in_host import is_packed
from rewriter.regions.program import Program


def movable_bytes(program: Program) -> dict[str, int]:
    """Bytes by kind, "embedding" and "layers", of the weights that ``prepare`` could move."""
    sizes = {EMBEDDING: 0, LAYERS: 0}
    for node in program.source.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if not isinstance(value, Tensor) or value.requires_grad:
            continue
        if node.users and all(_reads_rows(user, node) for user in node.users):
            sizes[EMBEDDING] += value_bytes(value)
        elif is_packed(value) and value.device.type != "cpu":
            sizes[LAYERS] += value_bytes(value)
    return {kind: size for kind, size in sizes.items() if size}


def _reads_rows(user: Node, weight: Node) -> bool:
    """Whether that is all it does with the weight, which no other operation reads: a tied head would."""
    return user.target is F.embedding and weight in user.args[1:2]
