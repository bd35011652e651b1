"""Frozen weights on the device that could be in host memory: what to say where a step does not fit."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.host_weights import EMBEDDING, LAYERS, could_live_in_host_memory
from rewriter.memory.budgets import card_bytes
from rewriter.memory.costs import value_bytes
from rewriter.memory.in_host import is_packed
from rewriter.memory.plan import Infeasible
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


def in_cards(error: Infeasible, movable: Mapping[str, int], device: torch.device | None = None) -> Infeasible:
    """``error`` with what to ask for: its ``least_device`` is the least ``memory_budget`` that would do.

    Args:
        error: the planner's, whose budgets are what tensors may take of a card.
        movable: bytes by kind of the weights that could leave the device.
        device: None for a GPU.
    """
    if (least := error.least_device) is None:
        return error
    card = card_bytes(least, device)
    could = could_live_in_host_memory(movable, lambda spared: card_bytes(least - spared, device))
    would = f"With what driver and allocator take, memory_budget={card} is the least that would do."
    return Infeasible(f"{error} {would}{could}", card, error.least_host)


def _reads_rows(user: Node, weight: Node) -> bool:
    """Whether that is all it does with the weight, which no other operation reads: a tied head would."""
    return user.target is F.embedding and weight in user.args[1:2]
