"""bitsandbytes' quantised linear, bare, opaque or inside an ``autograd_function_apply``, as a linear.

Its operands are those of ``linear(x, weight, bias)``, with packed data and quantisation state in the weight's
place.
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from rewriter.nested import subgraph
from rewriter.signatures import positional, target_name

# What takes the operands themselves: bitsandbytes' own op, and ``opaque_linear``'s, which takes a dtype too.
PRODUCTS = frozenset({"gemm_4bit", "rewriter.opaque_linear.linear_4bit"})


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


def packed_linear(args: tuple) -> tuple[Any, PackedWeight, Any]:
    """Input, weight and bias, from the arguments of one of ``PRODUCTS``."""
    x, data, shape, absmax, blocksize, quant_type, bias, absmax_8bit, code, offset, *_ = args
    weight = PackedWeight(data, tuple(shape), absmax, blocksize, quant_type, absmax_8bit, code, offset)
    return x, weight, bias


def packed_linear_inside(node: Node) -> tuple[Any, PackedWeight, Any] | None:
    """The 4-bit linear that an ``autograd_function_apply`` is: its operands in the outer graph."""
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
        args = tuple(lift(a) for a in positional("gemm_4bit", products[0]))
    except KeyError:
        return None  # an operand is computed inside the body: not the plain quantised linear
    return packed_linear(args)
