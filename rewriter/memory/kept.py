"""What a region costs that is compiled as it is: everything that its backward reads stays on the device."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from rewriter.memory.choices import Link
from rewriter.memory.costs import graph_cost, value_bytes
from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.joint import forward_graph, partitioned_graphs, signature_of
from rewriter.memory.plan import Choice
from rewriter.memory.room import made_bytes
from rewriter.regions.program import Region

# A region's cost on a machine, with ``growth`` as of ``graph_cost``.
KeptCost = Callable[[Link, Growth], Choice]

# Length of a tile, which nothing here has.
_TILE = 2


@dataclass(frozen=True, eq=False)
class KeptGraphs:
    """A region's forward and backward, parted as PyTorch chooses.

    Attributes:
        own: inputs that do not live anyway.
        backward: None where nothing needs a gradient.
        saved: what the backward reads beside gradients and what lives anyway.
    """

    fakes: StageFakes
    own: tuple[Any, ...]
    forward: GraphModule
    backward: GraphModule | None
    saved: tuple[Any, ...]
    tangents: tuple[Any, ...]

    def choice(self, machine: Link, growth: Growth = AS_TRACED) -> Choice:
        """What it costs; ``growth`` as of ``graph_cost``."""
        own, kept, tangents = (
            sum(value_bytes(x, growth.tokens) for x in some) for some in (self.own, self.saved, self.tangents)
        )
        ahead = graph_cost(self.forward, self.fakes, _TILE, machine, growth)
        if self.backward is None:
            return Choice("nothing to keep", 0, 0, own + ahead.peak_bytes, 0, ahead.seconds, 0.0)
        back = graph_cost(self.backward, self.fakes, _TILE, machine, growth)
        return Choice(
            "keep all",
            kept,
            0,
            max(own + ahead.peak_bytes, kept),
            kept + tangents + back.peak_bytes,
            ahead.seconds,
            back.seconds,
        )


def kept_graphs(region: Region, shared: Set[int]) -> KeptGraphs:
    """``region`` traced.

    Args:
        shared: places of the inputs that live anyway.

    Raises:
        Inseparable: forward and backward cannot be parted.
    """
    fakes = StageFakes(_TILE)
    needs = [isinstance(x, Tensor) and x.requires_grad for x in region.inputs]
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        inputs = [fakes.like(x) for x in region.inputs]
        with fakes.mode:
            signature = signature_of(region.module, inputs, needs)
            differentiable = any(needs) and any(signature.differentiable)
            if not differentiable:
                forward, backward, saved = forward_graph(region.module, signature), None, None
            else:
                forward, backward, saved = partitioned_graphs(region.module, signature)
    own = tuple(x for i, x in enumerate(inputs) if i not in shared)
    if backward is None or saved is None:
        return KeptGraphs(fakes, own, forward, None, (), ())
    read = [n for n in backward.graph.find_nodes(op="placeholder") if not _is_tangent(n)]
    # The inputs that it reads come first.
    living = [i in shared for i in saved.inputs] + [False] * (len(read) - len(saved.inputs))
    values = tuple(n.meta.get("val") for n, lives in zip(read, living, strict=True) if not lives)
    return KeptGraphs(fakes, own, forward, backward, values, tuple(signature.tangents))


def forward_cost(region: Region) -> KeptCost:
    """Of ``region`` where forward and backward cannot be parted: bytes from the sizes of its values.

    Seconds are those of its forward, and twice as many for a backward: each product has two there.
    """
    fakes = StageFakes(_TILE)
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        inputs = [fakes.like(x) for x in region.inputs]
        with fakes.mode:
            signature = signature_of(region.module, inputs, [False] * len(inputs))
            forward = forward_graph(region.module, signature)

    def cost(machine: Link, growth: Growth = AS_TRACED) -> Choice:
        return _from_sizes(region, graph_cost(forward, fakes, _TILE, machine, growth).seconds, growth.tokens)

    return cost


def least_choice(region: Region, machine: Link, growth: Growth = AS_TRACED) -> Choice:
    """The same where not even its forward can be traced: seconds to read and write its values."""
    read = sum(value_bytes(x, growth.tokens) for x in region.inputs)
    moved = read + 2 * made_bytes(region.module) * growth.tokens
    return _from_sizes(region, moved / machine.bandwidth, growth.tokens)


def _from_sizes(region: Region, seconds: float, growth: float) -> Choice:
    made = ceil(made_bytes(region.module) * growth)
    trained = any(isinstance(x, Tensor) and x.requires_grad for x in region.inputs)
    back = 2 * seconds if trained else 0.0
    return Choice("keep all, foreseen from sizes alone", made, 0, made, 3 * made, seconds, back)


def _is_tangent(node: Any) -> bool:
    return node.name.startswith("tangents")
