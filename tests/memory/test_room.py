"""Without a budget: nothing is planned that fits what is free, and what does not fit is planned.

The tests say what is free: a CPU is never planned unasked.
"""

from math import ceil

import pytest
import torch

import rewriter
from rewriter.memory import room
from rewriter.memory.budgets import Budgets
from rewriter.memory.growth import Growth
from rewriter.memory.planned import kept_plan
from rewriter.nested import duplicate
from rewriter.replay.plan import Plan
from tests.families import build
from tests.memory.budgeted import short_tiles
from tests.memory.test_borders import _program
from tests.memory.test_choices import Linked
from tests.memory.test_lengths import _chain, _losses

GiB = 1 << 30


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


@pytest.fixture
def free(monkeypatch):
    """Sets what the device is taken to have free."""

    def to(size: int) -> None:
        monkeypatch.setattr("rewriter.memory.budgets.free_bytes", lambda device: size)
        monkeypatch.setattr(room, "free_bytes", lambda device: size)

    return to


def _compiled(model, dynamic=None, **options):
    torch._dynamo.reset()
    model.compile(backend="rewriter", options={"lowering": "eager", **options}, dynamic=dynamic)
    return model


def _trained(lengths=(20,), **options):
    """The graphs of a chain's steps on batches of ``lengths``; losses and gradients are those of eager."""
    chain = _compiled(_chain(), dynamic=len(lengths) > 1, **options)
    with rewriter.inspect() as report:
        found = _losses(chain, lengths)
    torch.testing.assert_close(found, _losses(_chain(), lengths))
    return report.graphs


def test_where_sizes_alone_show_that_all_fits_no_planner_is_asked(free, monkeypatch):
    free(4 * GiB)
    monkeypatch.setattr("rewriter.memory.planned.kept_plan", lambda *_: pytest.fail("the planner was asked"))
    (graph,) = _trained()
    assert graph.notes == [
        "memory: nothing to plan, a step takes at most 1.00 GiB of the 3.76 GiB that may be filled"
    ]
    assert graph.memory is None


def test_in_between_the_planners_own_number_decides(free, monkeypatch):
    needs = []
    original = room._planners
    monkeypatch.setattr(room, "_planners", lambda *given: needs.append(original(*given)) or needs[-1])
    free(GiB)
    (graph,) = _trained()
    assert "nothing to plan" in graph.notes[0] and graph.memory is None
    most = needs[0].static + needs[0].beside
    # As of a plan, some of it is left to the allocator.
    free(ceil(most / 0.94))
    (graph,) = _trained()
    assert graph.memory is None
    free(most)
    (graph,) = _trained()
    assert "planned, since keeping everything takes" in graph.notes[0]
    assert graph.memory is not None and graph.memory.peak < most


def test_where_no_plan_fits_the_least_one_runs_with_a_warning(free):
    free(1000)
    with pytest.warns(UserWarning, match="may run out of memory.*least that would do"):
        (graph,) = _trained()
    assert "may run out" in graph.notes[1] and graph.memory is not None and graph.memory.peak > 1000
    assert any("tiles" in way or "whole" in way for _, way, _ in graph.memory.ways)


def test_planning_can_be_turned_off(free):
    free(1000)
    (graph,) = _trained(memory_budget="off")
    assert not graph.notes and graph.memory is None


def test_a_cpu_is_not_planned_unasked():
    (graph,) = _trained()
    assert not graph.notes and graph.memory is None


def test_a_step_without_gradients_is_not_asked_about(free):
    free(1000)
    with torch.no_grad(), rewriter.inspect() as report:
        _compiled(_chain())(torch.randn(2, 20, 8))
    assert not report.graphs[0].notes


def test_foreseeing_that_fails_is_noted_and_nothing_is_planned(free, monkeypatch):
    free(4 * GiB)
    monkeypatch.setattr(room, "most_bytes", lambda _: 1 / 0)
    (graph,) = _trained()
    assert graph.notes == ["memory: nothing is planned, foreseeing it failed: division by zero"]


def test_a_length_that_no_longer_fits_is_planned_and_shorter_ones_are_not(free, monkeypatch):
    monkeypatch.setattr(room, "_INSIDE_KERNELS", 0)
    free(700_000)
    short, long = _trained([20, 12, 30, 200, 12])
    assert short.memory is None and "nothing to plan" in short.notes[0]
    assert long.memory is not None and "planned, since" in long.notes[0]


def test_the_most_tokens_that_are_said_have_to_fit(free):
    free(700_000)
    (graph,) = _trained([20, 30], max_tokens=400)
    assert graph.memory is not None


def test_where_memory_is_planned_no_steps_are_recorded(free, monkeypatch):
    monkeypatch.setattr(
        "rewriter.arrangement.plan_recordings", lambda module, inputs, _: Plan(duplicate(module), inputs)
    )
    free(200_000)
    (graph,) = _trained()
    assert graph.memory is not None and "CUDA graphs: none after all, since memory is planned" in graph.notes


def test_the_number_from_sizes_is_not_less_than_the_planners(monkeypatch):
    monkeypatch.setattr(room, "_INSIDE_KERNELS", 0)
    torch._dynamo.reset()
    program, _ = _program(build("olmo2", layers=3, dtype=torch.bfloat16))
    least = kept_plan(program, Budgets(0, 0, 0), Linked()).peak
    assert least <= room.most_bytes(program) < 6 * least


def test_keeping_everything_is_not_worked_out_where_sizes_show_that_it_cannot_fit():
    program, inputs = _program(build("llama", layers=3))
    most = kept_plan(program, Budgets(GiB, GiB, 0), Linked()).peak
    assert not room.cannot_keep_all(program, inputs, Budgets(most, 0, 0))
    assert room.cannot_keep_all(program, inputs, Budgets(most // 20, 0, 0))
    longer = Budgets(most, 0, 0, growth=Growth(20.0, 20.0))
    assert room.cannot_keep_all(program, inputs, longer), "of longer batches"
    with torch.no_grad():
        assert not room.cannot_keep_all(program, inputs, Budgets(1, 0, 0)), "nothing is kept"


@pytest.mark.parametrize(("budget", "told"), [("1000B", 1), ("100GB", 0)])
def test_that_a_budget_cannot_be_planned_for_is_told_where_a_step_may_take_more(budget, told, recwarn):
    (graph,) = _trained(memory_budget=budget, regions=False)
    reason = "regions are turned off"
    assert graph.memory is None and graph.notes == [f"memory_budget: nothing to plan with, {reason}"]
    texts = [str(w.message) for w in recwarn]
    assert sum(f"memory_budget is not held to, {reason}: by its sizes" in text for text in texts) == told
