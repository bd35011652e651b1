"""What of a budget is left to the allocator: the plan is the fastest with the waits for what is not."""

import itertools
from contextlib import suppress
from dataclasses import replace
from math import inf

import pytest

from rewriter.memory.plan import Choice, Infeasible, MemoryPlan, Part, Problem
from rewriter.memory.planner import roomy
from tests.memory.test_planner import random_problem


@pytest.mark.parametrize(("seconds_again", "taken"), [(2.1, "again"), (4.0, "keep")])
def test_some_of_the_budget_is_left_to_the_allocator_unless_that_takes_much_longer(seconds_again, taken):
    again, keep = (
        Choice("again", 0, 0, 90, 90, 1.0, seconds_again - 1),
        Choice("keep", 0, 0, 99, 99, 1.0, 1.0),
    )
    problem = Problem((Part("layer", "layer", (again, keep)),), 0, 100, 0)
    found = roomy([problem])
    assert [c.name for c in found.choices] == [taken] and found.problem is problem
    # With more to leave, or nothing, there is nothing to weigh.
    assert roomy([replace(problem, device_budget=110)]).choices == (keep,)
    assert roomy([replace(problem, device_budget=93)]).choices == (again,)


@pytest.mark.parametrize(("seconds_again", "taken"), [(2.04, "less"), (2.1, "more")])
def test_a_plan_that_offloads_leaves_the_allocator_more_unless_that_takes_longer(seconds_again, taken):
    less, more = (
        Choice(name, 0, 1, peak, peak, 1.0, longer - 1)
        for name, peak, longer in (("less", 80, seconds_again), ("more", 90, 2.0))
    )
    problem = Problem((Part("layer", "layer", (less, more)),), 10, 110, 1)
    found = roomy([problem])
    assert [c.name for c in found.choices] == [taken] and found.problem is problem
    assert found.foreseen_seconds == (seconds_again if taken == "less" else pytest.approx(2.05))
    # Of what is there beside 10 bytes of weights.
    assert found.limit == 92
    # What offloads nothing leaves few gaps.
    kept = (replace(less, hosted=0), replace(more, hosted=0))
    still = roomy([replace(problem, parts=(Part("layer", "layer", kept),))])
    assert [c.name for c in still.choices] == ["more"] and still.foreseen_seconds == 2.0


def test_a_plan_that_offloads_nothing_may_be_the_fastest_for_leaving_few_gaps():
    sent, kept = Choice("sent", 0, 1, 90, 90, 1.0, 1.0), Choice("kept", 0, 0, 90, 90, 1.0, 1.02)
    problem = Problem((Part("layer", "layer", (sent, kept)),), 10, 110, 1)
    assert roomy([problem]).choices == (kept,)
    assert roomy([replace(problem, device_budget=130)]).choices == (sent,)


def test_a_larger_budget_is_never_foreseen_to_be_slower():
    for seed in range(6):
        problem = random_problem(seed)
        before = inf
        for budget in range(problem.static + 10, problem.static + 60, 7):
            with suppress(Infeasible):
                now = roomy([replace(problem, device_budget=budget)]).foreseen_seconds
                assert now <= before, (seed, budget)
                before = now


# Of these, each part of the budget that a plan may fill has the fastest once.
@pytest.mark.parametrize("seed", [26, 104, 111, 125])
def test_the_plan_is_the_fastest_of_all_with_their_waits(seed):
    problem = replace(random_problem(seed), host_budget=1000)
    every = (MemoryPlan(problem, chosen) for chosen in itertools.product(*(p.choices for p in problem.parts)))
    truth = min(plan.foreseen_seconds for plan in every if plan.peak <= problem.device_budget)
    assert roomy([problem]).foreseen_seconds == pytest.approx(truth, rel=1e-9)
