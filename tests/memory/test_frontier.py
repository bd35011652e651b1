"""The frontier against all pairs of rows."""

import numpy as np
import pytest

from rewriter.memory.frontier import frontier, unbeaten


def rows(seed: int, count: int, columns: int) -> np.ndarray:
    """Small numbers, so that many are equal, sorted by the first, then by the others."""
    found = np.random.default_rng(seed).integers(0, 40, (count, columns))
    return found[np.lexsort(found.T[::-1])]


def beaten_by_an_earlier(table: np.ndarray) -> np.ndarray:
    no_worse = (table[:, None] <= table).all(axis=2)
    return np.asarray(np.triu(no_worse, 1).any(axis=0))


@pytest.mark.parametrize("count", [0, 1, 200, 1500])
def test_of_three_numbers_exactly_the_unbeaten_rows_are_left(count):
    table = rows(count, count, 3)
    left = unbeaten(table[:, 1], table[:, 2], np.ones(count, bool))
    assert (left == ~beaten_by_an_earlier(table)).all()


@pytest.mark.parametrize("count", [0, 1, 200, 1500])
def test_of_four_numbers_no_unbeaten_row_is_lost_and_each_other_has_one_that_beats_it(count):
    table = rows(count, count, 4)
    # Free rows are those whose last number is as low as the third allows.
    table[:, 3] = np.maximum(table[:, 3], table[:, 2] - 10)
    table = table[np.lexsort(table.T[::-1])]
    left = frontier(*table[:, 1:].T, table[:, 3] == table[:, 2] - 10)
    beaten = beaten_by_an_earlier(table)
    assert set(np.flatnonzero(~beaten)) <= set(left.tolist())
    for row in set(range(count)) - set(left.tolist()):
        assert (table[left] <= table[row]).all(axis=1).any()
