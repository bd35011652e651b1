"""What recordings hold is counted: for plans that come later, and among programs that share a budget."""

import gc
from typing import Any

import pytest
import torch

from rewriter.memory import budgets
from rewriter.replay.plan import Plan
from rewriter.replay.recorded import count, recorded_bytes
from rewriter.replay.room import Limits
from tests.replay.standin import StandInRecorder
from tests.replay.test_program import Bench, program

# No other test has any there.
DEVICE = torch.device("cpu", 7)


@pytest.fixture(autouse=True)
def _none_there():
    gc.collect()
    assert not recorded_bytes(DEVICE)


def budgeted(bench: Bench, room: int) -> None:
    """Have it run as a program that leaves ``room`` bytes of a budget."""
    plan = Plan(torch.fx.GraphModule({}, torch.fx.Graph()), (), bench.reading, Limits(4096, 1000), DEVICE)
    within = plan.within(room, room, bench.notes)
    run: Any = within.replayed(program, bench.notes, bench.recorder)
    bench.replayed = run


def test_recordings_of_two_programs_share_what_a_budget_leaves():
    first, second = Bench(size=60), Bench(size=60)
    for bench in (first, second):
        budgeted(bench, 170)
    for bench in (first, second):
        bench.train(12, 12)
    assert recorded_bytes(DEVICE) == 120
    # A third one is more than either plan left.
    second.train(70, 70)
    assert recorded_bytes(DEVICE) == 180 and "no further size" in second.notes[-1]
    first.train(70, 70, 70)
    assert recorded_bytes(DEVICE) == 180 and len(first.recorder.recorded) == 1


def test_a_later_plan_that_counted_recordings_has_its_own_room_beside_them():
    first, second = Bench(size=60), Bench(size=60)
    budgeted(first, 100)
    first.train(12, 12)
    budgeted(second, 100)
    second.train(12, 12, 12)
    assert second.recorder.forwards == 2 and second.recorder.bytes() == 60


def test_a_later_plans_static_bytes_have_the_recordings_in_them_while_they_are_there(monkeypatch):
    graph = torch.fx.Graph()
    weight = graph.placeholder("weight")
    weight.meta["example_value"] = torch.empty(10, device="meta")
    graph.output(())
    source = torch.fx.GraphModule({}, graph)
    device, recorder = torch.device("cuda", 0), StandInRecorder()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)

    def static() -> int:
        return budgets.static_bytes(budgets.Program(source, ()), device)

    count(recorder, device)
    before, recorder._held = static(), 500
    assert (before, static()) == (1000, 1500)
    assert not recorded_bytes(torch.device("cuda", 1))
    del recorder
    assert static() == 1000
