"""How much larger a batch is than the one that a program was traced with, and the sizes of its values then.

Bytes and products mostly go by the number of tokens. Attention takes time by the tokens times the length of
their sequences: twice the sequences take it twice as long, sequences of twice the length four times. So does
the memory of a dense mask, and of scores that are written out. Which sizes hold the length twice is read off
their symbols.
"""

from collections.abc import Mapping, Set
from math import ceil
from typing import Any, NamedTuple

from sympy import Expr, Integer, Symbol
from torch import SymInt, Tensor

from rewriter.memory.operations import symbol_hint


class Growth(NamedTuple):
    """How many times the ``tokens`` of the batch at hand, and the ``length`` of its sequences."""

    tokens: float = 1.0
    length: float = 1.0

    @property
    def rows(self) -> float:
        """How many times its sequences."""
        return self.tokens / self.length


# The batch at hand.
AS_TRACED = Growth()


class SizesAt:
    """Sizes that were traced with one batch, of a batch that is ``growth`` times as large.

    Args:
        rows: symbols that count sequences; the others count the tokens of one. Without any, all that varies
            is of every sequence.
        known: numbers of symbols that do not grow so.
    """

    def __init__(
        self, growth: Growth, rows: Set[Symbol] = frozenset(), known: Mapping[Symbol, int] | None = None
    ):
        self._growth, self._rows, self._known = growth, rows, known or {}
        self._numbers: dict[Expr, int] = {}

    def length(self, size: Any) -> int:
        """Of one dimension, in whole numbers; at least what a part of a token comes to."""
        if not isinstance(size, SymInt):
            return size
        found = self._numbers.get(size.node.expr)
        return self._evaluated(size) if found is None else found

    def amount(self, count: Any) -> int:
        """Of elements, bytes or operations."""
        found = self.length(count)
        every = not self._rows and isinstance(count, SymInt) and count.node.expr.free_symbols
        return whole(found * self._growth.rows) if every else found

    def numel(self, value: Tensor) -> int:
        return self.amount(value.numel())

    def bytes(self, value: Any) -> int:
        """Of a tensor; 0 of anything else."""
        return self.numel(value) * value.element_size() if isinstance(value, Tensor) else 0

    def _evaluated(self, size: SymInt) -> int:
        expression = size.node.expr
        numbers = {s: Integer(self._number(s, size)) for s in expression.free_symbols}
        found = self._numbers[expression] = int(expression.xreplace(numbers))
        return found

    def _number(self, symbol: Symbol, size: SymInt) -> int:
        if symbol in self._known:
            return self._known[symbol]
        times = self._growth.rows if symbol in self._rows else self._growth.length
        return whole(symbol_hint(symbol, size) * times)


def whole(size: float) -> int:
    """Rounded up, unless it is a whole number but for how floats are rounded."""
    return ceil(round(size, 3))
