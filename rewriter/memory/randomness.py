"""The same random numbers again, for a stage that is run a second time in the backward.

A stage that draws (attention's dropout, noise, the seeds of a checkpoint's body) notes the state of the
device's generator before its forward. Its recomputation, and a backward that computes its forward again,
begin from that state, tile after tile as the forward did, and leave the generator as they found it: what
comes later draws what it would have drawn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.memory.operations import argument_of


def draws(module: GraphModule) -> list[tuple[str, str]]:
    """The operations that draw random numbers, in order, each with the shape of what it draws."""
    return [(str(n.target), _shape(n)) for n in module.graph.nodes if is_random(n)]


def device_of(values: Sequence[Any]) -> torch.device:
    """The one that computes: weights may be in host memory."""
    devices = [x.device for x in values if isinstance(x, Tensor)]
    return next((device for device in devices if device.type != "cpu"), devices[0])


def random_state(device: torch.device) -> Tensor:
    """Of the default generator; on a GPU it is known to the host, and asking does not wait."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replaying(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw from ``state`` on, and afterwards from where it was before."""
    before = random_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(before, device)


def _set(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def is_random(node: Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    # Attention is tagged for a dropout that it may not have.
    return "attention" not in str(node.target) or bool(argument_of(node, "dropout_p"))


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return str(tuple(first.shape)) if isinstance(first, Tensor) else ""
