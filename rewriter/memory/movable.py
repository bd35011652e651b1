"""Frozen weights that are in host memory, and that could be: what to say where a step does not fit."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.hostable import EMBEDDING, HEAD, KINDS, LAYERS, could_live_in_host_memory
from rewriter.kernels.host_embedding import host_embedding
from rewriter.kernels.host_weight import host_weight
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy
from rewriter.memory.budgets import card_bytes
from rewriter.memory.costs import value_bytes
from rewriter.memory.in_host import is_packed, packed_in_host_memory
from rewriter.memory.plan import Infeasible
from rewriter.regions.program import Program


def movable_bytes(program: Program) -> dict[str, int]:
    """Bytes by kind, "embedding", "head" and "layers", of the weights that ``prepare`` could move.

    A head that is tied to the embedding is there with 0 bytes of its own.
    """
    sizes: dict[str, int] = {}
    for node in program.source.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if not isinstance(value, Tensor) or value.requires_grad:
            continue
        left = value_bytes(value)
        for kind in _kinds(node, value):
            sizes[kind] = sizes.get(kind, 0) + left
            left = 0
    return {kind: sizes[kind] for kind in KINDS if kind in sizes}


def moved(program: Program, device: torch.device) -> list[str]:
    """Of those kinds, the ones that ``prepare`` has moved already; ``device`` computes."""
    graph = program.source.graph
    read = [kind for how, kind in _FROM_HOST.items() if graph.find_nodes(op="call_function", target=how)]
    return [*read, LAYERS] if packed_in_host_memory(program, device) else read


def in_cards(
    error: Infeasible,
    movable: Mapping[str, int],
    there: Collection[str],
    device: torch.device | None = None,
) -> Infeasible:
    """``error`` with what to ask for: its ``least_device`` is the least ``memory_budget`` that would do.

    Args:
        error: the planner's, whose budgets are what tensors may take of a card.
        movable: bytes by kind of the weights that could leave the device.
        there: kinds that have left it.
        device: None for a GPU.
    """
    if (least := error.least_device) is None:
        return error
    card = card_bytes(least, device)
    could = could_live_in_host_memory(movable, there, error, partial(card_bytes, device=device))
    would = f"With what driver and allocator take, memory_budget={card} is the least that would do."
    return Infeasible(f"{error} {would}{could}", card, error.least_host)


def _kinds(node: Node, value: Tensor) -> list[str]:
    """What a frozen weight is, if all that is done with it can be done from host memory."""
    if is_packed(value):
        return [LAYERS] if value.device.type != "cpu" else []
    done = {
        next((kind for target, kind in _READERS.items() if _reads(user, node, target)), None)
        for user in node.users
    }
    return [] if None in done else [kind for kind in KINDS if kind in done]


_READERS = {F.embedding: EMBEDDING, linear_cross_entropy: HEAD}
_FROM_HOST = {host_embedding: EMBEDDING, host_weight: HEAD}


def _reads(user: Node, weight: Node, target: Callable) -> bool:
    """Whether ``user`` calls ``target`` with the weight in its place."""
    return user.target is target and weight in user.args[1:2]
