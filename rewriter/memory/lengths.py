"""Batches that vary in length: the plan is made for the longest, and a longer one is planned anew.

A graph of symbolic lengths serves batches that nobody has seen. Its plan is made for ``max_tokens``, or for
the batch that it is compiled with where that is not said. Larger ones are planned anew when they come
(``longer.py``), as far as what is compiled *reaches*; a guard on the number of tokens sends those beyond back
to the compiler. Where everything is kept, the guard is the longest that fits. What a way to run a layer costs
is worked out for the longest: tiles take what they take, and attention grows with the tokens and with the
length of their sequences (``growth.py``): where nothing tells, more tokens are longer sequences.
"""

import functools
from collections.abc import Callable, Sequence, Set
from math import prod, sqrt
from typing import Any

from sympy import Symbol
from torch import SymInt, Tensor
from torch.utils._pytree import tree_leaves

from rewriter.canonical import value_of
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.operations import int_hint
from rewriter.nested import graphs_of
from rewriter.regions.program import Program
from rewriter.rowwise.sizes import expression

# Beyond so many times the tokens that a plan is first made for, longer tiles than it has would run faster.
_REACH = 4.0


def growth_of(program: Program, max_tokens: int | None) -> Growth:
    """How much larger the batch is that the plan has to hold for: as it is where lengths do not vary."""
    tokens = _tokens(program)
    if not isinstance(tokens, SymInt):
        return AS_TRACED
    here = tokens.node.hint
    times = max(here, max_tokens or 0) / here
    return Growth(times, lengthened(program)(times))


def lengthened(program: Program) -> Callable[[float], float]:
    """How many times as long the sequences of so many times the tokens are, where nothing else tells."""
    hidden = _hidden_state(program)
    if hidden is None or not isinstance(hidden.shape[1], SymInt):
        return lambda times: 1.0
    # As many sequences as each has tokens may be one symbol for both.
    return sqrt if expression(hidden.shape[1]).free_symbols <= rows_of(program) else float


def rows_of(program: Program) -> Set[Symbol]:
    """The symbols that count sequences; none where their number does not vary."""
    hidden = _hidden_state(program)
    found = set() if hidden is None else expression(hidden.shape[0]).free_symbols
    return frozenset(s for s in found if isinstance(s, Symbol))


def hold_to(program: Program, growth: float) -> None:
    """Guard the graph: batches of more than ``growth`` (1 or more) times the tokens at hand come back.

    So do sequences that are so many times as long, where the program holds a number for each pair of tokens.
    Where lengths do not vary there is nothing to guard, since another batch is another graph.
    """
    tokens = _tokens(program)
    if not isinstance(tokens, SymInt):
        return
    # Asked of a symbol, the question becomes a guard.
    most = int(round(tokens.node.hint * growth, 3))
    within = bool(tokens <= most)
    assert within, f"a batch of {tokens.node.hint} tokens is not within {most}"
    length = _length(program)
    if not isinstance(length, SymInt) or not has_pairs(program):
        return
    # Fewer sequences may be longer.
    longest = int(round(length.node.hint * growth, 3))
    within = bool(length <= longest)
    assert within, f"sequences of {length.node.hint} tokens are not within {longest}"


def reach_of(program: Program, growth: float, from_here: int) -> float:
    """How many times the tokens at hand what is compiled serves: tiles and kernels are made for so many.

    Args:
        growth: how many times the plan holds for.
        from_here: sequences of so many tokens run otherwise; shorter ones do not reach beyond.
    """
    hidden = _hidden_state(program)
    if hidden is None or not isinstance(prod(hidden.shape[:-1]), SymInt):
        return 1.0
    length = int_hint(hidden.shape[1]) * growth
    return growth * (min(_REACH, from_here / length) if length < from_here else _REACH)


def counts_pairs(program: Program) -> Callable[[Tensor], bool]:
    """Whether a value of ``program`` has a number for each pair of tokens of a sequence, as scores have."""
    hidden = _hidden_state(program)
    length = 0 if hidden is None else hidden.shape[1]
    symbols = length.node.expr.free_symbols if isinstance(length, SymInt) else frozenset()

    def counts(value: Tensor) -> bool:
        sizes = (size.node.expr for size in value.shape if isinstance(size, SymInt))
        return sum(not symbols.isdisjoint(size.free_symbols) for size in sizes) > 1

    return counts


def has_pairs(program: Program) -> bool:
    """Whether any value of ``program`` is such."""
    counts = counts_pairs(program)
    values = (value_of(node) for graph in graphs_of(program.source) for node in graph.graph.nodes)
    return any(isinstance(x, Tensor) and counts(x) for value in values for x in tree_leaves(value))


def tokens_at_hand(program: Program) -> int:
    """Of the batch that the program is compiled with."""
    tokens = _tokens(program)
    return 0 if tokens is None else int_hint(tokens)


def length_at_hand(program: Program) -> int:
    """Of its sequences."""
    hidden = _hidden_state(program)
    return 0 if hidden is None else int_hint(hidden.shape[1])


def tokens_of(program: Program) -> Callable[[Sequence[Any]], int] | None:
    """The number of tokens of a call, from its inputs; None where they do not tell, or it does not vary."""
    tokens = _tokens(program)
    return _from_inputs(program, tokens) if isinstance(tokens, SymInt) else None


def length_of(program: Program) -> Callable[[Sequence[Any]], int]:
    """The length of a call's sequences, from its inputs, where those tell ``tokens_of``."""
    hidden = _hidden_state(program)
    length = 0 if hidden is None else hidden.shape[1]
    found = _from_inputs(program, length) if isinstance(length, SymInt) else None
    return found or (lambda inputs: int_hint(length))


def _from_inputs(program: Program, size: SymInt) -> Callable[[Sequence[Any]], int] | None:
    """``size`` of a call, from its inputs; None where they do not tell."""
    places: dict[Any, tuple[int, int | None]] = {}
    for i, node in enumerate(program.source.graph.find_nodes(op="placeholder")):
        value = value_of(node)
        if isinstance(value, SymInt):
            places.setdefault(value.node.expr, (i, None))
        for d, given in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(given, SymInt):
                places.setdefault(given.node.expr, (i, d))
    expression = size.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if not all(symbol in places for symbol in symbols):
        return None
    found = [places[symbol] for symbol in symbols]

    @functools.lru_cache(maxsize=1024)
    def evaluated(*sizes: int) -> int:
        return int(expression.subs(dict(zip(symbols, sizes, strict=True))))

    def count(inputs: Sequence[Any]) -> int:
        return evaluated(*(int(inputs[i] if d is None else inputs[i].shape[d]) for i, d in found))

    return count


def _tokens(program: Program) -> int | SymInt | None:
    """Rows times length of a batch."""
    hidden = _hidden_state(program)
    return None if hidden is None else prod(hidden.shape[:-1])


def _length(program: Program) -> int | SymInt:
    """Of a batch's sequences."""
    hidden = _hidden_state(program)
    return 0 if hidden is None else hidden.shape[1]


def _hidden_state(program: Program) -> Tensor | None:
    """One that passes between regions, (rows, length, channels)."""
    made = {node for call in program.calls for node in call.outputs}
    for call in program.calls:
        for node, value in zip(call.inputs, call.region.inputs, strict=True):
            if node in made and isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
                return value
    return None
