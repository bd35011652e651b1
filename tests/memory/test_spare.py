"""What a plan leaves free beside its window, part by part."""

from collections.abc import Sequence
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from rewriter.memory import spare
from rewriter.memory.arena import HostArena
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.planned import PlannedProgram
from rewriter.memory.spare import Spare, spare_of
from rewriter.memory.transfer import Transfers
from rewriter.regions.program import Region


@pytest.fixture(autouse=True)
def whole_limit(monkeypatch):
    """Plans here peak far below their limit, which copies are to fill but for one test."""
    monkeypatch.setattr(spare, "_NEARLY", 10.0)


def _plan(
    forward: list[int], backward: list[int], hosted: Sequence[int] = (), flight: Sequence[int] = ()
) -> MemoryPlan:
    """One part for each number, which is all that its forward or backward needs beside a window of 10."""
    nothing = [0] * len(forward)
    numbers = zip(forward, backward, hosted or [1] * len(forward), flight or nothing, strict=True)
    choices = [
        Choice(f"way {i}", 0, host, ahead, back, 1.0, 1.0, flight=sent)
        for i, (ahead, back, host, sent) in enumerate(numbers)
    ]
    parts = tuple(Part(f"part {i}", f"kind {i}", (c,)) for i, c in enumerate(choices))
    return MemoryPlan(Problem(parts, 0, 122, 99, window=10), tuple(choices))


def _spares(plan: MemoryPlan, bounds: Sequence[bool] = (True,) * 4, window: int = 10) -> list[Spare]:
    return spare_of(plan, bounds, window)


def test_copies_out_may_fill_what_a_layer_leaves_free_and_the_window():
    found = _spares(_plan([20, 50, 80, 30], [0, 0, 0, 0]))
    assert [(s.out, s.left) for s in found] == [(80, inf), (50, inf), (20, inf), (70, inf)]


def test_copies_take_a_step_hardly_beyond_the_peak_that_is_foreseen(monkeypatch):
    monkeypatch.setattr(spare, "_NEARLY", 1.02)
    # The peak is 50 and the window; two hundredths of it come beside what a layer leaves.
    assert [s.out for s in _spares(_plan([20, 50, 30], [0, 0, 0]), (True,) * 3)] == [41, 11, 31]
    # Where that would pass what the budget leaves, they keep to this.
    assert [s.out for s in _spares(_plan([20, 89, 30], [0, 0, 0]), (True,) * 3)] == [80, 11, 70]


def test_copies_out_leave_room_for_what_else_comes_while_a_part_runs():
    found = spare_of(_plan([20, 50, 80, 30], [0, 0, 0, 0]), (True,) * 4, 10, {3: 25})
    assert [s.out for s in found] == [80, 50, 20, 45] and {s.back for s in found} == {100}


def test_copies_back_may_fill_what_a_layer_leaves_free_and_the_window():
    assert [s.back for s in _spares(_plan([0] * 4, [50, 20, 60, 10]))] == [50, 80, 40, 90]


def test_what_is_in_flight_for_a_layer_has_its_place_beside_the_one_that_runs():
    plan = _plan([20, 50, 80, 30], [50, 20, 60, 10], flight=[3, 5, 0, 7])
    assert [(s.out, s.back) for s in _spares(plan)] == [(80, 50), (50, 80), (20, 40), (70, 90)]
    full = _plan([90, 87, 85, 90], [90, 87, 85, 90], flight=[3, 5, 0, 7])
    assert [(s.out, s.back) for s in _spares(full)] == [(10, 10), (13, 13), (15, 15), (10, 10)]


def test_of_what_is_set_aside_the_part_for_weights_is_not_for_copies():
    assert [s.out for s in _spares(_plan([20, 50, 80, 30], [0, 0, 0, 0]), window=4)] == [74, 44, 14, 64]


def test_copies_back_leave_room_for_the_layers_above_that_run_meanwhile():
    first, second, third, fourth = _spares(_plan([0] * 4, [50, 20, 60, 10]))
    assert first.until(first) == inf and first.until(second) == 80
    assert first.until(third) == first.until(fourth) == 40 and second.until(fourth) == 40
    assert third.until(fourth) == 90


def test_copies_back_leave_room_for_parts_between_that_do_not_bound_them():
    first, third = _spares(_plan([0] * 4, [50, 70, 60, 10]), [True, False, True, False])
    assert third.back == 40 and first.until(third) == 30


def test_copies_out_leave_room_for_parts_that_do_not_bound_them():
    found = _spares(_plan([20, 70, 30, 20], [0, 0, 0, 0]), [True, False, True, False])
    assert [(s.out, s.left) for s in found] == [(80, 30), (70, 80)]


def test_what_is_still_on_its_way_out_when_the_backward_begins_leaves_room_for_its_first_part():
    found = _spares(_plan([20, 20, 20], [10, 10, 85]), [True, True, False])
    assert [(s.out, s.left) for s in found] == [(80, inf), (80, 15)]


def test_layers_without_gradients_announce_nothing_since_they_send_nothing():
    inputs = [(torch.ones(1, requires_grad=trained),) for trained in (False, True, True)]
    regions = [Region(f"layer_{i}", GraphModule({}, Graph()), given) for i, given in enumerate(inputs)]
    program: Any = SimpleNamespace(calls=[SimpleNamespace(region=region) for region in regions])
    staged: Any = {region: SimpleNamespace(way=SimpleNamespace(window=10)) for region in regions[:2]}
    plan = _plan([20, 50, 80], [0, 0, 0])
    found = PlannedProgram(program, staged, plan, (), lambda: pytest.fail("not asked for"))._spares()
    assert [spare.out for spare in found] == [50]


def test_a_window_is_what_is_spare_where_a_part_takes_of_what_is_left_to_the_allocator():
    # Of 107 the allocator's part is 7; 97 and the window fill all.
    found = _spares(_plan([88, 97], [97, 88]), [True, True])
    assert [(s.out, s.back) for s in found] == [(12, 10), (10, 12)]


def test_a_group_holds_and_fetches_what_is_spare():
    transfers, made = Transfers(HostArena(1 << 20), "cpu"), []
    above = Spare(400, inf, 800, 800)
    transfers.expect([Spare(1200, inf, 1200, 1200, above), above])
    for held in (1200, 400):
        with transfers.group(window=400) as group:
            assert transfers._leaving.held <= held
            tickets = [transfers.offload(torch.randn(100), tile=True) for _ in range(4)]
            assert transfers._leaving.held == held
            group.will_need(tickets[::-1])
            made.append((group, tickets[::-1]))
    transfers._leaving.hold_at_most(0)
    transfers.begin_backward(made[1][0])
    assert transfers.stats.bytes_in == 800
    for ticket in made[1][1] + made[0][1]:
        transfers.reload(ticket)
    assert transfers.stats.bytes_in == 3200


def test_groups_beyond_those_that_were_announced_have_their_window():
    transfers, said = Transfers(HostArena(1 << 20), "cpu"), Spare(800, 700, 600, 500)
    transfers.expect([said])
    assert [transfers.group(400).spare for _ in range(2)] == [said, Spare(400, 400, 400)]
    transfers.expect([said])
    transfers.reset()
    assert transfers.group(400).spare == Spare(400, 400, 400)


def test_what_is_spare_for_one_layer_is_not_for_those_above_it():
    """The last one has nothing to come: while it runs, as much is back for the first as is spare there."""
    transfers, made = Transfers(HostArena(1 << 20), "cpu"), []
    last = Spare(inf, inf, 300, 800)
    middle = Spare(inf, inf, 1200, 1200, last)
    transfers.expect([Spare(inf, inf, 1600, 1600, middle), middle, last])
    for count in (4, 4, 0):
        with transfers.group(window=400) as group:
            tickets = [transfers.offload(torch.randn(100), tile=True) for _ in range(count)]
            group.will_need(tickets[::-1])
            made.append((group, tickets[::-1]))
    transfers._leaving.hold_at_most(0)
    came = []
    for group, tickets in reversed(made):
        transfers.begin_backward(group)
        came.append(transfers.stats.bytes_in // 400)
        for ticket in tickets:
            transfers.reload(ticket)
            came.append(transfers.stats.bytes_in // 400)
    # Two, then three beside the one asked for.
    assert came == [2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]
