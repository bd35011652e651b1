"""One canonical view of a graph's nodes, shared by patterns and Dynamo graphs.

``x.float()``, ``x.to(torch.float32)`` and ``x.type(torch.float32)`` are one cast; ``operator.mul``,
``torch.mul`` and ``Tensor.mul`` one product; a keyword, a default left out and a positional argument one
argument. A pattern is therefore written once, in the model's own words, where a list of variants would
otherwise be needed. It is a view: no graph is changed, and nothing is computed.

A quantised linear of bitsandbytes is a linear too (``rewriter.quantised``).
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.quantised import PRODUCTS, packed_linear, packed_linear_inside
from rewriter.signatures import positional, target_name


@dataclass(frozen=True, slots=True)
class Call:
    """What a node computes: a canonical operation on positional arguments.

    ``through`` lists further nodes that the view looks through and that die with this one, as the
    higher-order op behind a ``getitem``.
    """

    name: str
    args: tuple
    through: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class DtypeOf:
    """The dtype of another value, where a pattern says ``type_as``."""

    value: Any


_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}

_LAST_DIM_OPS = {"mean": 1, "sum": 1, "cat": 1, "chunk": 2, "split": 2, "softmax": 1, "repeat_interleave": 2}


def value_of(value: Any) -> Any:
    """What tracing knows of a graph value: a fake tensor, a size or a constant; None when unknown."""
    return value.meta.get("example_value") if isinstance(value, Node) else value


def dtype_of(value: Any) -> torch.dtype | None:
    return getattr(value_of(value), "dtype", None)


def fixed(size: Any) -> int | None:
    """A size as a number where tracing knows it to be one, as a symbol that was specialised; else None."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def number(value: Any) -> Any:
    """A symbolic float, as graphs of dynamic shapes have for a model's settings, as the number that it is.

    Kernels take numbers. The graph is then valid for this number alone: a guard compiles another when it
    changes. Other values, and floats that depend on data, come back as they are.
    """
    known = value_of(value)
    if isinstance(known, torch.SymFloat) and known.node.has_hint():
        return known.node.guard_float("", 0)
    return value


def canonical(node: Node) -> Call | None:
    """What ``node`` computes, or None for placeholders, attributes and outputs."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = target_name(node)
    if name in _CASTS or name in ("to", "type", "type_as"):
        return _cast(node, name)
    if name == "square":
        return Call("pow", (node.args[0], 2))
    if name == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]:
        return Call("pow", (node.args[0], 2))
    if name in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return Call(f"{name}_scaled", (*node.args, node.kwargs["alpha"]))
    if name in ("contiguous", "clone") and not node.kwargs:
        return Call("alias", node.args[:1])
    if name == "getitem":
        return _getitem(node)
    args = positional(name, node)
    if name in PRODUCTS:
        return Call("linear", packed_linear(args))
    if name == "matmul" and (weight := _transposed(args[1])) is not None:
        return Call("linear", (args[0], weight, None))
    if name == "pow" and args[1] == -0.5:
        return Call("rsqrt", args[:1])
    return Call(name, _negative_dims(name, args))


def _negative_dims(name: str, args: tuple) -> tuple:
    position = _LAST_DIM_OPS.get(name)
    if position is None or len(args) <= position:
        return args
    dim = args[position]
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    first = args[0][0] if isinstance(args[0], (tuple, list)) and args[0] else args[0]
    rank = getattr(value_of(first), "ndim", None)
    if isinstance(dim, int) and dim >= 0 and rank is not None:
        dim -= rank
    return (*args[:position], dim, *args[position + 1 :])


def _cast(node: Node, name: str) -> Call:
    source, result = value_of(node.args[0]), value_of(node)
    if isinstance(result, torch.Tensor) and isinstance(source, torch.Tensor):
        if result.device != source.device:
            return Call("to_device", node.args)
        same = result.dtype == source.dtype
        return Call("alias", node.args[:1]) if same else Call("cast", (node.args[0], result.dtype))
    if name in _CASTS:
        return Call("cast", (node.args[0], _CASTS[name]))
    if name == "type_as":
        return Call("cast", (node.args[0], DtypeOf(node.args[1])))
    dtype = node.kwargs.get("dtype")
    if dtype is None:
        dtype = next((a for a in node.args[1:] if isinstance(a, (torch.dtype, Node))), None)
    return Call("alias", node.args[:1]) if dtype is None else Call("cast", (node.args[0], dtype))


def _transposed(value: Any) -> Node | None:
    """The matrix that ``value`` is the transpose of by ``.T`` or ``.t()``; None where it is none."""
    if not isinstance(value, Node):
        return None
    attribute = value.op == "call_function" and value.target is getattr and value.args[1] == "T"
    if not attribute and target_name(value) != "t":
        return None
    matrix = value.args[0]
    # A pattern's values have no rank yet; `.T` and `.t()` are for matrices.
    if not isinstance(matrix, Node) or getattr(value_of(matrix), "ndim", 2) != 2:
        return None
    return matrix


def _getitem(node: Node) -> Call:
    source, index = node.args
    if index == 0 and isinstance(source, Node) and source.op == "call_function":
        operands = packed_linear_inside(source)
        if operands is not None:
            return Call("linear", operands, through=(source,))
    return Call("getitem", (source, _from_start(index)))


def _from_start(index: Any) -> Any:
    """An index in which slices that start at 0 have no start: they are the same slices."""
    if isinstance(index, tuple):
        return tuple(map(_from_start, index))
    if isinstance(index, slice) and isinstance(index.start, int) and index.start == 0:
        return slice(None, index.stop, index.step)
    return index


def is_metadata(node: Any) -> bool:
    """Whether a pattern's value is computed from shapes and dtypes alone, and thus evaluated, not matched."""
    if not isinstance(node, Node):
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "torch")
    return arithmetic and node.target is not operator.matmul and all(map(is_metadata, node.all_input_nodes))
