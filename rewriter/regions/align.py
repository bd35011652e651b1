"""The first layer, taken out of what comes before it.

A layer's norm is fused with the sum that ends the layer before, and the first layer has none before: its norm
stands alone, between the embedding and the first waist that looks like the others. Walked backwards from
there, the first layer is the same as the second; what the walk does not reach belongs to the beginning.
"""

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.regions.signature import constant, described, target


def counterpart(layer: Sequence[Node], root: Node, other_root: Node, within: set[Node]) -> list[Node] | None:
    """The nodes of ``within`` that are to ``other_root`` what ``layer`` is to its ``root``, or None.

    Returns:
        one for each of ``layer``, in its order. None of the rest of ``within`` reads any of them.
    """
    inside = set(layer)
    found: dict[Node, Node] = {}
    taken: dict[Node, Node] = {}
    outside: dict[Node, Node] = {}

    def same(mine: Any, other: Any) -> bool:
        if isinstance(mine, Node):
            return isinstance(other, Node) and same_node(mine, other)
        if isinstance(mine, (list, tuple)):
            return type(mine) is type(other) and len(mine) == len(other) and all(map(same, mine, other))
        if isinstance(mine, dict):
            return (
                isinstance(other, dict)
                and list(mine) == list(other)
                and all(same(mine[k], other[k]) for k in mine)
            )
        if isinstance(mine, slice):
            parts = ("start", "stop", "step")
            return isinstance(other, slice) and all(same(getattr(mine, p), getattr(other, p)) for p in parts)
        return constant(mine) == constant(other)

    def same_node(mine: Node, other: Node) -> bool:
        if mine in found:
            return found[mine] is other
        if mine not in inside:
            return outside.setdefault(mine, other) is other
        fits = other in within and other not in taken and mine.op == other.op
        if not fits or target(mine.target) != target(other.target):
            return False
        if described(value_of(mine)) != described(value_of(other)):
            return False
        found[mine], taken[other] = other, mine
        return same(mine.args, other.args) and same(mine.kwargs, other.kwargs)

    if not same_node(root, other_root):
        return None
    # What the root does not need, such as other results of a tuple, is found from what it reads.
    for mine in layer:
        if mine not in found and not _follow(mine, found, same_node):
            return None
    if any(other in taken for other in outside.values()):
        return None
    rest = within - set(taken)
    if any(source in taken for node in rest for source in node.all_input_nodes):
        return None
    return [found[mine] for mine in layer]


def _follow(mine: Node, found: dict[Node, Node], same_node: Any) -> bool:
    """Find the counterpart of a node that the walk from the root has not met, from what it reads."""
    sources = [s for s in mine.all_input_nodes if s in found]
    return any(same_node(mine, reader) for s in sources for reader in list(found[s].users))
