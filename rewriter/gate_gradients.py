"""A gated activation and its gradients in one pass over memory, in a graph of a backward that has both.

    h = gated_activation(gate, up)                   dh = ...
    da = matmul(..., h)                              dgate, dup, h = one launch of dh, gate, up
    dh = ...                                    ->   da = matmul(..., h)
    dgate, dup = gated_activation_backward(dh, gate, up)

A backward computes the activation again for the gradient of what multiplied it, and reads gate and up again
for theirs. One launch moves 12 bytes an element of bf16 where two move 16. The activation takes the memory of
``dh``, so that no more lives at once than before; what is made of it comes right after the launch.

Left as they are: an activation that ``dh`` is made of; a ``dh`` of another dtype or other strides, one that
is read again, and one whose memory is not the graph's own; and where something in between writes to what the
operations that move have read. A product with a sum that counts for nothing (``beta`` of 0: LoRA's scaled
products) depends on that sum's shape alone, and gets a row of a factor in its place.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from rewriter.kernels import gated_activation as _defines_the_ops  # noqa: F401
from rewriter.rowwise.sizes import same


class _Join(NamedTuple):
    """Of a backward: the forward, the two in one, and how many of a backward's arguments these take."""

    forward: Any
    joined: Any
    count: int


_ops = torch.ops.rewriter
_JOINS: Mapping[Any, _Join] = {
    _ops.gated_activation_backward.default: _Join(
        _ops.gated_activation.default, _ops.gated_activation_backward_with_result_.default, 4
    ),
    _ops.gated_activation_packed_backward.default: _Join(
        _ops.gated_activation_packed.default, _ops.gated_activation_packed_backward_with_result_.default, 4
    ),
}


def join_gate_gradients(graph: Graph, *, functional: bool) -> None:
    """Join the forward and the backward of each gate in ``graph``.

    Args:
        graph: of ATen's and our ops, with fake values (``"val"``).
        functional: for a graph in which nothing is written, as AOTAutograd hands it to a compiler: what the
            launch overwrites is said in PyTorch's way, and the compiler copies it first if it has to. Else
            the node writes.
    """
    backwards = [n for n in graph.nodes if n.target in _JOINS]
    aliases: dict[int, list[Node]] = {}
    for node in graph.nodes if backwards else ():
        for storage in _storages(node):
            aliases.setdefault(storage, []).append(node)
    for backward in backwards:
        gate = _gate_of(backward)
        if gate is None or not gate.result_may_lie_in_gradient(aliases):
            continue
        moved = gate.made_before_gradients()
        if moved is None:
            continue
        gate.part_from_shapes(moved)
        last = gate.join(functional)
        for node in moved:
            last.append(node)
            last = node


def _gate_of(backward: Node) -> "_Gate | None":
    """Of a backward that gives both gradients, where the activation is there, too."""
    forward, joined, count = _JOINS[backward.target]
    if not all(backward.args[count:]):
        return None
    for node in backward.graph.find_nodes(op="call_function", target=forward):
        if node.args == backward.args[1:count]:
            return _Gate(node, backward, joined, backward.args[:count])
    return None


@dataclass(frozen=True)
class _Gate:
    """A gate's two nodes, the op for both, and what that is given: the result's gradient and the inputs."""

    forward: Node
    backward: Node
    joined: Any
    given: tuple[Any, ...]

    def result_may_lie_in_gradient(self, aliases: Mapping[int, Sequence[Node]]) -> bool:
        """Whether it has the same layout, and memory of the graph's own, which is read here last."""
        gradient, *inputs = self.given
        result, like = self.forward.meta["val"], gradient.meta["val"]
        same_strides = all(same(a, b) for a, b in zip(result.stride(), like.stride(), strict=True))
        if result.dtype != like.dtype or not same_strides:
            return False
        sharing = aliases[_storage(like)]
        if any(n.op != "call_function" or n in inputs for n in sharing):
            return False
        later, node = set(), self.backward
        while (node := node.next).op != "root":
            later.add(node)
        return later.isdisjoint(user for n in sharing for user in n.users)

    def made_before_gradients(self) -> list[Node] | None:
        """What is made of the activation before ``backward``; None where it may not come after that."""
        made: dict[Node, None] = {}
        written = {_storage(self.given[0].meta["val"])}
        node = self.forward
        while (node := node.next) is not self.backward:
            if node.op == "root":
                return []  # The activation itself comes after its gradients.
            if any(source is self.forward or source in made for source in _read(node)):
                made[node] = None
            elif isinstance(node.target, OpOverload):
                written.update(_written(node.target, node.args))
            elif node.is_impure():
                return None
        if any(n.is_impure() or n in self.backward.all_input_nodes for n in made):
            return None
        read = {s for n in made for source in n.all_input_nodes for s in _storages(source)}
        return list(made) if read.isdisjoint(written) else None

    def part_from_shapes(self, moved: Sequence[Node]) -> None:
        """Where what stays reads ``moved`` for its shape alone, let it read something else."""
        node = self.forward
        while (node := node.next).op != "root" and node is not self.backward:
            if node in moved or not _is_scaled_product(node):
                continue
            shape, _, right = node.args
            if isinstance(right, Node) and (shape is self.forward or shape in moved):
                with node.graph.inserting_before(node):
                    row = node.graph.call_function(torch.ops.aten.select.int, (right, 0, 0))
                row.meta["val"] = right.meta["val"].select(0, 0)
                node.update_arg(0, row)

    def join(self, functional: bool) -> Node:
        """Put the launch in the place of ``backward``; its last node."""
        # What a compiler is told of strides is left out: the launch takes any.
        meta = {key: value for key, value in self.backward.meta.items() if key != "eager_input_vals"}
        graph, backward, gradient = self.backward.graph, self.backward, self.given[0]
        if not functional:
            backward.target, backward.args, backward.meta = self.joined, self.given, meta
            self.forward.replace_all_uses_with(gradient)
            graph.erase_node(self.forward)
            return backward
        several = isinstance(meta["val"], (tuple, list))
        values = (*(meta["val"] if several else (meta["val"],)), self.forward.meta["val"])
        names = [argument.name for argument in self.joined._schema.arguments]
        with graph.inserting_before(backward):
            launch = graph.call_function(
                torch.ops.higher_order.auto_functionalized,
                (self.joined,),
                dict(zip(names, self.given, strict=True)),
            )
            launch.meta = {**meta, "val": values}
            backward.replace_all_uses_with(launch if several else _part(launch, 0))
            result = _part(launch, len(values) - 1)
        self.forward.replace_all_uses_with(result)
        graph.erase_node(backward)
        graph.erase_node(self.forward)
        return result


def _is_scaled_product(node: Node) -> bool:
    """Whether the sum that a product is added to counts for nothing, as a LoRA layer's backward has it.

    And the right factor has a row, to stand for the sum.
    """
    if node.target is not torch.ops.aten.addmm.default or node.kwargs.get("beta", 1):
        return False
    right = node.args[2]
    rows = right.meta["val"].shape[0] if isinstance(right, Node) else 0
    return not isinstance(rows, int) or rows > 0


def _read(node: Node) -> list[Node]:
    """The operands whose numbers count."""
    if not _is_scaled_product(node):
        return node.all_input_nodes
    return [n for n in node.args[1:] if isinstance(n, Node)]


def _part(launch: Node, index: int) -> Node:
    node = launch.graph.call_function(operator.getitem, (launch, index))
    node.meta = {**launch.meta, "val": launch.meta["val"][index]}
    return node


def _written(op: OpOverload, args: Sequence[Any]) -> Iterator[int]:
    """The storages that ``op`` writes to."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for node in value if isinstance(value, (tuple, list)) else (value,):
                yield from _storages(node)


def _storages(node: Any) -> Iterator[int]:
    values = node.meta.get("val") if isinstance(node, Node) else None
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield _storage(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
