"""Rules of ``tokens`` for operations that compute elements: each by itself, over one axis, with weights."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import refuse
from rewriter.replay.tokens import ANY, COPY, Abstract, Reader, Tokens, axes, equal, expression

# What gives back the values that it is given.
SAME_VALUES = frozenset(
    ("to", "float", "half", "bfloat16", "long", "int", "type", "contiguous", "clone", "detach", "alias")
)


def sized(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    """Sizes, modes and attributes: no tensor is made."""
    if isinstance(value_of(node), (Tensor, torch.SymFloat, torch.SymBool)):
        raise refuse(node, name, "computes with the length")
    return None


def arithmetic(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    return (
        pointwise(node, name, args, reader)
        if isinstance(value_of(node), Tensor)
        else sized(node, name, args, reader)
    )


def pointwise(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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
        if not aligned or tokens.flat != first.flat or not equal(tokens.length, first.length):
            raise refuse(node, name, "combines different tokens")
    kept = name in SAME_VALUES and len(found) == 1
    tail = first.tail if kept else COPY if all(t.tail == COPY for _, t in found) else ANY
    return replace(first, axis=axis, tail=tail)


def reduction(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens, rank = reader.of(args[0]), value_of(args[0]).dim()
    if tokens is None:
        return None
    dim = args[1] if len(args) > 1 else node.kwargs.get("dim")
    if dim is None or not all(isinstance(d, int) for d in (dim if isinstance(dim, (tuple, list)) else [dim])):
        raise refuse(node, name, "reduces over tokens")
    dims = axes(dim, rank)
    if tokens.axis in dims:
        raise refuse(node, name, "reduces over tokens")
    dropped = 0 if value_of(node).dim() == rank else sum(d < tokens.axis for d in dims)
    return replace(tokens, axis=tokens.axis - dropped, tail=ANY)


def cumulative(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if tokens is None:
        return None
    if tokens.flat:
        raise refuse(node, name, "runs over the tokens of several rows")
    return replace(tokens, tail=ANY)


def linear(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if reader.tokens_in(args[1:]) or (tokens and tokens.axis == value_of(args[0]).dim() - 1):
        raise refuse(node, name, "sums over tokens")
    return tokens and replace(tokens, tail=ANY)


def matmul(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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


def embedding(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    tokens = reader.of(args[0])
    if reader.of(args[1]) is not None or (tokens is not None and tokens.tail != COPY):
        raise refuse(node, name, "would be given indices of padding that may not exist")
    return tokens and replace(tokens, tail=ANY)


def created(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
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


def dropout(node: Node, name: str, args: tuple, reader: Reader) -> Abstract:
    probability, training = args[1:3]
    if not isinstance(probability, (int, float)):
        raise refuse(node, name, "has a probability that is no constant")
    tokens = reader.of(args[0])
    if probability == 0.0 or training is False:
        return tokens
    reader.draws = True
    return tokens and replace(tokens, tail=ANY)
