"""Rules of ``tokens`` for attention and the loss, which read other tokens than their own."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import in_order, refuse
from rewriter.replay.tokens import ANY, Abstract, Reader, Tokens
from rewriter.rowwise.sizes import same


def _all_at(node: Node, name: str, values: Iterable[Any], from_end: int, reader: Reader) -> Tokens | None:
    """The tokens of ``values``, all at one axis counted from the end, or all without."""
    values = [v for v in values if isinstance(v, Node)]
    found = [(v, reader.of(v)) for v in values if reader.of(v) is not None]
    if not found:
        return None
    first = found[0][1]
    for value, tokens in found:
        placed = tokens.axis == value_of(value).dim() - from_end and not tokens.flat
        if not placed or not same(tokens.length, first.length):
            raise refuse(node, name, "combines different tokens")
    if len(found) < len(values):
        raise refuse(node, name, "combines tokens with what has none")
    return replace(first, tail=ANY)


def attention(node: Node, name: str, reader: Reader) -> Abstract:
    """Causal attention: a query sees no key behind it, so no padding."""
    q, k, v, *rest = node.args
    given = node.kwargs
    if name == "scaled_dot_product_attention":
        _, _, _, mask, dropout, causal, *_ = in_order(node, name)
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


def weight_from_host(node: Node, name: str, reader: Reader) -> Abstract:
    """It is read where its first argument is, of which it has nothing."""
    if reader.of(node.args[1]) is not None:
        raise refuse(node, name, "is given tokens for a weight")
    return None


def head_and_loss(node: Node, name: str, reader: Reader) -> Abstract:
    x, _, _, target = node.args
    rows, labels = reader.of(x), reader.of(target)
    if rows is None and labels is None:
        return None
    others = reader.tokens_in([*node.args[1:3], *node.kwargs.values()])
    if rows is None or labels is None or others or not same(rows.length, labels.length):
        raise refuse(node, name, "combines different tokens")
    if rows.axis != value_of(x).dim() - 2 or labels.axis != value_of(target).dim() - 1:
        raise refuse(node, name, "has rows of another order")
    if labels.tail != node.kwargs.get("ignore_index", -100):
        raise refuse(node, name, "would count padding, whose label is not proven to be ignored")
    return None
