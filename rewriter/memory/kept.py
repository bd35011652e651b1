"""What a region costs that is compiled as it is: everything that its backward reads stays on the device."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Symbol
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from rewriter.memory.costs import graph_cost
from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import AS_TRACED, Growth, SizesAt
from rewriter.memory.joint import forward_graph, partitioned_graphs, signature_of
from rewriter.memory.operations import source_of
from rewriter.memory.plan import Choice
from rewriter.memory.room import made_bytes
from rewriter.memory.walk import Link
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
        at = self.fakes.sizes_at(_TILE, growth)
        own, kept, tangents = (sum(map(at.bytes, some)) for some in (self.own, self.saved, self.tangents))
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


def kept_graphs(region: Region, shared: Set[int], rows: Set[Symbol] = frozenset()) -> KeptGraphs:
    """``region`` traced.

    Args:
        shared: places of the inputs that live anyway.
        rows: symbols that count sequences.

    Raises:
        Inseparable: forward and backward cannot be parted.
    """
    fakes = StageFakes(_TILE, rows)
    needs = [isinstance(x, Tensor) and x.requires_grad for x in region.inputs]
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        inputs = list(map(fakes.like, region.symbolic_inputs))
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
    # The inputs that it reads come first, what is saved of the inside last.
    inside = _saved_inside(forward, saved.extras)
    living = [i in shared for i in saved.inputs] + [False] * (len(read) - len(saved.inputs) - len(inside))
    given = forward.graph.find_nodes(op="placeholder")
    living += [source in given and given.index(source) in shared for source in map(source_of, inside)]
    values = tuple(n.meta.get("val") for n, lives in zip(read, living, strict=True) if not lives)
    return KeptGraphs(fakes, own, forward, backward, values, tuple(signature.tangents))


def forward_cost(region: Region, rows: Set[Symbol] = frozenset()) -> KeptCost:
    """Of ``region`` where forward and backward cannot be parted: bytes from the sizes of its values.

    Seconds are those of its forward, and twice as many for a backward: each product has two there.
    """
    fakes = StageFakes(_TILE, rows)
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        inputs = list(map(fakes.like, region.symbolic_inputs))
        with fakes.mode:
            signature = signature_of(region.module, inputs, [False] * len(inputs))
            forward = forward_graph(region.module, signature)

    def cost(machine: Link, growth: Growth = AS_TRACED) -> Choice:
        seconds = graph_cost(forward, fakes, _TILE, machine, growth).seconds
        return _from_sizes(region, seconds, SizesAt(growth, rows))

    return cost


def least_choice(region: Region, rows: Set[Symbol], machine: Link, growth: Growth = AS_TRACED) -> Choice:
    """The same where not even its forward can be traced: seconds to read and write its values."""
    at = SizesAt(growth, rows)
    moved = sum(map(at.bytes, region.symbolic_inputs)) + 2 * made_bytes(region.module, at.amount)
    return _from_sizes(region, moved / machine.bandwidth, at)


def _from_sizes(region: Region, seconds: float, at: SizesAt) -> Choice:
    made = made_bytes(region.module, at.amount)
    trained = any(isinstance(x, Tensor) and x.requires_grad for x in region.inputs)
    back = 2 * seconds if trained else 0.0
    return Choice("keep all, foreseen from sizes alone", made, 0, made, 3 * made, seconds, back)


def _saved_inside(forward: GraphModule, count: int) -> list[Node]:
    (output,) = forward.graph.find_nodes(op="output")
    results = output.args[0]
    return list(results[len(results) - count :])


def _is_tangent(node: Any) -> bool:
    return node.name.startswith("tangents")
