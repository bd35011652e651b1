"""A hash of what a part of a graph computes: equal for equal structure, in every process.

Operations, constants, shapes and dtypes, and who reads whom go into it; names do not, nor which weights are
read. Two parts with one hash may be run by one compiled function, each with its own inputs.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import GraphModule, Node

from rewriter.canonical import value_of
from rewriter.nested import subgraph


def structure(nodes: Sequence[Node]) -> str:
    """The hash of ``nodes``, in order; what they read from outside is numbered by its first reading."""
    return _digest(_lines(nodes, described))


def signature(module: GraphModule) -> str:
    """The hash of a whole graph, with all that its compilation depends on at its inputs."""
    return _digest(_lines(list(module.graph.nodes), input_key))


def compilation_key(module: GraphModule, inputs: Sequence[Any]) -> str:
    """The hash of a graph with its ``inputs``, and what symbols are expected to be: of equal ones, one may be
    compiled for all. A graph with values of its own equals no other.
    """
    own = [f"{node.name} of {id(module)}" for node in module.graph.find_nodes(op="get_attr")]
    sizes = [n for x in inputs for n in ((*x.shape, *x.stride()) if isinstance(x, Tensor) else (x,))]
    hints = [str(n.node.hint) for n in sizes if isinstance(n, torch.SymInt)]
    return _digest([signature(module), *map(input_key, inputs), *hints, *own])


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _lines(nodes: Sequence[Node], outside: Callable[[Any], str]) -> Iterable[str]:
    number: dict[Node, str] = {}

    def label(node: Node) -> str:
        if node not in number:
            number[node] = f"in{len(number)}:{_attribute(node) or outside(value_of(node))}"
        return number[node]

    for i, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr"):
            yield label(node)
            continue
        operands = f"{argument(node.args, label)} {argument(node.kwargs, label)}"
        yield f"{node.op} {target(node.target)} {operands} {described(value_of(node))}"
        number[node] = f"%{i}"


def argument(value: Any, label: Callable[[Node], str]) -> str:
    """A node's argument with nodes by their ``label``: equal texts for equal arguments only."""
    if isinstance(value, Node):
        return label(value)
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(argument(v, label) for v in value)})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k!r}:{argument(v, label)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice{argument((value.start, value.stop, value.step), label)}"
    return constant(value)


def _attribute(node: Node) -> str | None:
    body = subgraph(node)
    return f"graph {structure(list(body.graph.nodes))}" if body is not None else None


def target(value: Any) -> str:
    """An operation's name, the same in every process."""
    if isinstance(value, (str, OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return str(value)
    owner = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
    module = getattr(value, "__module__", None) or getattr(owner, "__name__", "")
    name = getattr(value, "__qualname__", None)
    # Two functions made inside one share their name.
    return f"{module}.{name}" if name and "<" not in name else f"{module}.{name} at {id(value)}"


def constant(value: Any) -> str:
    """An argument that is no node. What has no text of its own is told apart by identity."""
    if isinstance(value, (type(None), EllipsisType, bool, int, float, complex, str, bytes)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)):
        return f"{type(value).__name__} {value}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__} {value}"
    if isinstance(value, (OpOverload, OpOverloadPacket, HigherOrderOperator)) or callable(value):
        return target(value)
    if isinstance(value, Enum):
        return str(value)
    return f"{type(value).__name__} at {id(value)}"


def described(value: Any) -> str:
    """Shape and dtype of a result: what two layers agree in before it is known how values are laid out."""
    if isinstance(value, Tensor):
        return f"{tuple(map(str, value.shape))} {value.dtype} {value.device}"
    if isinstance(value, (list, tuple)):
        return f"({','.join(map(described, value))})"
    return f"{type(value).__name__} {value}" if value is not None else ""


def input_key(value: Any) -> str:
    """All that a compiled function depends on in an input."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value}"
    return " ".join(
        (
            described(value),
            str(tuple(map(str, value.stride()))),
            str(value.storage_offset()),
            f"grad={value.requires_grad}",
            f"parameter={isinstance(value, nn.Parameter)}",
            type(value).__name__,
        )
    )
