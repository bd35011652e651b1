"""What a node calls, by one name, and its arguments in one order, however they were written.

``operator.mul``, ``torch.mul`` and ``Tensor.mul`` are one name; a keyword, a default left out and a
positional argument are one argument.
"""

from typing import Any

import torch
from torch.fx import Node

REQUIRED = object()

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


def positional(name: str, node: Node) -> tuple:
    """The arguments of ``node``, which calls ``name``: without keywords where the signature is known."""
    signature = _SIGNATURES.get(name)
    if signature is None:
        return (*node.args, *sorted(node.kwargs.items())) if node.kwargs else node.args
    kwargs = node.kwargs
    if name == "cat" and "axis" in kwargs:
        kwargs = {"dim": kwargs["axis"]}
    rest = signature[len(node.args) :]
    return (*node.args, *(kwargs.get(parameter, default) for parameter, default in rest))
