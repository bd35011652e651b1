"""Which weights of a program are in host memory, and what of them a graph reads."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, uint8
from torch.fx import GraphModule, Node

from rewriter.canonical import value_of
from rewriter.kernels.host_weight import host_weight
from rewriter.memory.costs import value_bytes
from rewriter.regions.program import Program, Region
from rewriter.size_text import size_text

# A note on how a head comes begins so, of which a report has the last.
HEAD_COMES = "head:"


@dataclass(frozen=True)
class InHost:
    """The weights of one layer that are in host memory, and how they are read.

    Attributes:
        names: of the layer's inputs.
        nbytes: of all of them.
        ahead: they are copied to the device while the layer before runs; else kernels read them over the bus.
    """

    names: tuple[str, ...] = ()
    nbytes: int = 0
    ahead: bool = False

    @property
    def words(self) -> str:
        """To add to what a way to run the layer is called."""
        if not self.names:
            return ""
        return " · weights a layer ahead" if self.ahead else " · weights over the bus"

    def places(self, region: Region) -> list[int]:
        """Of the weights among the inputs of ``region``."""
        given = [n.name for n in region.module.graph.find_nodes(op="placeholder")]
        return [given.index(name) for name in self.names]

    def read_by(self, graph: GraphModule, names: Sequence[str]) -> int:
        """Bytes that a run of ``graph`` reads over the bus; its first inputs are called ``names``."""
        if self.ahead or not self.names:
            return 0
        inputs = zip(graph.graph.find_nodes(op="placeholder"), names, strict=False)
        return sum(value_bytes(n.meta["val"]) * len(n.users) for n, name in inputs if name in self.names)


def packed_weights(program: Program) -> frozenset[Node]:
    """The inputs that are 4-bit weights as bitsandbytes packs them."""
    return _packed(program.source)


def packed_in_host_memory(program: Program, device: torch.device) -> frozenset[Node]:
    """Of those, the ones that are not on ``device``, which computes."""
    return _away(program.source, device)


def over_the_bus(module: GraphModule, device: torch.device) -> list[str]:
    """Lines for the report of a graph without a plan, whose kernels read weights where they lie."""
    lines = []
    for node in module.graph.find_nodes(op="call_function", target=host_weight):
        if value_of(node.args[1]).device.type != device.type:
            size = size_text(value_bytes(value_of(node)))
            lines.append(f"{HEAD_COMES} {size} come from host memory before the loss, which waits for them")
    size = sum(value_bytes(value_of(n)) for n in _away(module, device))
    if not size:
        return lines
    values = map(value_of, module.graph.find_nodes(op="placeholder"))
    trained = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values)
    times, total = ("twice", 2 * size) if trained else ("once", size)
    way_out = "; under a memory_budget they come a layer ahead, where that is faster" if trained else ""
    return [
        *lines,
        f"weights: {size_text(size)} in 4 bits are in host memory, and kernels read them over the bus "
        f"{times} a step, {size_text(total)}, while nothing else runs{way_out}",
    ]


def _packed(module: GraphModule) -> frozenset[Node]:
    return frozenset(n for n in module.graph.find_nodes(op="placeholder") if is_packed(value_of(n)))


def _away(module: GraphModule, device: torch.device) -> frozenset[Node]:
    return frozenset(n for n in _packed(module) if value_of(n).device.type != device.type)


NONE = InHost()


def is_packed(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == uint8 and value.dim() == 2 and value.shape[1] == 1


def in_host_of(program: Program, region: Region, weights: Set[Node]) -> InHost:
    """Of ``weights``, which are in host memory, what every call of ``region`` is given at the same place."""
    calls = [call.inputs for call in program.calls if call.region is region]
    placeholders = region.module.graph.find_nodes(op="placeholder")
    places = [i for i in range(len(placeholders)) if all(inputs[i] in weights for inputs in calls)]
    names = tuple(placeholders[i].name for i in places)
    return InHost(names, sum(value_bytes(region.inputs[i]) for i in places))
