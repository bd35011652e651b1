"""The longest sequence that fits, by few plans: each costs seconds of tracing."""

from collections.abc import Callable
from math import ceil

from rewriter.memory.plan import Problem
from rewriter.memory.planner import least

_STEP = 256
_MOST_TOKENS = 2**24


def longest(problem_at: Callable[[int], Problem]) -> int:
    """The most tokens whose plan fits, to within 1% or 256. Memory is nearly linear in them: it asks seldom.

    ``problem_at(tokens)`` must not need less memory for more tokens.

    Raises:
        Infeasible: not even 256 fit.
    """

    def over(tokens: int) -> float:
        problem = problem_at(tokens)
        return least(problem).peak - problem.device_budget

    low, high = _STEP, None
    low_over, high_over = over(low), 0.0
    if low_over > 0:
        return low
    reach = 16 * _STEP
    while high is None:
        if (reached := over(reach)) > 0:
            high, high_over = reach, reached
        elif reach >= _MOST_TOKENS:
            return reach
        else:
            slope = (reached - low_over) / (reach - low)
            low, low_over = reach, reached
            # A little further than the line says: where it is right, the answer is between the two.
            reach = min(_MOST_TOKENS, max(2 * reach, _round(reach - 1.01 * reached / max(slope, 1.0))))
    while high - low > max(_STEP, low // 100):
        line = low - low_over * (high - low) / (high_over - low_over)
        margin = max(_STEP, low // 200)
        tokens = min(max(_round(line - margin / 2), low + margin // 2), high - margin // 2)
        tokens = min(max(_round(tokens), low + _STEP), high - _STEP)
        if (found := over(tokens)) > 0:
            high, high_over = tokens, found
        else:
            low, low_over = tokens, found
    return low


def _round(tokens: float) -> int:
    return ceil(tokens / _STEP) * _STEP
