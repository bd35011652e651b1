"""Under a memory budget: lengths that vary, and weights in four bits."""

import pytest

from tests.families import build
from tests.memory.budgeted import assert_near, batches_of, compiled, infeasible, short_tiles, staged, steps


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


def test_lengths_that_vary_are_planned_as_they_come():
    batches = batches_of((24, 17))

    def make():
        return build("llama", layers=2)

    budget = int(infeasible(make, batches).least_device * 1.5)
    assert_near(steps(compiled(make(), budget), batches), steps(make(), batches), 1e-5)


def test_four_bit_weights():
    def make():
        return build("llama", layers=2, lora=True, nf4=True)

    batches = batches_of((24,))
    # A step that keeps everything holds 6 times its parameters; 2.9 times is the least that would do.
    budget = int(3.5 * sum(p.nbytes for p in make().parameters()))
    assert_near(steps(compiled(make(), budget), batches), steps(make(), batches), 1e-4)
    assert staged() > 0
