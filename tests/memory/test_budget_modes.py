"""Under a memory budget: lengths that vary."""

import pytest

from tests.families import build
from tests.memory.budgeted import assert_near, batches_of, compiled, short_tiles, staged, steps


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


def test_lengths_that_vary_are_planned_as_they_come():
    batches = batches_of((24, 17))

    def make():
        return build("llama", layers=2)

    # The first step would hold 5.5 times its parameters; 4.7 times is the least that would do.
    budget = int(5.1 * sum(p.nbytes for p in make().parameters()))
    assert_near(steps(compiled(make(), budget), batches), steps(make(), batches), 1e-5)
    assert staged() > 0
