"""What a node of a traced graph is: a view, attention, a product of so many operations.

Operations are counted at the sizes that tracing expected or at others, those of products by PyTorch's own
formulas.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from sympy import Symbol
from torch import SymInt, Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

_VIEWS = frozenset(
    {"view", "_unsafe_view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice", "split",
     "split_with_sizes", "select", "alias", "detach", "as_strided", "unbind", "reshape"}
)  # fmt: skip


def name_of(node: Node) -> str:
    """Of what it calls, without its overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", "")


def is_view(node: Node) -> bool:
    return node.target is operator.getitem or name_of(node) in _VIEWS


def source_of(node: Node) -> Node:
    """What a view is of."""
    while node.op == "call_function" and is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def readers_of(node: Node) -> Iterator[Node]:
    """What reads it, itself or a view of it; what reads both, twice."""
    for user in node.users:
        if user.op == "call_function" and is_view(user):
            yield from readers_of(user)
        else:
            yield user


def is_compiled(node: Node) -> bool:
    """Whether a compiler may write its kernel, fused with others: no op of ours, nor another library's."""
    return getattr(node.target, "namespace", "") in ("aten", "prims")


def is_attention(node: Node) -> bool:
    return "attention" in name_of(node) and sum(is_heads(n) for n in node.all_input_nodes) > 1


def is_attention_backward(node: Node) -> bool:
    return "backward" in name_of(node)


def is_by_groups(node: Node) -> bool:
    """Attention's backward that has one group of heads after the other."""
    return name_of(node).endswith("_by_groups")


def is_heads(node: Node) -> bool:
    """(batch, heads, length, size)."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4


def int_hint(size: Any) -> int:
    """A size as a number; where it varies, the one that tracing saw."""
    return size.node.hint if isinstance(size, SymInt) else size


def symbol_hint(symbol: Symbol, size: SymInt) -> int:
    """The number that tracing saw for ``symbol``, which ``size`` has."""
    return int(size.node.shape_env.backed_var_to_val[symbol])


def flops_of(node: Node, amount: Callable[[Any], int] = int_hint) -> float:
    """Operations of a product; 0 of anything else, and of attention, whose formula refuses shared keys.

    Args:
        amount: a number of operations, which may be symbolic, as one that is not.
    """
    name = name_of(node)
    if name == "linear_cross_entropy":
        return _head_flops(node, amount)
    if name == "add_product_":
        _, left, right = (n.meta["val"] for n in node.all_input_nodes)
        return 2.0 * amount(left.numel() * right.shape[1])
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None or is_attention(node):
        return 0.0
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(amount(formula(*args, **kwargs, out_val=node.meta["val"])))


def _head_flops(node: Node, amount: Callable[[Any], int]) -> float:
    """The head's product, and one more for each gradient, which its forward makes."""
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    gradients = sum(bool(argument_of(node, name)) for name in ("needs_x", "needs_weight"))
    return 2.0 * amount(x.numel() * weight.shape[0]) * (1 + gradients)


def share_seen(node: Node, keys: float) -> float:
    """Of all pairs of a query and a key; packed documents count as one, their lengths are not known."""
    if not (argument_of(node, "is_causal") or argument_of(node, "causal")):
        return 1.0
    reach = min(argument_of(node, "window") or keys, keys) / keys
    chunk = min(argument_of(node, "chunk") or keys, keys) / keys
    return min(reach - reach * reach / 2, chunk / 2)


def written_by(node: Node) -> list[Node]:
    """What it writes in place."""
    given = zip(node.args, arguments_of(node), strict=False)
    written = [a for a, said in given if said.alias_info is not None and said.alias_info.is_write]
    return [a for a in written if isinstance(a, Node)]


def argument_of(node: Node, name: str) -> Any:
    """The argument called ``name`` in the op's schema; None where it is not given or not there."""
    if name in node.kwargs:
        return node.kwargs[name]
    for given, argument in zip(node.args, arguments_of(node), strict=False):
        if argument.name == name:
            return given
    return None


def arguments_of(node: Node) -> list[Any]:
    """Of its op's schema; none of a plain function."""
    schema = getattr(node.target, "_schema", None)
    return schema.arguments if schema is not None else []
