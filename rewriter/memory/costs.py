"""What a stage's graphs cost: seconds, and device memory beside their inputs, from shapes alone.

Seconds are bounds, operations over rate or bytes over bandwidth, whichever is more, summed over nodes; views
cost nothing. A narrow product, as one of rank 32, is one of bytes. Of chains of pointwise operations, which a
compiler fuses, only what enters and leaves is counted.
Memory is what lives at the worst moment when nodes run in order and values die after their last use. What a
kernel needs beside its arguments and results is added where it is known to be large: attention's backward
sums the gradient of the queries in fp32.
"""

import operator
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import AS_TRACED, Growth

# Bytes of logits that ``linear_cross_entropy`` holds at once on a GPU where its weight is frozen.
_LOGITS = 2**28


class Rates(Protocol):
    """Of a machine: operations and bytes a second."""

    @property
    def matrix_flops(self) -> float: ...
    @property
    def attention_forward_flops(self) -> float: ...
    @property
    def attention_backward_flops(self) -> float: ...
    @property
    def bandwidth(self) -> float: ...


@dataclass(frozen=True)
class GraphCost:
    """Of one run of a graph over ``tokens`` tokens: seconds, bytes of results, bytes at the worst moment."""

    seconds: float
    result_bytes: int
    peak_bytes: int


def graph_cost(
    module: GraphModule, fakes: StageFakes, tokens: int, rates: Rates, growth: Growth = AS_TRACED
) -> GraphCost:
    """Cost of ``module`` with ``tokens`` for the length of a tile.

    Args:
        growth: how many times as expected other sizes that vary are.
    """
    at = _Lengths(fakes, tokens, growth.tokens, growth.length)
    (output,) = module.graph.find_nodes(op="output")
    sizes = {n: _bytes(n, at) for n in module.graph.nodes if n.op == "call_function"}
    results = set(output.all_input_nodes)
    seconds = sum(_seconds(n, sizes, at, rates) for n in sizes)
    result_bytes = sum(sizes.get(n, 0) for n in results)
    return GraphCost(seconds, result_bytes, _peak(module, sizes, results, at))


@dataclass(frozen=True)
class _Lengths:
    """At which lengths a graph is costed."""

    fakes: StageFakes
    tokens: int
    growth: float
    longer: float = 1.0

    def tiled(self, value: Tensor) -> bool:
        """Whether it has a tile's length."""
        tile = self.fakes.tokens.node.expr
        return any(isinstance(s, SymInt) and tile in s.node.expr.free_symbols for s in value.shape)

    def grown(self, value: Tensor) -> float:
        """How many times as large as expected it is, for other lengths than a tile's."""
        return self.growth if _varies(value.numel()) and not self.tiled(value) else 1.0

    def numel(self, value: Tensor) -> int:
        count = value.numel()
        if isinstance(count, SymInt) and self.tiled(value):
            return int(count.node.expr.subs(self.fakes.sizes_for(self.tokens)))
        return ceil(int_hint(count) * self.grown(value))

    def bytes(self, value: Any) -> int:
        return self.numel(value) * value.element_size() if isinstance(value, Tensor) else 0

    def scale(self, node: Node) -> float:
        """How many times the operations that tracing expected it takes."""
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        flat = [t for v in values for t in (v if isinstance(v, (tuple, list)) else (v,))]
        tensors = [t for t in flat if isinstance(t, Tensor)]
        if any(map(self.tiled, tensors)):
            return self.tokens / int_hint(self.fakes.tokens)
        return max(map(self.grown, tensors), default=1.0)

    def keys(self, key: Tensor) -> float:
        """Of each sequence."""
        if self.tiled(key):
            return int_hint(key.shape[2]) * self.tokens / int_hint(self.fakes.tokens)
        return int_hint(key.shape[2]) * (self.longer if _varies(key.shape[2]) else 1.0)


def value_bytes(value: Any, growth: float = 1.0) -> int:
    """Of a tensor; ``growth`` times as large as it is expected to be where its size varies."""
    if not isinstance(value, Tensor):
        return 0
    count = value.numel()
    return ceil(int_hint(count) * (growth if _varies(count) else 1.0)) * value.element_size()


def bytes_at(value: Any, fakes: StageFakes, tokens: int, growth: float = 1.0) -> int:
    """Of a stage's tensor with ``tokens`` for the length of a tile, and ``growth`` as of ``graph_cost``."""
    return _Lengths(fakes, tokens, growth).bytes(value)


_VIEWS = frozenset(
    {"view", "_unsafe_view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "slice", "split",
     "split_with_sizes", "select", "alias", "detach", "as_strided", "unbind", "reshape"}
)  # fmt: skip


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", "")


def _is_view(node: Node) -> bool:
    return node.target is operator.getitem or _name(node) in _VIEWS


def _bytes(node: Node, at: _Lengths) -> int:
    """What the node allocates: nothing for views and for parts of a tuple, which its maker has counted."""
    if _is_view(node):
        return 0
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else (values,)
    return sum(map(at.bytes, tensors))


def _varies(size: Any) -> bool:
    return isinstance(size, SymInt) and bool(size.node.expr.free_symbols)


def int_hint(size: Any) -> int:
    """A size as a number; where it varies, the one that tracing saw."""
    return size.node.hint if isinstance(size, SymInt) else size


def _peak(module: GraphModule, sizes: dict[Node, int], results: set[Node], at: _Lengths) -> int:
    """Bytes at the worst moment, inputs left out; a view keeps what it views alive."""
    owner: dict[Node, Node] = {}
    for node in sizes:
        source = node.all_input_nodes[0] if _is_view(node) and node.all_input_nodes else node
        owner[node] = owner.get(source, source) if source is not node else node
    last: dict[Node, Node] = {}
    for node in sizes:
        for read in node.all_input_nodes:
            last[owner.get(read, read)] = node
    stays = {owner.get(n, n) for n in results}
    live = worst = 0
    dying: dict[Node, list[Node]] = {}
    for value, node in last.items():
        if value not in stays and sizes.get(value):
            dying.setdefault(node, []).append(value)
    for node in sizes:
        live += sizes[node]
        worst = max(worst, live + _workspace(node, at))
        live -= sum(sizes[value] for value in dying.get(node, ()))
        if node not in last and node not in stays:
            live -= sizes[node]
    return worst


def _workspace(node: Node, at: _Lengths) -> int:
    """What the head's loss, or attention's backward, needs beside its results, on a GPU.

    The gradient of the queries in fp32, and of keys that heads share one for each head.
    """
    name = _name(node)
    if name == "linear_cross_entropy":
        return _buffer_of_logits(node, at)
    # The kernel of masked attention sums in registers.
    if not _is_attention(node) or "backward" not in name or name == "attention_backward":
        return 0
    query, key = [n.meta["val"] for n in node.args if isinstance(n, Node) and _is_heads(n)][1:3]
    if not query.is_cuda:
        return 0
    groups = int_hint(key.shape[1])
    shared = groups < int_hint(query.shape[1])
    each = 4 + (2 * query.element_size() if shared else 0)
    return at.numel(query) * each // (groups if name.endswith("by_groups") else 1)


def _seconds(node: Node, sizes: dict[Node, int], at: _Lengths, rates: Rates) -> float:
    if _is_view(node):
        return 0.0
    if _is_attention(node):
        backward = "backward" in _name(node)
        rate = rates.attention_backward_flops if backward else rates.attention_forward_flops
        return _attention_flops(node, at) / rate
    if count := _flops(node):
        return max(count * at.scale(node) / rates.matrix_flops, _moved(node, sizes, at) / rates.bandwidth)
    return _moved(node, sizes, at) / rates.bandwidth if _moves(node) else 0.0


def _moved(node: Node, sizes: dict[Node, int], at: _Lengths) -> int:
    """Bytes read and written; what is written in place, both."""
    read = sum(at.bytes(n.meta.get("val")) for n in node.all_input_nodes)
    schema = getattr(node.target, "_schema", None)
    given = zip(node.args, schema.arguments if schema is not None else (), strict=False)
    written = [a for a, said in given if said.alias_info is not None and said.alias_info.is_write]
    return read + sizes[node] + sum(at.bytes(a.meta.get("val")) for a in written if isinstance(a, Node))


def _moves(node: Node) -> bool:
    """Whether it is a kernel of its own: ops that a compiler does not fuse."""
    namespace = getattr(node.target, "namespace", "")
    return namespace not in ("aten", "prims", "")


def _flops(node: Node) -> float:
    """Operations at the sizes that tracing expected: products by PyTorch's own formulas."""
    if _name(node) == "linear_cross_entropy":
        return _head_flops(node)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return float(int_hint(formula(*args, **kwargs, out_val=node.meta["val"])))


def _attention_flops(node: Node, at: _Lengths) -> float:
    """Two products forward and five backward, of the pairs that are seen; heads may share keys.

    PyTorch's formula refuses shared keys.
    """
    backward = "backward" in _name(node)
    given = [n.meta["val"] for n in node.args if isinstance(n, Node) and _is_heads(n)]
    query, key = given[1:3] if backward else given[:2]
    keys = at.keys(key)
    product = 2.0 * int_hint(query.numel()) * at.scale(node) * keys
    return product * (5 if backward else 2) * _share_seen(node, keys)


def _share_seen(node: Node, keys: float) -> float:
    """Of all pairs of a query and a key; packed documents count as one, their lengths are not known."""
    if not (argument_of(node, "is_causal") or argument_of(node, "causal")):
        return 1.0
    reach = min(argument_of(node, "window") or keys, keys) / keys
    chunk = min(argument_of(node, "chunk") or keys, keys) / keys
    return min(reach - reach * reach / 2, chunk / 2)


def _head_flops(node: Node) -> float:
    """The head's product, and one more for each gradient, which its forward makes."""
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    gradients = sum(bool(argument_of(node, name)) for name in ("needs_x", "needs_weight"))
    return 2.0 * int_hint(x.numel()) * int_hint(weight.shape[0]) * (1 + gradients)


def _buffer_of_logits(node: Node, at: _Lengths) -> int:
    """Logits of a chunk of rows."""
    x, weight = (n.meta["val"] for n in node.all_input_nodes[:2])
    trained = value_bytes(weight) // 2 if argument_of(node, "needs_weight") else 0
    logits = ceil(int_hint(x.shape[0]) * at.grown(x)) * int_hint(weight.shape[0]) * x.element_size()
    return min(max(_LOGITS, trained), logits)


def _is_attention(node: Node) -> bool:
    return "attention" in _name(node) and sum(_is_heads(n) for n in node.all_input_nodes) > 1


def _is_heads(node: Node) -> bool:
    """(batch, heads, length, size)."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4


def argument_of(node: Node, name: str) -> Any:
    """The argument called ``name`` in the op's schema; None where it is not given or not there."""
    if name in node.kwargs:
        return node.kwargs[name]
    for given, argument in zip(node.args, _arguments(node), strict=False):
        if argument.name == name:
            return given
    return None


def _arguments(node: Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    return schema.arguments if schema is not None else []
