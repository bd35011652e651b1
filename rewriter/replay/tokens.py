"""Which values of a graph are rows of tokens, and whether more tokens behind the last one would change them.

A graph of symbolic length may be run on a longer input whose last tokens are padding. That is without effect
where every value keeps its *prefix*: along its axis of tokens, the longer run's value begins with the shorter
run's. The embedding of padded ids does; so does what is computed for each token by itself (norms, rotations,
products with weights, sums of such rows) and what a token takes from the tokens before it (causal attention,
cumulative sums). A loss does where the rows behind the prefix have the label that it ignores. As functions of
the weights the two runs are then one, so their gradients are equal too, up to the order of sums.

The proof is an abstract interpretation of the graph: a value is free of tokens (None) or ``Tokens``. An
operation without a rule, or that mixes tokens in another way, raises ``Unproven`` with its name. Sizes are
compared as expressions; no guard is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.canonical import value_of
from rewriter.effects import mutated_argument
from rewriter.nested import checkpoint_body
from rewriter.replay.arguments import Unproven, refuse
from rewriter.rowwise.sizes import same
from rewriter.signatures import target_name

COPY, ANY = "copy", "any"


@dataclass(frozen=True)
class Tokens:
    """A value whose rows along ``axis``, counted from the front, are tokens.

    Attributes:
        length: of the prefix, as an expression.
        tail: what rows behind the prefix hold: a number; ``COPY``, the last row once more, which is as good
            an index; or ``ANY``.
        flat: batch and tokens are one axis, of ``length`` tokens each.
    """

    axis: int
    length: sympy.Expr
    tail: float | str = ANY
    flat: bool = False


Abstract = Any  # None, Tokens, or a tuple of these
Rule = Callable[[Node, str, "Reader"], Abstract]


@dataclass
class Reader:
    """Reads one graph node by node.

    Attributes:
        symbol: the length, None where the graph has none.
        rule_of: what is known of the operation that a node calls; see ``rules``.
        draws: whether random numbers were drawn, for each element its own.
    """

    symbol: sympy.Symbol | None
    rule_of: Callable[[Node], Rule | None]
    known: dict[Node, Abstract] = field(default_factory=dict)
    draws: bool = False

    def mentions(self, value: Any) -> bool:
        """Whether a size or any size in a nest of arguments depends on the length."""
        value = value_of(value)
        if isinstance(value, torch.SymInt):
            return self.symbol in value.node.expr.free_symbols
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return True
        if isinstance(value, (tuple, list)):
            return any(map(self.mentions, value))
        if isinstance(value, slice):
            return any(map(self.mentions, (value.start, value.stop, value.step)))
        return False

    def axes(self, value: Tensor) -> list[int]:
        return [i for i, size in enumerate(value.shape) if self.mentions(size)]

    def of(self, value: Any) -> Abstract:
        return self.known.get(value) if isinstance(value, Node) else None

    def tokens_in(self, args: Iterable[Any]) -> list[tuple[Node, Tokens]]:
        """The arguments, nested ones included, that have tokens."""
        found = []
        for arg in args:
            if isinstance(arg, Node) and self.of(arg) is not None:
                found.append((arg, self.of(arg)))
            elif isinstance(arg, (tuple, list)):
                found += self.tokens_in(arg)
        return found

    def read(self, node: Node) -> Abstract:
        """What ``node``, a call, computes.

        Raises:
            Unproven: there is no rule for it, or its rule does not hold.
        """
        name = target_name(node)
        body = checkpoint_body(node)
        if body is not None:
            return self._read_body(node, body)
        if mutated_argument(node) is not None:
            raise Unproven(f"`{node.name}` writes in place")
        rule = self.rule_of(node)
        if rule is None:
            raise Unproven(
                f"`{node.name}`, {name.rpartition('.')[2]}, is not known to treat tokens one by one"
            )
        found = rule(node, name, self)
        self._check(node, value_of(node), found)
        return found

    def _read_body(self, node: Node, body: GraphModule) -> Abstract:
        """The results of an activation checkpoint, whose body is a graph of its own."""
        inputs = body.graph.find_nodes(op="placeholder")
        if len(inputs) != len(node.args) - 1:
            raise refuse(node, "checkpoint", "has inputs that are not in its graph")
        known = {i: self.of(arg) for i, arg in zip(inputs, node.args[1:], strict=True)}
        inner = Reader(self.symbol, self.rule_of, known)
        for each in body.graph.nodes:
            if each.op in ("call_function", "call_method"):
                inner.known[each] = inner.read(each)
        self.draws |= inner.draws
        (output,) = body.graph.find_nodes(op="output")
        results = output.args[0]
        return tuple(map(inner.of, results)) if isinstance(results, (tuple, list)) else inner.of(results)

    def _check(self, node: Node, value: Any, found: Abstract) -> None:
        """The shape that tracing saw is what the rule says: a slip of a rule is refused here."""
        if isinstance(value, (tuple, list)) and isinstance(found, tuple):
            for part, abstract in zip(value, found, strict=True):
                self._check(node, part, abstract)
            return
        if not isinstance(value, Tensor):
            return
        axes = self.axes(value)
        if axes != ([] if found is None else [found.axis]):
            raise Unproven(f"`{node.name}` of shape {tuple(value.shape)} has no single axis of tokens")
        if found is not None and not found.flat and not same(value.shape[found.axis], found.length):
            raise Unproven(f"`{node.name}` of shape {tuple(value.shape)} has another number of tokens")
