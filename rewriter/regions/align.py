"""The first layer, taken out of what comes before it.

A layer's norm is fused with the sum that ends the layer before, and the first layer has none before: its norm
stands alone, between the embedding and the first waist that looks like the others. Walked backwards from
there, the first layer is the same as the second; what the walk does not reach belongs to the beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from rewriter.canonical import value_of
from rewriter.regions.signature import constant, described, target


def counterpart(layer: Sequence[Node], root: Node, other_root: Node, within: set[Node]) -> list[Node] | None:
    """The nodes of ``within`` that are to ``other_root`` what ``layer`` is to its ``root``, or None.

    Returns:
        one for each of ``layer``, in its order. None of the rest of ``within`` reads any of them.
    """
    walk = _Walk(set(layer), within)
    if not walk.same(root, other_root):
        return None
    # What the root does not need, such as other results of a tuple, is found from what it reads.
    if not all(mine in walk.found or walk.follow(mine) for mine in layer):
        return None
    taken = set(walk.found.values())
    if any(other in taken for other in walk.outside.values()):
        return None
    if any(source in taken for node in within - taken for source in node.all_input_nodes):
        return None
    return [walk.found[mine] for mine in layer]


@dataclass
class _Walk:
    """Two graphs walked side by side: ``found`` are pairs inside the layer, ``outside`` what it reads."""

    inside: set[Node]
    within: set[Node]
    found: dict[Node, Node] = field(default_factory=dict)
    outside: dict[Node, Node] = field(default_factory=dict)

    def same(self, mine: Any, other: Any) -> bool:
        if isinstance(mine, Node):
            return isinstance(other, Node) and self._same_node(mine, other)
        if isinstance(mine, (list, tuple)):
            return type(mine) is type(other) and len(mine) == len(other) and all(map(self.same, mine, other))
        if isinstance(mine, dict):
            equal_keys = isinstance(other, dict) and list(mine) == list(other)
            return equal_keys and all(self.same(mine[k], other[k]) for k in mine)
        if isinstance(mine, slice):
            parts = ("start", "stop", "step")
            return isinstance(other, slice) and all(
                self.same(getattr(mine, p), getattr(other, p)) for p in parts
            )
        return constant(mine) == constant(other)

    def _same_node(self, mine: Node, other: Node) -> bool:
        if mine in self.found:
            return self.found[mine] is other
        if mine not in self.inside:
            return self.outside.setdefault(mine, other) is other
        fits = other in self.within and other not in self.found.values() and mine.op == other.op
        if not fits or target(mine.target) != target(other.target):
            return False
        if described(value_of(mine)) != described(value_of(other)):
            return False
        self.found[mine] = other
        return self.same(mine.args, other.args) and self.same(mine.kwargs, other.kwargs)

    def follow(self, mine: Node) -> bool:
        """Find the counterpart of a node that the walk has not met, from what it reads."""
        for source in mine.all_input_nodes:
            for reader in list(self.found[source].users) if source in self.found else ():
                before = dict(self.found), dict(self.outside)
                if self._same_node(mine, reader):
                    return True
                self.found, self.outside = before
        return False
