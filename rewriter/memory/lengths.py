"""Batches that vary in length: the plan is made for the longest, and a guard holds it to that.

A graph of symbolic lengths serves batches that nobody has seen. Its plan is made for ``max_tokens``, or for
the batch that it is compiled with where that is not said; a guard on the number of tokens sends a larger one
back to the compiler, which plans again. Where everything is kept, the guard is the longest that fits. What a
way to run a layer costs is worked out for the longest: tiles take what they take, and attention grows with
the square of the tokens.
"""

from math import prod

from torch import SymInt, Tensor

from rewriter.regions.program import Program


def growth_of(program: Program, max_tokens: int | None) -> float:
    """How many times the tokens at hand the plan has to hold for: 1 where lengths do not vary."""
    tokens = _tokens(program)
    if not isinstance(tokens, SymInt):
        return 1.0
    here = tokens.node.hint
    return max(here, max_tokens or 0) / here


def hold_to(program: Program, growth: float) -> None:
    """Guard the graph: batches of more than ``growth`` (1 or more) times the tokens at hand come back.

    Where lengths do not vary there is nothing to guard, since another batch is another graph.
    """
    tokens = _tokens(program)
    if not isinstance(tokens, SymInt):
        return
    # Asked of a symbol, the question becomes a guard.
    most = int(round(tokens.node.hint * growth, 3))
    within = bool(tokens <= most)
    assert within, f"a batch of {tokens.node.hint} tokens is not within {most}"


def _tokens(program: Program) -> int | SymInt | None:
    """Rows times length of a batch: all but the channels of a hidden state that passes between regions."""
    made = {node for call in program.calls for node in call.outputs}
    for call in program.calls:
        for node, value in zip(call.inputs, call.region.inputs, strict=True):
            if node in made and isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
                return prod(value.shape[:-1])
    return None
