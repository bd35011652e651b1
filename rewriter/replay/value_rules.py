"""Rules of ``tokens`` for operations that make elements: positions, constants, embeddings, random numbers."""

from dataclasses import replace

from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import in_order, refuse
from rewriter.replay.row_wise import row_wise
from rewriter.replay.tokens import ANY, COPY, Abstract, Reader, Tokens
from rewriter.rowwise.sizes import expression


def cumulative(node: Node, name: str, reader: Reader) -> Abstract:
    x, dim, _ = in_order(node, name)
    tokens = reader.of(x)
    if tokens is None or dim % value_of(x).dim() != tokens.axis:
        return row_wise(node, name, reader)
    if tokens.flat:
        raise refuse(node, name, "runs over the tokens of several rows")
    return replace(tokens, tail=ANY)


def embedding(node: Node, name: str, reader: Reader) -> Abstract:
    args = in_order(node, name)
    tokens = reader.of(args[0])
    if reader.of(args[1]) is not None or (tokens is not None and tokens.tail != COPY):
        raise refuse(node, name, "would be given indices of padding that may not exist")
    return tokens and replace(tokens, tail=ANY)


def created(node: Node, name: str, reader: Reader) -> Abstract:
    """Positions, and constants of the length's size."""
    args = in_order(node, name)
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


def dropout(node: Node, name: str, reader: Reader) -> Abstract:
    args = in_order(node, name)
    probability, training = args[1:3]
    if not isinstance(probability, (int, float)):
        raise refuse(node, name, "has a probability that is no constant")
    if probability == 0.0 or training is False:
        return reader.of(args[0])
    reader.draws = True
    tokens = reader.of(args[0])
    return tokens and replace(tokens, tail=ANY)


def seeds(node: Node, name: str, reader: Reader) -> Abstract:
    """Of dropout by position, which is row-wise: padding changes no number of a token's."""
    reader.draws = True
    return None
