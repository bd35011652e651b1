"""A program cut at its waists, and the pieces joined to blocks that repeat: the layers, and kinds of them.

Each piece, from one waist to the next, gets a hash of its structure. The pieces of a decoder then read as
``p a m a m a m e``: attention and MLP between a beginning and an end. Which of the pieces make a layer is
decided by what it saves: blocks of some number of pieces, from some offset, so that few operations are
compiled (each kind of block once) and few blocks are called. A block never holds a piece twice, so that a
model with two kinds of layers gives two kinds of blocks, not one of both.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from rewriter.effects import is_impure
from rewriter.regions.align import counterpart
from rewriter.regions.invariants import is_random
from rewriter.regions.signature import structure
from rewriter.regions.waists import Units, operations

# The least share of all operations that must be spared for a graph to be cut.
_WORTH = 0.1


@dataclass(frozen=True)
class Block:
    """Nodes that become one region, in the graph's order; ``kind`` is equal for equal structure."""

    kind: str
    nodes: tuple[Node, ...]


def levels(units: Units, waists: Sequence[Node], moving: set[Node]) -> dict[Node, int]:
    """For each unit the piece that it belongs to; piece i ends at waist i.

    A unit goes where its first reader is; what none reads but the graph's outputs, where its last input is;
    what several pieces read and no waist feeds, to the beginning.
    """
    at = {waist: i for i, waist in enumerate(waists)}
    level: dict[Node, int] = {}
    order = list(units.members)
    for unit in reversed(order):
        if unit in at:
            level[unit] = at[unit]
            continue
        readers = {level[r] for r in units.flow.successors(unit) if r in level}
        if readers:
            level[unit] = 0 if len(readers) > 1 and unit not in moving else min(readers)
    for unit in order:
        if unit not in level:
            level[unit] = max((level[s] for s in units.flow.predecessors(unit)), default=0)
    return level


def blocks(graph: Graph, units: Units, waists: Sequence[Node], moving: set[Node]) -> list[Block]:
    """The program as a beginning, blocks of which some repeat, and an end; empty where none is worth it."""
    pieces = _pieces(graph, units, levels(units, waists, moving), len(waists))
    pieces = [_ordered(piece, units.members[waist]) for piece, waist in zip(pieces, waists, strict=True)]
    kinds = [structure(piece) for piece in pieces]
    sizes = [sum(map(operations, piece)) for piece in pieces]
    best: tuple[float, int, int, int] | None = None
    for width in range(1, 1 + _widest(kinds)):
        for offset in range(width):
            if (found := _cut(kinds, sizes, width, offset)) is not None and (best is None or found < best):
                best = found
    if best is None:
        return []
    _, width, after, last = best
    first = len(pieces) - after
    inner = [_block(pieces[i : i + width]) for i in range(first, last, width)]
    made = [*_with_first(_block(pieces[:first]), inner, waists, first, width), _block(pieces[last:])]
    made = [block for block in made if block.nodes]
    once = {block.kind: block for block in made}.values()
    spared = sum(sizes) - sum(operations(node) for block in once for node in block.nodes)
    return made if spared >= _WORTH * sum(sizes) else []


def _pieces(graph: Graph, units: Units, level: dict[Node, int], count: int) -> list[list[Node]]:
    pieces: list[list[Node]] = [[] for _ in range(count)]
    for node in graph.nodes:
        if node in units.unit:
            pieces[level[units.unit[node]]].append(node)
    return pieces


def _ordered(piece: list[Node], waist: Sequence[Node]) -> list[Node]:
    """The piece as its waist needs it, first inputs first.

    Rewrites put a call where it is first possible, and that differs from layer to layer. The order of what
    writes or draws random numbers stays.
    """
    if any(is_impure(node) or is_random(node) for node in piece):
        return piece
    inside = set(piece)
    done: dict[Node, None] = {}
    for root in (*waist, *piece):
        waiting = [root]
        while waiting:
            node = waiting[-1]
            missing = [s for s in node.all_input_nodes if s in inside and s not in done]
            if missing:
                waiting.append(missing[0])
            else:
                done[waiting.pop()] = None
    return list(done)


def _widest(kinds: Sequence[str]) -> int:
    """No block can hold more different pieces than there are that occur twice, and one that does not."""
    return 1 + sum(n > 1 for n in Counter(kinds).values())


def _cut(
    kinds: Sequence[str], sizes: Sequence[int], width: int, offset: int
) -> tuple[float, int, int, int] | None:
    """The cost of blocks of ``width`` pieces, ``width``, the pieces from the first block on, the last's end.

    Of two cuts of one cost the one that begins later is better: see ``_with_first``.
    """
    starts = range(offset, len(kinds) - width + 1, width)
    found = [tuple(kinds[i : i + width]) for i in starts]
    count = Counter(found)
    repeated = [k for k, block in enumerate(found) if count[block] > 1]
    if not repeated:
        return None
    first, last = repeated[0], repeated[-1]
    inner = found[first : last + 1]
    if any(len(set(block)) < width for block in inner):
        return None
    begin, end = starts[first], starts[last] + width
    size = {block: sum(sizes[starts[first + k] :][:width]) for k, block in enumerate(inner)}
    compiled = sum(size.values()) + sum(sizes[:begin]) + sum(sizes[end:])
    return compiled * math.sqrt(len(inner)), width, len(kinds) - begin, end


def _with_first(
    beginning: Block, inner: Sequence[Block], waists: Sequence[Node], first: int, width: int
) -> list[Block]:
    """The beginning and the blocks, with one more block where the beginning ends in one."""
    if first == 0:
        return [beginning, *inner]
    within = set(beginning.nodes)
    for like in {block.kind: block for block in reversed(inner)}.values():
        at = next(i for i, block in enumerate(inner) if block is like)
        root = waists[first + (at + 1) * width - 1]
        found = counterpart(like.nodes, root, waists[first - 1], within)
        if found is not None:
            taken = set(found)
            rest = tuple(n for n in beginning.nodes if n not in taken)
            return [Block(beginning.kind, rest), Block(like.kind, tuple(found)), *inner]
    return [beginning, *inner]


def _block(pieces: Sequence[Sequence[Node]]) -> Block:
    """Pieces one after the other: what a piece reads is in it or in one before."""
    kind = hashlib.sha256("".join(map(structure, pieces)).encode()).hexdigest()
    return Block(kind, tuple(node for piece in pieces for node in piece))
