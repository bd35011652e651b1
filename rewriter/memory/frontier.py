"""Which of many rows no other row beats: the frontier of several numbers, each the better the smaller.

Rows are sorted by the first number, and taken in blocks. Of the blocks before, a staircase is enough to know:
the rows that none of them beats in the second and third number. Rows of a block are compared with each other.
"""

import numpy as np

from rewriter.memory.options import Whole

_BLOCK = 256
# Of each row of a block, those behind it.
_LATER = np.triu(np.ones((_BLOCK, _BLOCK), bool), 1)
# Thresholds of the fourth number: rows below one are compared with all above it.
_LEVELS = 6


def unbeaten(second: Whole, third: Whole, members: np.ndarray) -> np.ndarray:
    """Of rows sorted by a first number, which none of ``members`` before them beats or equals: a mask."""
    left = np.ones(len(second), bool)
    # Ascending in one, descending in the other.
    seconds, thirds = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for start in range(0, len(second), _BLOCK):
        block = slice(start, start + _BLOCK)
        a, b, member = second[block], third[block], members[block]
        at = np.searchsorted(seconds, a, "right") - 1
        left[block] = True if not len(seconds) else (at < 0) | (thirds[at] > b)
        here = np.flatnonzero(left[block])
        second_here, third_here = a[here], b[here]
        pairs = (second_here[:, None] <= second_here) & (third_here[:, None] <= third_here)
        pairs &= _LATER[: len(here), : len(here)]
        pairs &= member[here][:, None]
        left[block.start + here[pairs.any(axis=0)]] = False
        new = np.flatnonzero(left[block] & member)
        seconds, thirds = np.concatenate([seconds, a[new]]), np.concatenate([thirds, b[new]])
        order = np.lexsort((thirds, seconds))
        seconds, thirds = seconds[order], thirds[order]
        lower = np.minimum.accumulate(thirds)
        steps = np.concatenate([[True], thirds[1:] < lower[:-1]]) if len(thirds) else np.zeros(0, bool)
        seconds, thirds = seconds[steps], thirds[steps]
    return left


def frontier(second: Whole, third: Whole, fourth: Whole, free: np.ndarray) -> Whole:
    """Places of rows sorted by a first number, without most of those that another row beats.

    Args:
        fourth: what a row has to be no worse in, too, to beat another.
        free: rows whose ``fourth`` is no worse than that of any row which they do not exceed in the third.
    """
    rows = np.flatnonzero(unbeaten(second, third, free))
    bound = fourth[rows][~free[rows]]
    if not len(bound):
        return rows
    for level in np.unique(np.quantile(bound, np.linspace(0, 1, _LEVELS), method="lower")):
        low = fourth[rows] <= level
        # The same value on both sides: those at the level are compared with each other, too.
        tested = fourth[rows] >= level
        keep = unbeaten(second[rows], third[rows], low | free[rows])
        rows = rows[keep | ~tested]
    return rows
