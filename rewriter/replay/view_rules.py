"""Rules of ``tokens`` for what moves elements from token to token: one axis of batch and tokens, prefixes,
neighbours.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import in_order, refuse
from rewriter.replay.row_wise import row_wise
from rewriter.replay.tokens import ANY, COPY, Abstract, Reader, Tokens
from rewriter.rowwise.shape_rules import taken_of_each
from rewriter.rowwise.sizes import expression, product, same


def reshape(node: Node, name: str, reader: Reader) -> Abstract:
    """Batch and tokens may become one axis, and two again."""
    tokens = reader.of(node.args[0])
    if tokens is None:
        return row_wise(node, name, reader)
    before, after = value_of(node.args[0]).shape, value_of(node).shape
    rows, rest = product(before[: tokens.axis + 1]), product(before[tokens.axis + 1 :])
    for axis, size in enumerate(after):
        if not same(product(after[axis + 1 :]), rest) or not reader.mentions(size):
            continue
        if same(size, tokens.length):
            return replace(tokens, axis=axis, flat=False)
        if same(size, rows):
            return replace(tokens, axis=axis, flat=True)
    raise refuse(node, name, "mixes tokens with another axis")


def getitem(node: Node, name: str, reader: Reader) -> Abstract:
    source, index = in_order(node, name)
    known, value = reader.of(source), value_of(source)
    if not isinstance(value, Tensor):
        return known[index] if isinstance(known, tuple) else None
    taken = taken_of_each(index, value.dim())
    if taken is None:
        raise refuse(node, name, "is indexed by a tensor")
    if known is None:
        return None
    item, axis = taken[known.axis]
    return _sliced(node, name, item, replace(known, axis=axis))


def _sliced(node: Node, name: str, item: Any, tokens: Tokens) -> Abstract:
    """``item`` of an axis of tokens: a prefix stays one behind any start, before any distance to the end."""
    if item == slice(None):
        return tokens
    if not tokens.flat and _is_first(item):
        return None
    if not isinstance(item, slice) or item.step not in (None, 1):
        raise refuse(node, name, "takes single tokens")
    start, stop = item.start or 0, item.stop
    end = expression(value_of(stop)) if isinstance(value_of(stop), torch.SymInt) else None
    whole = stop is None or (end is not None and same(end, tokens.length))
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


def diff(node: Node, name: str, reader: Reader) -> Abstract:
    """Differences of neighbours: each token sees the one before it."""
    source, order, dim, prepended, appended = args = in_order(node, name)
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


def pad(node: Node, name: str, reader: Reader) -> Abstract:
    x, pads, mode, value = in_order(node, name)
    tokens = reader.of(x)
    if tokens is None:
        return None
    if mode != "constant" or not all(isinstance(p, int) and p >= 0 for p in pads):
        raise refuse(node, name, "pads with something else than a number")
    pairs = dict(enumerate(zip(pads[::2], pads[1::2], strict=True)))
    left, right = pairs.get(value_of(x).dim() - 1 - tokens.axis, (0, 0))
    if right and (tokens.flat or tokens.tail != (value or 0)):
        raise refuse(node, name, "appends to the tokens what padding does not hold")
    if left and tokens.flat:
        raise refuse(node, name, "pads the tokens of several rows")
    tail = ANY if tokens.tail == COPY and left else tokens.tail
    return replace(tokens, length=tokens.length + left + right, tail=tail)
