"""Weights are made once where a plan leaves the room, and in every tile where it does not."""

from dataclasses import replace

from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.planner import roomy
from rewriter.memory.quicker import with_quicker

ONCE = tuple(Choice(f"once {more}", 10, 0, 50, 100 + more, 1.0, 2 - more / 100) for more in (20, 40))
TILES = Choice("tiles", 10, 0, 50, 100, 1.0, 2.0, quicker=ONCE)


def _problem(budget, choice=TILES):
    parts = tuple(Part(str(i), "layer", (choice,)) for i in range(4))
    return Problem(parts, 1000, budget, 0)


def _chosen(budget):
    problem = _problem(budget)
    found = with_quicker(MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts)))
    return [choice.name for choice in found.choices], found


def test_each_part_takes_what_its_own_moment_leaves():
    # The last part's moment is 1000, three times 10 that are saved before, and 100.
    within = {room: int((1130 + room) / 0.94) + 1 for room in (0, 10, 20, 30, 60)}
    assert _chosen(within[0])[0] == ["once 20", "once 20", "tiles", "tiles"]
    assert _chosen(within[10])[0] == ["once 40", "once 20", "once 20", "tiles"]
    assert _chosen(within[60])[0] == ["once 40"] * 4


def test_the_peak_and_the_seconds_are_those_of_what_is_made_once():
    problem = _problem(10_000)
    before, (_, after) = MemoryPlan(problem, (TILES,) * 4), _chosen(10_000)
    assert after.peak == before.peak + 40 and after.seconds == before.seconds - 4 * 0.4
    assert after.leaves_room


def test_a_plan_that_fills_the_budget_grows_no_more():
    names, found = _chosen(1130)
    assert not found.leaves_room and found.peak == 1130
    assert names == ["once 20", "once 20", "tiles", "tiles"]


def test_what_is_made_once_in_no_more_memory_is_taken_by_every_part_of_a_plan_that_fills_the_budget():
    once = replace(ONCE[0], name="once in the same", forward_peak=100, backward_peak=70)
    problem = _problem(1130, replace(TILES, quicker=(once, *ONCE)))
    full = MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts))
    assert not full.leaves_room and full.peak == 1130
    assert with_quicker(full).choices == (once,) * 4


def test_a_part_that_waits_for_copies_either_way_takes_no_room():
    choices = tuple(replace(TILES, reload_seconds=back) for back in (1.7, 1.9, 3.0, 0.0))
    found = with_quicker(MemoryPlan(_problem(10_000), choices))
    # Each waits for the copies of the part before; backwards take 2.0, 1.8 and 1.6 s.
    assert [choice.name for choice in found.choices] == ["once 40", "once 40", "once 20", "tiles"]


def test_tiles_of_another_length_are_taken_where_these_make_their_weights_once():
    once = Choice("shorter, once", 10, 0, 50, 90, 1.0, 1.5)
    shorter = Choice("shorter", 10, 0, 50, 60, 1.0, 2.1, quicker=(once,))
    assert _chosen_of(TILES, shorter) == ["shorter, once"] * 4
    # What the other parts would have less room beside, or would wait for, is another way.
    for other in ({"saved": 11}, {"hosted": 1, "flight": 0}, {"reload_seconds": 0.1}):
        assert _chosen_of(TILES, replace(shorter, **other)) == ["once 40"] * 4


def _chosen_of(*choices):
    parts = tuple(Part(str(i), "layer", choices) for i in range(4))
    found = with_quicker(MemoryPlan(Problem(parts, 1000, 10_000, 0), choices[:1] * 4))
    return [choice.name for choice in found.choices]


def test_the_planner_gives_the_quicker_forms_and_never_over_the_budget():
    for budget in range(1130, 1300, 40):
        found = roomy([_problem(budget)])
        assert found.peak <= budget
        assert (found.seconds < 12.0) == any(choice is not TILES for choice in found.choices)
    assert [choice.name for choice in roomy([_problem(1300)]).choices] == ["once 40"] * 4
