"""The longest sequence that fits, by few plans: each costs seconds of tracing."""

from collections.abc import Callable
from math import ceil

from rewriter.memory.plan import Problem
from rewriter.memory.planner import least

_STEP = 256
_FIRST = 4096
_MOST = 2**24


def longest(problem_at: Callable[[int], Problem]) -> int:
    """The most tokens whose plan fits, to within 1% or 256. Memory is nearly linear in them: it asks seldom.

    ``problem_at(tokens)`` must not need less memory for more tokens. Returns 256 where not even those fit:
    to plan for them says why.
    """

    def over(tokens: int) -> int:
        problem = problem_at(tokens)
        return least(problem).peak - problem.device_budget

    first = problem_at(_FIRST)
    low, low_over = 0, first.static - first.device_budget
    tokens = _FIRST
    while (found := over(tokens)) <= 0:
        if tokens >= _MOST:
            return tokens
        slope = max((found - low_over) / (tokens - low), 1.0)
        low, low_over = tokens, found
        # A little further than the line says: where it is right, the answer is in between.
        tokens = min(_MOST, max(2 * tokens, _rounded(tokens - 1.01 * found / slope)))
    high, high_over = tokens, found
    while high - low > max(_STEP, low // 100):
        line = low - low_over * (high - low) / (high_over - low_over)
        # Nearly on the line, but never so near to an end that little is learnt.
        margin = max(_STEP, low // 200)
        tokens = min(max(_rounded(line - margin / 2), low + margin), high - margin)
        tokens = min(max(_rounded(tokens), low + _STEP), high - _STEP)
        if (found := over(tokens)) > 0:
            high, high_over = tokens, found
        else:
            low, low_over = tokens, found
    return max(low, _STEP)


def _rounded(tokens: float) -> int:
    return ceil(tokens / _STEP) * _STEP
