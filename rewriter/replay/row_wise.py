"""Operations that treat tokens one by one keep the prefix: ``rewriter.rowwise`` says which do.

If a slice of a result is the result on slices, so is the slice that begins with the first token.
"""

from collections.abc import Iterable
from typing import Any

from torch import SymBool, SymFloat, Tensor
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.replay.arguments import Unproven, refuse
from rewriter.replay.tokens import ANY, COPY, Abstract, Reader, Tokens
from rewriter.rowwise.rules import ruling
from rewriter.rowwise.ruling import Mixes, Ruling
from rewriter.rowwise.sizes import same

# What gives the elements of its first operand and no others.
_MOVES = frozenset(
    (
        *("to", "float", "half", "bfloat16", "double", "long", "int", "type", "type_as"),
        *("contiguous", "clone", "detach", "alias", "expand", "expand_as", "broadcast_to"),
        *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
        *("transpose", "swapaxes", "swapdims", "permute", "t", "getattr"),
        *("split", "chunk", "unbind", "repeat_interleave"),
    )
)


def row_wise(node: Node, name: str, reader: Reader) -> Abstract:
    """What ``node`` computes, if it is row-wise and its operands have the same tokens."""
    value, arguments = value_of(node), [*node.args, *node.kwargs.values()]
    if not isinstance(value, (Tensor, tuple, list)):
        return sized(node, name, reader)
    operands = reader.tokens_in(arguments)
    if not operands:
        if reader.mentions(arguments):
            raise refuse(node, name, "computes with the length")
        return None
    try:
        found = ruling(node, lambda operand: _axis(reader.of(operand)))
    except Mixes as reason:
        raise Unproven(f"`{node.name}`, {name.rpartition('.')[2]}: {reason}") from None
    if _reads_length(node, found, reader):
        raise refuse(node, name, "computes with the length")
    (_, first), *_ = operands
    for operand, tokens in operands:
        alike = tokens.flat == first.flat and same(tokens.length, first.length)
        if not alike or found.takes.get(operand) != tokens.axis:
            raise refuse(node, name, "combines different tokens")
    if any(axis is not None and reader.of(operand) is None for operand, axis in found.takes.items()):
        raise refuse(node, name, "combines tokens with what has none")
    result = Tokens(found.gives, first.length, _tail(node, name, operands, reader), first.flat)
    if isinstance(value, Tensor):
        return result
    return tuple(None if each is None else result for each in value)


def _axis(known: Abstract) -> int | None:
    return known.axis if isinstance(known, Tokens) else None


def _reads_length(node: Node, found: Ruling, reader: Reader) -> bool:
    """Whether a number that depends on the length is among the arguments, but for the size of the result."""
    args: list[Any] = list(node.args)
    if found.size is not None:
        place, *inner = found.size
        args[place] = [size for i, size in enumerate(args[place]) if [i] != inner] if inner else None
    return reader.mentions([*args, *node.kwargs.values()])


def _tail(node: Node, name: str, operands: Iterable[tuple[Node, Tokens]], reader: Reader) -> float | str:
    """Of copies of the last row it makes copies of its own last row."""
    if name in _MOVES:
        moved = reader.of(node.args[0])
        return ANY if moved is None else moved.tail
    return COPY if all(tokens.tail == COPY for _, tokens in operands) else ANY


def sized(node: Node, name: str, reader: Reader) -> Abstract:
    """Sizes, modes and attributes: no tensor is made."""
    if isinstance(value_of(node), (Tensor, SymFloat, SymBool)):
        raise refuse(node, name, "computes with the length")
    return None
