"""Row-wise rules of the operations that move, cut and join dimensions.

What they refuse: to merge tokens with another dimension, or to split, pick, repeat or join them.
"""

from collections.abc import Callable, Sequence
from types import EllipsisType, NoneType
from typing import Any

import torch
from torch import SymInt
from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.rowwise.ruling import (
    Mixes,
    Place,
    Rows,
    Rule,
    Ruling,
    argument,
    from_start,
    own_rows,
    rank,
    result_rank,
    tensors_in,
)
from rewriter.rowwise.sizes import product, same
from rewriter.signatures import target_name


def reshaped(node: Node, rows: Rows) -> Ruling:
    """Tokens stay a dimension of their own if there is as much before them as there was."""
    x = argument(node, 0, "input", "tensors")
    found = own_rows(x, rows)
    before, after = value_of(x).shape, value_of(node).shape
    for dim, size in enumerate(after):
        if same(size, before[found]) and product(after[:dim]) == product(before[:found]):
            return Ruling(dim, {x: found})
    raise Mixes("it merges tokens with another dimension")


def viewed(node: Node, rows: Rows) -> Ruling:
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        raise Mixes("it reads memory as another dtype")
    found = reshaped(node, rows)
    return Ruling(found.gives, found.takes, _size_at(node, found.gives))


def unflattened(node: Node, rows: Rows) -> Ruling:
    x = argument(node, 0, "input", "tensors")
    if from_start(argument(node, 1, "dim"), rank(x)) == own_rows(x, rows):
        raise Mixes("it splits the sequence")
    return reshaped(node, rows)


def squeezed(node: Node, rows: Rows) -> Ruling:
    if argument(node, 1, "dim") is None:
        raise Mixes("it would drop a tile of one token")
    return reshaped(node, rows)


def expanded(node: Node, rows: Rows) -> Ruling:
    x = argument(node, 0, "input", "tensors")
    found = own_rows(x, rows) + result_rank(node) - rank(x)
    return Ruling(found, {x: own_rows(x, rows)}, _size_at(node, found))


def repeated(node: Node, rows: Rows) -> Ruling:
    x = argument(node, 0, "input", "tensors")
    found = own_rows(x, rows) + result_rank(node) - rank(x)
    place, *inner = _size_at(node, found)
    times = argument(node, place)
    times = times[inner[0]] if inner else times
    if times != 1:
        raise Mixes("it repeats the sequence")
    return Ruling(found, {x: own_rows(x, rows)})


def moved(order: Callable[[Node, int], Sequence[int]]) -> Rule:
    """Permutes: ``order`` says which dimension of the operand each of the result's is."""

    def rule(node: Node, rows: Rows) -> Ruling:
        x = argument(node, 0, "input", "tensors")
        found = own_rows(x, rows)
        places = [from_start(d, rank(x)) for d in order(node, rank(x))]
        return Ruling(places.index(found), {x: found})

    return rule


def transposition(node: Node, ndim: int) -> list[int]:
    order = list(range(ndim))
    a, b = argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")
    order[a], order[b] = order[b], order[a]
    return order


def permutation(node: Node, ndim: int) -> Sequence[int]:
    dims = argument(node, 1, "dims")
    return dims if isinstance(dims, (tuple, list)) else [argument(node, 1 + i) for i in range(ndim)]


def concatenated(node: Node, rows: Rows) -> Ruling:
    tensors, dim = argument(node, 0, "input", "tensors"), argument(node, 1, "dim", "axis", default=0)
    if len(tensors) != len(tensors_in(tensors)):
        raise Mixes("it reads what is no tensor")
    found = {rows(x) for x in tensors} - {None}
    if len(found) != 1:
        raise Mixes("tokens meet in it")
    (place,) = found
    assert place is not None
    if target_name(node) == "stack":
        at = from_start(dim, rank(tensors[0]) + 1)
        return Ruling(place + (at <= place), dict.fromkeys(tensors, place))
    # An empty cache may be of one dimension.
    if from_start(dim, max(rank(x) for x in tensors)) == place:
        raise Mixes("it joins sequences")
    return Ruling(place, dict.fromkeys(tensors, place))


def along(position: int, default: Any = None, *, drops: bool = False, keeps: int | None = None) -> Rule:
    """Works along one dimension or several, none of which may be that of tokens.

    Args:
        position: of the argument ``dim``.
        default: of that argument; None: all dimensions.
        drops: whether the dimension is gone from the result.
        keeps: position of the argument ``keepdim``, with which it stays.
    """

    def rule(node: Node, rows: Rows) -> Ruling:
        x = argument(node, 0, "input", "tensors")
        found = own_rows(x, rows)
        dim = argument(node, position, "dim", "axis", default=default)
        if dim is None or isinstance(dim, (bool, Node)):
            raise Mixes("it works along all dimensions")
        dims = {from_start(d, rank(x)) for d in (dim if isinstance(dim, (tuple, list)) else [dim])}
        if found in dims:
            raise Mixes("it works along the sequence")
        kept = keeps is not None and argument(node, keeps, "keepdim", default=False)
        gone = sum(d < found for d in dims) if (drops or keeps is not None) and not kept else 0
        return Ruling(found - gone, {x: found})

    return rule


def scattered(node: Node, rows: Rows) -> Ruling:
    """Writes ``src``, a number or a tensor, where ``index`` says."""
    found = gathered(node, rows)
    return Ruling(
        found.gives, {**found.takes, **dict.fromkeys(tensors_in([argument(node, 3, "src")]), found.gives)}
    )


def gathered(node: Node, rows: Rows) -> Ruling:
    x, dim, index = (
        argument(node, 0, "input", "tensors"),
        argument(node, 1, "dim"),
        argument(node, 2, "index"),
    )
    found = own_rows(x, rows)
    if from_start(dim, rank(x)) == found or not same(value_of(index).shape[found], value_of(x).shape[found]):
        raise Mixes("it picks tokens")
    return Ruling(found, {x: found, index: found})


def repeat_interleaved(node: Node, rows: Rows) -> Ruling:
    if tensors_in([argument(node, 1, "repeats")]):
        raise Mixes("it repeats tokens")
    return along(2)(node, rows)


def indexed(node: Node, rows: Rows) -> Ruling:
    x, index = argument(node, 0), argument(node, 1)
    found = own_rows(x, rows)
    if isinstance(value_of(x), (tuple, list)):
        return Ruling(found, {x: found})
    taken = taken_of_each(index, rank(x))
    if taken is None:
        return _picked(x, list(index) if isinstance(index, tuple) else [index], found)
    item, place = taken[found]
    if item != slice(None):
        raise Mixes("it takes some of the tokens")
    return Ruling(place, {x: found})


def taken_of_each(index: Any, ndim: int) -> list[tuple[int | slice, int]] | None:
    """What ``index`` takes of each of ``ndim`` dimensions, and which dimension of the result that is.

    None where it holds anything but numbers, slices, None and ``...``.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, bool) or not isinstance(i, (int, slice, NoneType, EllipsisType)) for i in items):
        return None
    named = sum(isinstance(i, (int, slice)) for i in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    at = items.index(Ellipsis)
    items[at : at + 1] = [slice(None)] * (ndim - named)
    taken, place = [], 0
    for item in items:
        if item is not None:
            taken.append((item, place))
        place += not isinstance(item, int)
    return taken


def _picked(x: Node, items: list[Any], found: int) -> Ruling:
    """One list of numbers among full slices takes the place of its dimension."""
    lists = [i for i in items if isinstance(i, list) and all(isinstance(n, int) for n in i)]
    slices = [i for i in items if isinstance(i, slice)]
    if len(lists) != 1 or len(lists) + len(slices) != len(items):
        raise Mixes("it picks by a tensor")
    if found < len(items) and items[found] != slice(None):
        raise Mixes("it takes some of the tokens")
    return Ruling(found, {x: found})


def attribute(node: Node, rows: Rows) -> Ruling:
    if node.args[1] not in ("T", "mT") or rank(argument(node, 0, "input", "tensors")) != 2:
        raise Mixes(f"`{node.args[1]}` of all tokens")
    return moved(lambda _, __: (1, 0))(node, rows)


def _size_at(node: Node, dim: int) -> Place:
    """Where a node's arguments have the size of dimension ``dim``."""
    if node.kwargs or len(node.args) < 2:
        raise Mixes("its sizes are keywords")
    sizes = node.args[1]
    if isinstance(sizes, Node) and not isinstance(value_of(sizes), (int, SymInt)):
        raise Mixes("its sizes are one value")
    return (1, dim) if isinstance(sizes, (tuple, list)) else (1 + dim,)
