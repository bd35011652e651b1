"""Rules of ``tokens`` for operations that move elements: views, slices, joins, neighbours."""

from dataclasses import replace
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import refuse
from rewriter.replay.tokens import ANY, COPY, Abstract, Reader, Tokens, axes, equal, expression, sizes


def reshape(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    before, after = sizes(value_of(args[0])), sizes(value_of(node))
    lead, rest = prod(before[: tokens.axis], start=sympy.Integer(1)), before[tokens.axis + 1 :]
    rows = lead * before[tokens.axis]
    for axis, size in enumerate(after):
        same_rest = equal(prod(after[axis + 1 :], start=sympy.Integer(1)), prod(rest, start=sympy.Integer(1)))
        if not same_rest or reader.symbol not in size.free_symbols:
            continue
        if equal(size, tokens.length):
            return replace(tokens, axis=axis, flat=False)
        if equal(size, rows):
            return replace(tokens, axis=axis, flat=True)
    raise refuse(node, name, "mixes tokens with another axis")


def permute(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    rank = value_of(args[0]).dim()
    order = list(range(rank))
    if name == "permute":
        dims = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        order = axes(dims, rank)
    else:
        a, b = (-2, -1) if name in ("t", "getattr") else args[1:3]
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return replace(tokens, axis=order.index(tokens.axis))


def attribute(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    if not isinstance(value_of(node), Tensor):
        return None
    if args[1] not in ("T", "mT"):
        raise refuse(node, name, f"of `{args[1]}` has no rule")
    return permute(node, name, args, reader)


def unsqueeze(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    at = args[1] % value_of(node).dim()
    return tokens and replace(tokens, axis=tokens.axis + (at <= tokens.axis))


def squeeze(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens, rank = reader.of(args[0]), value_of(args[0]).dim()
    if tokens is None:
        return None
    if len(args) != 2 or not isinstance(args[1], int):
        raise refuse(node, name, "names no axis")
    dropped = value_of(node).dim() < rank and args[1] % rank < tokens.axis
    return replace(tokens, axis=tokens.axis - dropped)


def expand(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    shift = value_of(node).dim() - value_of(args[0]).dim()
    return tokens and replace(tokens, axis=tokens.axis + shift)


def getitem(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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
    whole = stop is None or (end is not None and equal(end, tokens.length))
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


def diff(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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


def pad(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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


def cat(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    found = reader.tokens_in([args[0]])
    if not found:
        return None
    first = found[0][1]
    dim = args[1] % value_of(node).dim()
    if name == "stack":
        first = replace(first, axis=first.axis + (dim <= first.axis))
    if dim == first.axis and name == "cat":
        raise refuse(node, name, "joins tokens")
    if any(t.axis != found[0][1].axis or t.flat != first.flat or not equal(t.length, first.length)
           for _, t in found):  # fmt: skip
        raise refuse(node, name, "combines different tokens")
    return replace(first, tail=ANY)


def split(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    dim = (*args, 0)[1] if name == "unbind" else args[2]
    rank = value_of(args[0]).dim()
    if dim % rank == tokens.axis:
        raise refuse(node, name, "parts tokens")
    axis = tokens.axis - (name == "unbind" and dim % rank < tokens.axis)
    return (replace(tokens, axis=axis),) * len(value_of(node))


def repeat_interleave(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    if not isinstance(args[2], int) or args[2] % value_of(args[0]).dim() == tokens.axis:
        raise refuse(node, name, "repeats tokens")
    return tokens
