"""Which values of a graph are rows of tokens, and whether more tokens behind the last one would change them.

A graph of symbolic length may be run on a longer input whose last tokens are padding. That is without effect
where every value keeps its *prefix*: along its axis of tokens, the longer run's value begins with the shorter
run's. The embedding of padded ids does; so does what is computed for each token by itself (norms, rotations,
products with weights, sums of such rows) and what a token takes from the tokens before it (causal attention,
cumulative sums). A loss does where the rows behind the prefix have the label that it ignores. As functions of
the weights the two runs are then one, so their gradients are equal too, up to the order of sums.

The proof is an abstract interpretation of the graph: a value is free of tokens (None) or ``Tokens``. An
operation without a rule here, or that mixes tokens in another way, raises ``Unproven`` with its name. Sizes
are compared as expressions; no guard is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.canonical import value_of
from rewriter.effects import mutated_argument
from rewriter.nested import checkpoint_body
from rewriter.signatures import positional, target_name

COPY, ANY = "copy", "any"


class Unproven(Exception):
    """Why padding is not proven to be without effect, or why nothing is known of an operation."""


@dataclass(frozen=True)
class Tokens:
    """A value whose rows along ``axis``, counted from the front, are tokens.

    Attributes:
        length: of the prefix, as an expression.
        tail: what rows behind the prefix hold: a number; ``COPY``, values that the prefix holds too, so that
            they are as good an index; or ``ANY``.
        flat: batch and tokens are one axis, of ``length`` tokens each.
    """

    axis: int
    length: sympy.Expr
    tail: float | str = ANY
    flat: bool = False


Abstract = Any  # None, Tokens, or a tuple of these
Rule = Callable[[Node, str, tuple, "Reader"], Abstract]


def expression(size: Any) -> sympy.Expr:
    """A size as an expression of symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def _sizes(value: Tensor) -> list[sympy.Expr]:
    return [expression(size) for size in value.shape]


@dataclass
class Reader:
    """Reads one graph node by node.

    Attributes:
        symbol: the length, None where the graph has none.
        draws: whether random numbers were drawn, for each element its own.
    """

    symbol: sympy.Symbol | None
    known: dict[Node, Abstract]
    draws: bool = False

    def mentions(self, value: Any) -> bool:
        """Whether a size or any size in a nest of arguments depends on the length."""
        value = value_of(value)
        if isinstance(value, torch.SymInt):
            return self.symbol in value.node.expr.free_symbols
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return True
        if isinstance(value, (tuple, list)):
            return any(map(self.mentions, value))
        if isinstance(value, slice):
            return any(map(self.mentions, (value.start, value.stop, value.step)))
        return False

    def axes(self, value: Tensor) -> list[int]:
        return [i for i, size in enumerate(value.shape) if self.mentions(size)]

    def of(self, value: Any) -> Abstract:
        return self.known.get(value) if isinstance(value, Node) else None

    def tokens_in(self, args: Iterable[Any]) -> list[tuple[Node, Tokens]]:
        """The arguments, nested ones included, that have tokens."""
        found = []
        for arg in args:
            if isinstance(arg, Node) and self.of(arg) is not None:
                found.append((arg, self.of(arg)))
            elif isinstance(arg, (tuple, list)):
                found += self.tokens_in(arg)
        return found

    def read(self, node: Node) -> Abstract:
        """What ``node``, a call, computes.

        Raises:
            Unproven: there is no rule for it, or its rule does not hold.
        """
        name = target_name(node)
        body = checkpoint_body(node)
        if body is not None:
            return self._read_body(node, body)
        if mutated_argument(node) is not None:
            raise Unproven(f"`{node.name}` writes in place")
        rule = RULES.get(name)
        if rule is None:
            raise Unproven(
                f"`{node.name}`, {name.rpartition('.')[2]}, is not known to treat tokens one by one"
            )
        found = rule(node, name, _in_order(node, name), self)
        self._check(node, value_of(node), found)
        return found

    def _read_body(self, node: Node, body: GraphModule) -> Abstract:
        """The results of an activation checkpoint, whose body is a graph of its own."""
        inputs = body.graph.find_nodes(op="placeholder")
        if len(inputs) != len(node.args) - 1:
            raise refuse(node, "checkpoint", "has inputs that are not in its graph")
        inner = Reader(self.symbol, {i: self.of(arg) for i, arg in zip(inputs, node.args[1:], strict=True)})
        for each in body.graph.nodes:
            if each.op in ("call_function", "call_method"):
                inner.known[each] = inner.read(each)
        self.draws |= inner.draws
        (output,) = body.graph.find_nodes(op="output")
        results = output.args[0]
        return tuple(map(inner.of, results)) if isinstance(results, (tuple, list)) else inner.of(results)

    def _check(self, node: Node, value: Any, found: Abstract) -> None:
        """The shape that tracing saw is what the rule says: a slip of a rule is refused here."""
        if isinstance(value, (tuple, list)) and isinstance(found, tuple):
            for part, abstract in zip(value, found, strict=True):
                self._check(node, part, abstract)
            return
        if not isinstance(value, Tensor):
            return
        axes = self.axes(value)
        if axes != ([] if found is None else [found.axis]):
            raise Unproven(f"`{node.name}` of shape {tuple(value.shape)} has no single axis of tokens")
        if (
            found is not None
            and not found.flat
            and not _equal(expression(value.shape[found.axis]), found.length)
        ):
            raise Unproven(f"`{node.name}` of shape {tuple(value.shape)} has another number of tokens")


# Keywords that say nothing about where elements come from, and those that the rules read themselves.
_KEYWORDS = {
    *("dtype", "device", "layout", "pin_memory", "requires_grad", "memory_format", "non_blocking", "copy"),
    *("rounding_mode", "alpha", "approximate", "min", "max"),
}


def _in_order(node: Node, name: str) -> tuple:
    """The arguments in order, without keywords where their order is not known."""
    args = positional(name, node)
    if not node.kwargs or name.startswith("rewriter.") or args != (*node.args, *sorted(node.kwargs.items())):
        return args
    if name not in _REDUCTIONS and not _KEYWORDS.issuperset(node.kwargs):
        raise refuse(node, name, f"has keywords {', '.join(node.kwargs)}")
    return node.args


def refuse(node: Node, name: str, why: str) -> Unproven:
    return Unproven(f"`{node.name}`, {name.rpartition('.')[2]}, {why}")


# Rules. Each takes a node, its name, its arguments in order, and the reader.


def _sized(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Sizes, modes and attributes: no tensor is made."""
    if isinstance(value_of(node), (Tensor, torch.SymFloat, torch.SymBool)):
        raise refuse(node, name, "computes with the length")
    return None


def _arithmetic(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    return (
        _pointwise(node, name, args, reader)
        if isinstance(value_of(node), Tensor)
        else _sized(node, name, args, reader)
    )


def _pointwise(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Each element from the elements at its place: tokens must meet tokens."""
    flat_args = [*args, *node.kwargs.values()]
    for arg in flat_args:
        if not isinstance(value_of(arg), Tensor) and reader.mentions(arg):
            raise refuse(node, name, "computes with the length")
    found = reader.tokens_in(flat_args)
    if not found:
        return None
    rank = value_of(node).dim()
    first = found[0][1]
    axis = first.axis + rank - value_of(found[0][0]).dim()
    for operand, tokens in found:
        aligned = tokens.axis + rank - value_of(operand).dim() == axis
        if not aligned or tokens.flat != first.flat or not _equal(tokens.length, first.length):
            raise refuse(node, name, "combines different tokens")
    kept = name in _KEEPING and len(found) == 1
    tail = first.tail if kept else COPY if all(t.tail == COPY for _, t in found) else ANY
    return replace(first, axis=axis, tail=tail)


def _dims(dim: Any, rank: int) -> list[int]:
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return [d % rank for d in dims]


def _reduction(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens, rank = reader.of(args[0]), value_of(args[0]).dim()
    if tokens is None:
        return None
    dim = args[1] if len(args) > 1 else node.kwargs.get("dim")
    if dim is None or not all(isinstance(d, int) for d in (dim if isinstance(dim, (tuple, list)) else [dim])):
        raise refuse(node, name, "reduces over tokens")
    dims = _dims(dim, rank)
    if tokens.axis in dims:
        raise refuse(node, name, "reduces over tokens")
    dropped = 0 if value_of(node).dim() == rank else sum(d < tokens.axis for d in dims)
    return replace(tokens, axis=tokens.axis - dropped, tail=ANY)


def _cumulative(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    if tokens.flat:
        raise refuse(node, name, "runs over the tokens of several rows")
    return replace(tokens, tail=ANY)


def _linear(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if reader.tokens_in(args[1:]) or (tokens and tokens.axis == value_of(args[0]).dim() - 1):
        raise refuse(node, name, "sums over tokens")
    return tokens and replace(tokens, tail=ANY)


def _matmul(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    left, right = reader.of(args[0]), reader.of(args[1])
    ranks = [value_of(a).dim() for a in args[:2]]
    rank = value_of(node).dim()
    if left is None and right is None:
        return None
    if (left is not None and right is not None) or min(ranks) < 2:
        raise refuse(node, name, "multiplies tokens with tokens")
    if left is not None:
        if left.axis == ranks[0] - 1:
            raise refuse(node, name, "sums over tokens")
        return replace(left, axis=left.axis + rank - ranks[0], tail=ANY)
    if right is None or right.axis != ranks[1] - 1:
        raise refuse(node, name, "sums over tokens")
    return replace(right, axis=rank - 1, tail=ANY)


def _embedding(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if reader.of(args[1]) is not None or (tokens is not None and tokens.tail != COPY):
        raise refuse(node, name, "would be given indices of padding that may not exist")
    return tokens and replace(tokens, tail=ANY)


def _reshape(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    before, after = _sizes(value_of(args[0])), _sizes(value_of(node))
    lead, rest = prod(before[: tokens.axis], start=sympy.Integer(1)), before[tokens.axis + 1 :]
    rows = lead * before[tokens.axis]
    for axis, size in enumerate(after):
        same_rest = _equal(
            prod(after[axis + 1 :], start=sympy.Integer(1)), prod(rest, start=sympy.Integer(1))
        )
        if not same_rest or reader.symbol not in size.free_symbols:
            continue
        if _equal(size, tokens.length):
            return replace(tokens, axis=axis, flat=False)
        if _equal(size, rows):
            return replace(tokens, axis=axis, flat=True)
    raise refuse(node, name, "mixes tokens with another axis")


def _permute(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    rank = value_of(args[0]).dim()
    order = list(range(rank))
    if name == "permute":
        dims = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        order = _dims(dims, rank)
    else:
        a, b = (-2, -1) if name in ("t", "getattr") else args[1:3]
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return replace(tokens, axis=order.index(tokens.axis))


def _attribute(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    if not isinstance(value_of(node), Tensor):
        return _sized(node, name, args, reader)
    if args[1] not in ("T", "mT"):
        raise refuse(node, name, f"of `{args[1]}` has no rule")
    return _permute(node, name, args, reader)


def _unsqueeze(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    at = args[1] % value_of(node).dim()
    return tokens and replace(tokens, axis=tokens.axis + (at <= tokens.axis))


def _squeeze(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens, rank = reader.of(args[0]), value_of(args[0]).dim()
    if tokens is None:
        return None
    if len(args) != 2 or not isinstance(args[1], int):
        raise refuse(node, name, "names no axis")
    dropped = value_of(node).dim() < rank and args[1] % rank < tokens.axis
    return replace(tokens, axis=tokens.axis - dropped)


def _expand(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    shift = value_of(node).dim() - value_of(args[0]).dim()
    return tokens and replace(tokens, axis=tokens.axis + shift)


def _getitem(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    source, index = args
    if not isinstance(value_of(source), Tensor):
        known = reader.of(source)
        return known[index] if isinstance(known, tuple) else None
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in items):
        raise refuse(node, name, "is indexed by a tensor")
    tokens, rank = reader.of(source), value_of(source).dim()
    if tokens is None:
        return None
    taken = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - taken)
    items += [slice(None)] * (rank - sum(i is not None for i in items))
    before, after = -1, -1
    for item in items:
        before += item is not None
        after += not isinstance(item, int)
        if item is not None and before == tokens.axis:
            return _sliced(node, name, item, replace(tokens, axis=after), reader)
    raise refuse(node, name, "has no axis of tokens")


def _sliced(node: Node, name: str, item: Any, tokens: Tokens, reader: Reader) -> Abstract:
    """``item`` of an axis of tokens: a prefix stays one behind any start, before any distance to the end."""
    if item == slice(None):
        return tokens
    if not tokens.flat and _is_first(item):
        return None
    if not isinstance(item, slice) or item.step not in (None, 1):
        raise refuse(node, name, "takes single tokens")
    start, stop = item.start or 0, item.stop
    end = expression(value_of(stop)) if isinstance(value_of(stop), torch.SymInt) else None
    whole = stop is None or (end is not None and _equal(end, tokens.length))
    cut = 0 if whole else stop
    if not isinstance(start, int) or not isinstance(cut, int) or start < 0 or cut > 0:
        raise refuse(node, name, "takes tokens from the end")
    if start == 0 and cut == 0:
        return tokens
    if tokens.flat:
        raise refuse(node, name, "slices the tokens of several rows")
    # What is cut off the end of the shorter run stays in the longer one, before its padding.
    return replace(tokens, length=tokens.length - start + cut, tail=ANY if cut else tokens.tail)


def _is_first(item: Any) -> bool:
    """Whether it takes a number of first tokens, or one of them: those are the same without padding."""
    if isinstance(item, slice):
        first, last = item.start or 0, item.stop
        return item.step in (None, 1) and type(first) is int and type(last) is int and 0 <= first < last
    return type(item) is int and item >= 0


def _diff(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Differences of neighbours: each token sees the one before it."""
    source, order, dim, prepended, appended = args
    tokens = reader.of(source)
    if tokens is None and not reader.tokens_in(args):
        return None
    along = tokens is not None and dim % value_of(source).dim() == tokens.axis
    if tokens is None or tokens.flat or order != 1 or appended is not None or not along:
        raise refuse(node, name, "combines different tokens")
    if reader.of(prepended) is not None:
        raise refuse(node, name, "joins tokens")
    before = 0 if prepended is None else value_of(prepended).shape[tokens.axis]
    return replace(tokens, length=tokens.length - 1 + before, tail=ANY)


def _pad(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens, (_, pads, mode, value) = reader.of(args[0]), args
    if tokens is None:
        return None
    if mode != "constant" or not all(isinstance(p, int) and p >= 0 for p in pads):
        raise refuse(node, name, "pads with something else than a number")
    pairs = dict(enumerate(zip(pads[::2], pads[1::2], strict=True)))
    left, right = pairs.get(value_of(args[0]).dim() - 1 - tokens.axis, (0, 0))
    if right and (tokens.flat or tokens.tail != (value or 0)):
        raise refuse(node, name, "appends to the tokens what padding does not hold")
    if left and tokens.flat:
        raise refuse(node, name, "pads the tokens of several rows")
    tail = ANY if tokens.tail == COPY and left else tokens.tail
    return replace(tokens, length=tokens.length + left + right, tail=tail)


def _cat(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    found = reader.tokens_in([args[0]])
    if not found:
        return None
    first = found[0][1]
    dim = args[1] % value_of(node).dim()
    if name == "stack":
        first = replace(first, axis=first.axis + (dim <= first.axis))
    if dim == first.axis and name == "cat":
        raise refuse(node, name, "joins tokens")
    if any(t.axis != found[0][1].axis or t.flat != first.flat or not _equal(t.length, first.length)
           for _, t in found):  # fmt: skip
        raise refuse(node, name, "combines different tokens")
    return replace(first, tail=ANY)


def _split(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    dim = (*args, 0)[1] if name == "unbind" else args[2]
    rank = value_of(args[0]).dim()
    if dim % rank == tokens.axis:
        raise refuse(node, name, "parts tokens")
    axis = tokens.axis - (name == "unbind" and dim % rank < tokens.axis)
    return (replace(tokens, axis=axis),) * len(value_of(node))


def _repeat_interleave(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    if not isinstance(args[2], int) or args[2] % value_of(args[0]).dim() == tokens.axis:
        raise refuse(node, name, "repeats tokens")
    return tokens


def _created(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Positions, and constants of the length's size."""
    value = value_of(node)
    axes = reader.axes(value)
    if not axes:
        if reader.mentions([*args, *node.kwargs.values()]):
            raise refuse(node, name, "computes with the length")
        return None
    if len(axes) > 1 or reader.tokens_in(args) and not name.endswith("_like"):
        raise refuse(node, name, "has no single axis of tokens")
    counted = len(args) == 1 or (len(args) == 2 and args[0] == 0)
    if name == "arange" and not (counted and {"start", "step", "end"}.isdisjoint(node.kwargs)):
        raise refuse(node, name, "does not count from 0")
    if name.startswith("full") and reader.mentions(args[1:]):
        raise refuse(node, name, "computes with the length")
    tail = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1}.get(name, ANY)
    return Tokens(axes[0], expression(value.shape[axes[0]]), tail)


def _dropout(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    probability, training = args[1:3]
    if not isinstance(probability, (int, float)):
        raise refuse(node, name, "has a probability that is no constant")
    tokens = reader.of(args[0])
    if probability == 0.0 or training is False:
        return tokens
    reader.draws = True
    return tokens and replace(tokens, tail=ANY)


def _all_at(node: Node, name: str, values: Iterable[Any], from_end: int, reader: Reader) -> Tokens | None:
    """The tokens of ``values``, all at one axis counted from the end, or all without."""
    values = [v for v in values if isinstance(v, Node)]
    found = [(v, reader.of(v)) for v in values if reader.of(v) is not None]
    if not found:
        return None
    first = found[0][1]
    for value, tokens in found:
        placed = tokens.axis == value_of(value).dim() - from_end and not tokens.flat
        if not placed or not _equal(tokens.length, first.length):
            raise refuse(node, name, "combines different tokens")
    if len(found) < len(values):
        raise refuse(node, name, "combines tokens with what has none")
    return replace(first, tail=ANY)


def _attention(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Causal attention: a query sees no key behind it, so no padding."""
    q, k, v, *rest = node.args
    given = node.kwargs
    if name == "scaled_dot_product_attention":
        _, _, _, mask, dropout, causal, *_ = args
        causal = causal is True and mask is None
    elif name.endswith(".attention"):
        causal, dropout = given.get("causal") is True, 0.0
        rows = [given.get("segments"), given.get("key_mask")]
        if any(t is not None and t.axis != value_of(n).dim() - 1 for n in rows if n for t in [reader.of(n)]):
            raise refuse(node, name, "has a mask of another form")
        if reader.of(given.get("sinks")) is not None:
            raise refuse(node, name, "has sinks that depend on tokens")
    else:
        causal, dropout = name.endswith(".causal_attention"), given.get("dropout", 0.0)
        dropout = rest[1] if len(rest) > 1 else dropout
    if dropout != 0.0:
        raise refuse(node, name, "draws random numbers")
    found = _all_at(node, name, (q, k, v), 2, reader)
    if found is not None and not causal:
        raise refuse(node, name, "is not proven to be causal")
    return found and replace(found, axis=value_of(node).dim() - 2)


def _rows(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Our fused ops over the last dimension: norms, gates, linears. All tensors with tokens are of a form."""
    found = reader.tokens_in([*node.args, *node.kwargs.values()])
    if not found:
        return None
    first = found[0][1]
    for operand, tokens in found:
        if tokens.axis == value_of(operand).dim() - 1 or replace(tokens, tail=ANY) != replace(
            first, tail=ANY
        ):
            raise refuse(node, name, "combines different tokens")
    result, value = replace(first, tail=ANY), value_of(node)
    return (result,) * len(value) if isinstance(value, (tuple, list)) else result


def _rotation(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    found = reader.tokens_in([*node.args, *node.kwargs.values()])
    if not found:
        return None
    first = found[0][1]
    rank = value_of(node.args[0]).dim()
    for operand, tokens in found:
        aligned = tokens.axis - value_of(operand).dim() == first.axis - rank
        if not aligned or tokens.flat or tokens.axis == value_of(operand).dim() - 1:
            raise refuse(node, name, "combines different tokens")
        if not _equal(tokens.length, first.length):
            raise refuse(node, name, "combines different tokens")
    result, value = replace(first, tail=ANY), value_of(node)
    if not isinstance(value, (tuple, list)):
        return result
    return tuple(None if v is None else result for v in value)


def _head_and_loss(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    x, _, _, target = node.args
    rows, labels = reader.of(x), reader.of(target)
    if rows is None and labels is None:
        return None
    others = reader.tokens_in([*node.args[1:3], *node.kwargs.values()])
    if rows is None or labels is None or others or not _equal(rows.length, labels.length):
        raise refuse(node, name, "combines different tokens")
    if rows.axis != value_of(x).dim() - 2 or labels.axis != value_of(target).dim() - 1:
        raise refuse(node, name, "has rows of another order")
    if labels.tail != node.kwargs.get("ignore_index", -100):
        raise refuse(node, name, "would count padding, whose label is not proven to be ignored")
    return None


_REDUCTIONS = ("mean", "sum", "amax", "amin", "softmax", "log_softmax", "var", "any", "all")
_SAME_VALUES = "to float half bfloat16 long int type contiguous clone detach alias"
_KEEPING = frozenset(_SAME_VALUES.split())
_NAMES: dict[str, Rule] = {
    "add sub mul div neg pow floordiv": _arithmetic,
    "square abs sqrt rsqrt reciprocal exp log cos sin tanh sigmoid silu relu gelu softplus erf eq ne le lt "
    "ge gt and_ or_ logical_not bitwise_not __invert__ invert where masked_fill clamp minimum maximum "
    "type_as relu6 leaky_relu elu mish": _pointwise,
    _SAME_VALUES: _pointwise,
    " ".join(_REDUCTIONS): _reduction,
    "cumsum": _cumulative,
    "linear": _linear,
    "matmul bmm": _matmul,
    "embedding": _embedding,
    "view reshape flatten unflatten _unsafe_view": _reshape,
    "transpose permute swapaxes t": _permute,
    "getattr": _attribute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand broadcast_to expand_as": _expand,
    "getitem": _getitem,
    "pad": _pad,
    "diff": _diff,
    "cat stack": _cat,
    "split chunk unbind": _split,
    "repeat_interleave": _repeat_interleave,
    "arange zeros ones full empty zeros_like ones_like full_like": _created,
    "dropout": _dropout,
    "scaled_dot_product_attention": _attention,
    "size dim _set_grad_enabled _enter_autocast _exit_autocast sym_size": _sized,
}
_OURS: dict[str, Rule] = {
    "attention.attention attention_unmasked.causal_attention attention_unmasked.full_attention": _attention,
    "rms_norm.rms_norm rms_norm.add_rms_norm layer_norm.layer_norm layer_norm.add_layer_norm "
    "gated_activation.gated_activation gated_activation.gated_activation_packed clamped_gate.clamped_gate "
    "lora_linear.lora_linear lora_linear.lora_linears lora_linear.linear_4bit": _rows,
    "rotary.rotary rotary.rotary_one": _rotation,
    "linear_cross_entropy.linear_cross_entropy": _head_and_loss,
}
RULES: dict[str, Rule] = {name: rule for names, rule in _NAMES.items() for name in names.split()}
RULES |= {f"rewriter.kernels.{name}": rule for names, rule in _OURS.items() for name in names.split()}
