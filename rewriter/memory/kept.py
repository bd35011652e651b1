"""What a region costs that is compiled as it is: everything that its backward reads stays on the device."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing

from rewriter.memory.choices import Link
from rewriter.memory.costs import graph_cost, value_bytes
from rewriter.memory.fakes import StageFakes
from rewriter.memory.joint import forward_graph, partitioned_graphs, signature_of
from rewriter.memory.plan import Choice
from rewriter.memory.room import made_bytes
from rewriter.regions.program import Region


def kept_choice(region: Region, shared: Set[int], machine: Link) -> Choice:
    """The cost of ``region`` with the partition that PyTorch chooses.

    Args:
        shared: places of the inputs that live anyway.

    Raises:
        Inseparable: forward and backward cannot be parted.
    """
    fakes = StageFakes(2)
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
    own = sum(value_bytes(x) for i, x in enumerate(inputs) if i not in shared)
    ahead = graph_cost(forward, fakes, 2, machine)
    if backward is None or saved is None:
        return Choice("nothing to keep", 0, 0, own + ahead.peak_bytes, 0, ahead.seconds, 0.0)
    kept = sum(_bytes_of(n) for n in backward.graph.find_nodes(op="placeholder") if not _is_tangent(n))
    kept -= sum(value_bytes(inputs[i]) for i in saved.inputs if i in shared)
    tangents = sum(value_bytes(t) for t in signature.tangents)
    back = graph_cost(backward, fakes, 2, machine)
    return Choice(
        "keep all",
        kept,
        0,
        max(own + ahead.peak_bytes, kept),
        kept + tangents + back.peak_bytes,
        ahead.seconds,
        back.seconds,
    )


def foreseen_choice(region: Region, machine: Link) -> Choice:
    """The cost of ``region`` where forward and backward cannot be parted: bytes from the sizes of its values.

    Seconds are those of its forward, and twice as many for a backward: each product has two there.
    """
    fakes = StageFakes(2)
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        inputs = [fakes.like(x) for x in region.inputs]
        with fakes.mode:
            signature = signature_of(region.module, inputs, [False] * len(inputs))
            forward = forward_graph(region.module, signature)
    return _from_sizes(region, graph_cost(forward, fakes, 2, machine).seconds)


def least_choice(region: Region, machine: Link) -> Choice:
    """The same where not even its forward can be traced: seconds to read and write its values."""
    read = sum(value_bytes(x) for x in region.inputs)
    return _from_sizes(region, (read + 2 * made_bytes(region.module)) / machine.bandwidth)


def _from_sizes(region: Region, seconds: float) -> Choice:
    made = made_bytes(region.module)
    trained = any(isinstance(x, Tensor) and x.requires_grad for x in region.inputs)
    back = 2 * seconds if trained else 0.0
    return Choice("keep all, foreseen from sizes alone", made, 0, made, 3 * made, seconds, back)


def _bytes_of(node: Any) -> int:
    return value_bytes(node.meta.get("val"))


def _is_tangent(node: Any) -> bool:
    return node.name.startswith("tangents")
