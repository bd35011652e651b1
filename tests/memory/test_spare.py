"""What a plan leaves free beside its window, part by part."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from rewriter.memory.arena import HostArena
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.planned import PlannedProgram
from rewriter.memory.spare import Spare, spare_of
from rewriter.memory.transfer import Transfers
from rewriter.regions.program import Region


def _plan(forward: list[int], backward: list[int], hosted: Sequence[int] = ()) -> MemoryPlan:
    """One part for each number, which is all that its forward or backward needs beside a window of 10."""
    peaks = enumerate(zip(forward, backward, hosted or [1] * len(forward), strict=True))
    choices = [
        Choice(f"way {i}", 0, host, ahead, back, 1.0, 1.0, flight=0) for i, (ahead, back, host) in peaks
    ]
    parts = tuple(Part(f"part {i}", f"kind {i}", (c,)) for i, c in enumerate(choices))
    return MemoryPlan(Problem(parts, 0, 107, 10, window=10), tuple(choices))


def test_copies_out_may_fill_what_a_layer_leaves_free():
    plan = _plan([20, 50, 80, 30], [0, 0, 0, 0])
    assert [s.out for s in spare_of(plan, [True] * 4)] == [70, 40, 10, 60]


def test_copies_back_may_fill_what_the_layer_leaves_free_that_they_are_for():
    plan = _plan([0, 0, 0, 0], [50, 20, 60, 10])
    assert [s.back for s in spare_of(plan, [True] * 4)] == [40, 70, 30, 80]


def test_copies_back_leave_room_for_the_layers_above_that_have_none():
    plan = _plan([0, 0, 0, 0], [50, 20, 60, 10], hosted=[1, 1, 0, 1])
    assert [s.back for s in spare_of(plan, [True] * 4)] == [40, 30, 30, 80]


def test_copies_out_leave_room_for_parts_that_do_not_bound_them():
    plan = _plan([20, 70, 30, 20], [0, 0, 0, 0])
    assert spare_of(plan, [True, False, True, False]) == [Spare(20, 90), Spare(), Spare(60, 90), Spare()]


def test_what_is_still_on_its_way_out_when_the_backward_begins_leaves_room_for_the_backward():
    plan = _plan([20, 20, 20], [10, 10, 85])
    assert [s.out for s in spare_of(plan, [True, True, False])] == [70, 5, 0]


def test_layers_without_gradients_announce_nothing_since_they_send_nothing():
    inputs = [(torch.ones(1, requires_grad=trained),) for trained in (False, True, True)]
    regions = [Region(f"layer_{i}", GraphModule({}, Graph()), given) for i, given in enumerate(inputs)]
    program: Any = SimpleNamespace(calls=[SimpleNamespace(region=region) for region in regions])
    windows: list[Any] = [SimpleNamespace(way=SimpleNamespace(window=w)) for w in (10, 10, None)]
    plan = _plan([20, 50, 80], [0, 0, 0])
    staged = dict(zip(regions, windows, strict=True))
    found = PlannedProgram(program, staged, plan, (), lambda: pytest.fail("not asked for"))._spares()
    assert [spare.out for spare in found] == [10]


def test_nothing_is_spare_where_a_part_fills_the_budget():
    plan = _plan([90, 97], [97, 90])
    assert spare_of(plan, [True, True]) == [Spare(7, 0), Spare(0, 7)]


def test_a_group_holds_and_fetches_what_is_spare_beside_its_window():
    transfers = Transfers(HostArena(1 << 20), "cpu")
    transfers.expect([Spare(800, 800), Spare(0, 400)])
    with transfers.group(window=400) as group:
        first = [transfers.offload(torch.randn(100)) for _ in range(4)]
        assert transfers._leaving.held == 1200
        group.will_need(first[::-1])
    with transfers.group(window=400) as group:
        assert transfers._leaving.held == 400
        second = [transfers.offload(torch.randn(100)) for _ in range(4)]
        assert transfers._leaving.held == 400
        group.will_need(second[::-1])
    transfers.settle()
    transfers.prefetch_latest()
    assert transfers.stats.bytes_in == 800
    for ticket in second[::-1] + first[::-1]:
        transfers.reload(ticket)
    assert transfers.stats.bytes_in == 3200


def test_groups_beyond_those_that_were_announced_have_nothing_spare():
    transfers = Transfers(HostArena(1 << 20), "cpu")
    transfers.expect([Spare(800, 800)])
    assert [transfers.group(400).spare for _ in range(2)] == [Spare(800, 800), Spare()]
    transfers.expect([Spare(800, 800)])
    assert transfers.group().spare == Spare()
    transfers.reset()
    assert transfers.group(400).spare == Spare()


def test_what_is_spare_for_one_layer_is_not_for_those_below_it():
    transfers = Transfers(HostArena(1 << 20), "cpu")
    transfers.expect([Spare(0, 0), Spare(0, 800), Spare(0, 400)])
    order = []
    for _ in range(3):
        with transfers.group(window=400) as group:
            own = [transfers.offload(torch.randn(100)) for _ in range(4)]
            group.will_need(own[::-1])
            order = own[::-1] + order
    transfers.settle()
    transfers.prefetch_latest()
    came = []
    for ticket in order:
        transfers.reload(ticket)
        came.append(transfers.stats.bytes_in // 400)
    # Beside the one asked for: two while the last layer runs, three while the one below it does, then one.
    assert came == [3, 4, 5, 6, 8, 9, 9, 9, 10, 11, 12, 12]


def test_what_a_layer_sent_beyond_the_window_has_its_place_while_the_next_one_runs():
    transfers = Transfers(HostArena(1 << 20), "cpu")
    transfers.expect([Spare(), Spare(), Spare()])
    tickets = []
    for window, most in ((1600, 1600), (400, 1600), (400, 400)):
        with transfers.group(window=window):
            tickets += [transfers.offload(torch.randn(100)) for _ in range(2)]
            assert transfers._leaving.held <= most
            tickets += [transfers.offload(torch.randn(100)) for _ in range(3)]
            assert transfers._leaving.held == most
    for ticket in tickets[::-1]:
        transfers.reload(ticket)
