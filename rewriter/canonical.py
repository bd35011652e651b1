"""One canonical view of a graph's nodes, shared by patterns and Dynamo graphs.

``x.float()``, ``x.to(torch.float32)`` and ``x.type(torch.float32)`` are one cast; ``operator.mul``,
``torch.mul`` and ``Tensor.mul`` one product; a keyword, a default left out and a positional argument one
argument. A pattern is therefore written once, in the model's own words, where a list of variants would
otherwise be needed. It is a view: no graph is changed, and nothing is computed.

It also unwraps bitsandbytes' quantised linear, bare or inside ``autograd_function_apply``: both are
``linear(x, weight, bias)`` with a tuple of packed data and quantisation state in the weight's place.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.nested import subgraph

REQUIRED = object()


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


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A 4-bit weight of bitsandbytes: the arguments of its ``gemm_4bit`` other than input and bias."""

    data: Node
    shape: tuple[int, int]
    absmax: Node
    blocksize: int
    quant_type: str
    absmax_8bit: Node | None = None
    absmax_code: Node | None = None
    absmax_offset: Node | None = None

    def flat(self) -> tuple:
        """The fields in the order of ``gemm_4bit``'s arguments."""
        return (self.data, self.shape, self.absmax, self.blocksize, self.quant_type,
                self.absmax_8bit, self.absmax_code, self.absmax_offset)  # fmt: skip


_ALIASES = {
    "multiply": "mul",
    "imul": "mul",
    "iadd": "add",
    "isub": "sub",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "subtract": "sub",
    "__matmul__": "matmul",
    "__and__": "and_",
    "__or__": "or_",
    "__add__": "add",
    "__mul__": "mul",
    "__sub__": "sub",
    "__truediv__": "div",
    "__eq__": "eq",
    "__ne__": "ne",
    "__le__": "le",
    "__lt__": "lt",
    "__ge__": "ge",
    "__gt__": "gt",
    "bitwise_and": "and_",
    "logical_and": "and_",
    "iand": "and_",
    "negative": "neg",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
}

_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}

COMMUTATIVE = frozenset({"mul", "add", "and_", "or_", "eq", "ne"})

# The arguments of each operation in order, with the values that stand for an argument left out.
_SIGNATURES: dict[str, tuple[tuple[str, Any], ...]] = {
    "linear": (("input", REQUIRED), ("weight", REQUIRED), ("bias", None)),
    "mean": (("input", REQUIRED), ("dim", None), ("keepdim", False), ("dtype", None)),
    "sum": (("input", REQUIRED), ("dim", None), ("keepdim", False), ("dtype", None)),
    "cumsum": (("input", REQUIRED), ("dim", REQUIRED), ("dtype", None)),
    "diff": (("input", REQUIRED), ("n", 1), ("dim", -1), ("prepend", None), ("append", None)),
    "clamp": (("input", REQUIRED), ("min", None), ("max", None)),
    "pow": (("input", REQUIRED), ("exponent", REQUIRED)),
    "cat": (("tensors", REQUIRED), ("dim", 0)),
    "stack": (("tensors", REQUIRED), ("dim", 0)),
    "chunk": (("input", REQUIRED), ("chunks", REQUIRED), ("dim", 0)),
    "split": (("tensor", REQUIRED), ("split_size_or_sections", REQUIRED), ("dim", 0)),
    "repeat_interleave": (("input", REQUIRED), ("repeats", REQUIRED), ("dim", None), ("output_size", None)),
    "flatten": (("input", REQUIRED), ("start_dim", 0), ("end_dim", -1)),
    "softmax": (("input", REQUIRED), ("dim", None), ("_stacklevel", 3), ("dtype", None)),
    "dropout": (("input", REQUIRED), ("p", 0.5), ("training", True), ("inplace", False)),
    "silu": (("input", REQUIRED), ("inplace", False)),
    "relu": (("input", REQUIRED), ("inplace", False)),
    "gelu": (("input", REQUIRED), ("approximate", "none")),
    "layer_norm": (
        ("input", REQUIRED), ("normalized_shape", REQUIRED), ("weight", None), ("bias", None), ("eps", 1e-5),
    ),
    "rms_norm": (("input", REQUIRED), ("normalized_shape", REQUIRED), ("weight", None), ("eps", None)),
    "pad": (("input", REQUIRED), ("pad", REQUIRED), ("mode", "constant"), ("value", None)),
    "cross_entropy": (
        ("input", REQUIRED), ("target", REQUIRED), ("weight", None), ("size_average", None),
        ("ignore_index", -100), ("reduce", None), ("reduction", "mean"), ("label_smoothing", 0.0),
    ),
    "scaled_dot_product_attention": (
        ("query", REQUIRED), ("key", REQUIRED), ("value", REQUIRED), ("attn_mask", None), ("dropout_p", 0.0),
        ("is_causal", False), ("scale", None), ("enable_gqa", False),
    ),
    "gemm_4bit": (
        ("A", REQUIRED), ("B", REQUIRED), ("shapeB", REQUIRED), ("absmax", REQUIRED), ("blocksize", REQUIRED),
        ("quant_type", REQUIRED), ("bias", None), ("absmax_8bit", None), ("absmax_code", None),
        ("absmax_offset", None),
    ),
}  # fmt: skip

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


def target_name(node: Node) -> str:
    """The canonical name of what a node calls; qualified where the function is not PyTorch's."""
    if node.op == "call_method":
        return _ALIASES.get(str(node.target), str(node.target))
    target = node.target
    name = getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.rpartition("::")[2]
        return name if target.namespace in ("aten", "bitsandbytes") else str(target)
    module = getattr(target, "__module__", None) or "torch"
    if module.partition(".")[0] not in ("torch", "_operator", "builtins", "math", "einops"):
        return f"{module}.{name}"
    return _ALIASES.get(name, name)


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
    args = _positional(name, node)
    if name == "gemm_4bit":
        return _linear_4bit(args)
    if name == "matmul" and (weight := _transposed(args[1])) is not None:
        return Call("linear", (args[0], weight, None))
    if name == "pow" and args[1] == -0.5:
        return Call("rsqrt", args[:1])
    return Call(name, _negative_dims(name, args))


def _positional(name: str, node: Node) -> tuple:
    signature = _SIGNATURES.get(name)
    if signature is None:
        return (*node.args, *sorted(node.kwargs.items())) if node.kwargs else node.args
    kwargs = node.kwargs
    if name == "cat" and "axis" in kwargs:
        kwargs = {"dim": kwargs["axis"]}
    rest = signature[len(node.args) :]
    return (*node.args, *(kwargs.get(parameter, default) for parameter, default in rest))


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
    fits = isinstance(matrix, Node) and getattr(value_of(matrix), "ndim", 2) == 2
    return matrix if fits else None


def _linear_4bit(args: tuple) -> Call:
    x, data, shape, absmax, blocksize, quant_type, bias, absmax_8bit, code, offset = args
    weight = PackedWeight(data, tuple(shape), absmax, blocksize, quant_type, absmax_8bit, code, offset)
    return Call("linear", (x, weight, bias))


def _getitem(node: Node) -> Call:
    source, index = node.args
    if index == 0 and isinstance(source, Node) and source.op == "call_function":
        inner = _autograd_function_linear(source)
        if inner is not None:
            return Call("linear", inner.args, through=(source,))
    return Call("getitem", (source, _from_start(index)))


def _from_start(index: Any) -> Any:
    """An index in which slices that start at 0 have no start: they are the same slices."""
    if isinstance(index, tuple):
        return tuple(map(_from_start, index))
    if isinstance(index, slice) and isinstance(index.start, int) and index.start == 0:
        return slice(None, index.stop, index.step)
    return index


def _autograd_function_linear(node: Node) -> Call | None:
    """The 4-bit linear inside an ``autograd_function_apply``, in terms of the outer graph's values."""
    if getattr(node.target, "__name__", "") != "autograd_function_apply":
        return None
    body = subgraph(node.args[0])
    if body is None:
        return None
    products = [n for n in body.graph.nodes if n.op == "call_function" and target_name(n) == "gemm_4bit"]
    placeholders = list(body.graph.find_nodes(op="placeholder"))
    operands = node.args[2:]
    if len(products) != 1 or len(placeholders) < len(operands):
        return None
    # Some releases pass a context first, which no operand stands for.
    outer = dict(zip(placeholders[len(placeholders) - len(operands) :], operands, strict=True))

    def lift(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        while value not in outer and value.op == "call_method" and value.target in ("view", "reshape"):
            value = value.args[0]
        return outer[value]

    try:
        args = tuple(lift(a) for a in _positional("gemm_4bit", products[0]))
    except KeyError:
        return None  # an operand is computed inside the body: not the plain quantised linear
    return _linear_4bit(args)


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
