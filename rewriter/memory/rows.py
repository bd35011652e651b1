"""Which dimension of each value of a region counts the tokens of its sequence, and which operations mix them.

Begins at the region's activations, ``(batch, tokens, hidden)``, and follows each operation by its row-wise
rule (``rewriter.rowwise``). What has no tokens of its own, such as tables of cosines, gets them where it
meets a value that has: a dimension of size 1 is read whole, a longer one is sliced along with it. Where
attention or a convolution mixed the tokens, they are found again in the same way, when its result meets the
residual stream.

Slices are exact however this begins: a rule holds along any dimension, so that an activation that counts
something else is sliced along that. Sizes are compared to refuse, never to find a dimension.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from rewriter.canonical import value_of
from rewriter.effects import is_impure, is_mode_switch
from rewriter.rowwise.rules import ruling
from rewriter.rowwise.ruling import Mixes, Ruling
from rewriter.rowwise.sizes import is_one, same
from rewriter.signatures import target_name

_RANDOM = frozenset(
    ("dropout", "rand", "randn", "rand_like", "randn_like", "bernoulli", "multinomial", "normal")
    + ("rewriter.kernels.dropout.dropout_seeds",)
)


@dataclass
class Tokens:
    """What is known of a region's nodes.

    Attributes:
        rows: the dimension that counts tokens, of the nodes that have one; of a tuple, that of its tensors.
        rulings: the row-wise operations.
        mixing: the other operations that depend on tokens, and why.
        given: operations that depend on no token: of weights, tables and positions alone.
        length: how many tokens there are; None where nothing has any.
    """

    rows: dict[Node, int] = field(default_factory=dict)
    rulings: dict[Node, Ruling] = field(default_factory=dict)
    mixing: dict[Node, str] = field(default_factory=dict)
    given: dict[Node, None] = field(default_factory=dict)
    length: Any = None
    _weights: set[Node] = field(default_factory=set)
    _whole: set[Node] = field(default_factory=set)

    def visit(self, node: Node) -> None:
        """Find out about ``node``, whose operands are known."""
        if node.op not in ("call_function", "call_method"):
            if node.op != "placeholder" or isinstance(value_of(node), nn.Parameter):
                self._weights.add(node)
            return
        sources = [s for s in node.all_input_nodes if isinstance(value_of(s), (Tensor, tuple, list))]
        if not any(s in self.rows or s in self.mixing for s in sources):
            self._visit_given(node, sources)
            return
        try:
            if not any(s in self.rows for s in sources) or _is_element(node, self.mixing):
                raise Mixes("", self.rows.get(sources[0]))
            found = ruling(node, self._rows)
            self._take(found, sources)
            self.rulings[node] = found
            self.rows[node] = found.gives
        except Mixes as reason:
            self.mixing[node] = str(reason)
            if reason.gives is not None and self._counts(node, reason.gives):
                self.rows[node] = reason.gives

    def _visit_given(self, node: Node, sources: list[Node]) -> None:
        if is_impure(node) or target_name(node) in _RANDOM:
            self.mixing[node] = "it writes, or draws random numbers"
            return
        self.given[node] = None
        if sources and all(s in self._weights for s in sources):
            self._weights.add(node)

    def _rows(self, value: Any) -> int | None:
        return self.rows.get(value) if isinstance(value, Node) else None

    def _take(self, found: Ruling, sources: list[Node]) -> None:
        """Hold the operands to ``found``: those without tokens so far get them, all or none."""
        for source in sources:
            wanted, known = found.takes.get(source), self.rows.get(source)
            if known is not None and wanted != known:
                raise Mixes("it reads all tokens of an operand")
            if wanted is None or known is not None:
                continue
            if source in self._weights or source in self._whole:
                raise Mixes("it slices what is read whole elsewhere")
            if not self._counts(source, wanted):
                raise Mixes("an operand has another length")
        for source in sources:
            wanted = found.takes.get(source)
            if wanted is None:
                self._whole.add(source)
            else:
                self.rows[source] = wanted
                if source in self.given:
                    self.make(source)

    def make(self, node: Node) -> None:
        """Compute ``node`` once, in a stage of its own or another's, not in each that reads it."""
        del self.given[node]
        self.mixing[node] = "it depends on no token"

    def _counts(self, node: Node, dim: int) -> bool:
        value = value_of(node)
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            return False
        return same(value.shape[dim], self.length)


def tokens_of(graph: Graph) -> Tokens:
    """Follow the tokens through ``graph``, a region's."""
    found = Tokens()
    activations = [n for n in graph.find_nodes(op="placeholder") if _is_activation(value_of(n))]
    if not activations:
        return found
    found.length = _length(value_of(n) for n in activations)
    for node in activations:
        if found._counts(node, 1):
            found.rows[node] = 1
    for node in graph.nodes:
        if not is_mode_switch(node) and node.op != "output":
            found.visit(node)
    return found


def _is_element(node: Node, tuples: Container[Node]) -> bool:
    """Whether ``node`` is an element of one of ``tuples``, from which nothing parts it."""
    source = node.args[0] if target_name(node) == "getitem" else None
    return isinstance(source, Node) and source in tuples and isinstance(value_of(source), (tuple, list))


def _is_activation(value: Any) -> bool:
    """``(batch, tokens, hidden)``, more than one token."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return False
    return value.dim() == 3 and value.is_floating_point() and not is_one(value.shape[1])


def _length(activations: Iterable[Tensor]) -> Any:
    """The commonest, those that need a gradient before others."""
    values = list(activations)
    values = [v for v in values if v.requires_grad] or values
    sizes = [v.shape[1] for v in values]
    return max(sizes, key=lambda size: sum(same(size, other) for other in sizes))
