"""A head's weight on its way before it is read: ordered by events, taken once, gone after the step."""

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.fx import Graph

from rewriter.kernels.host_weight import COMING
from rewriter.memory import head_ahead
from rewriter.memory.crowding import roomy_bytes
from rewriter.memory.head_ahead import HeadAhead, HeadBegun, HeadInHost, begun_ahead
from rewriter.memory.machine import H200
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.quicker import with_quicker
from tests.memory.test_weights_ahead import _Streams

CPU = torch.device("cpu")


def read(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.rewriter.host_weight(torch.empty(0), weight)


def test_the_copy_comes_after_what_was_computed_and_its_reader_after_the_copy():
    streams = _Streams()
    weight, ahead = torch.randn(3, 4), HeadAhead(CPU, streams)
    ahead(weight)
    assert streams.log[:2] == [("back", "waits for all of", "compute"), ("back", "copies", "")]
    copied = len(streams.log)
    assert torch.equal(read(weight), weight)
    assert [entry[:2] for entry in streams.log[copied:]] == [("compute", "waits for")]
    assert not COMING
    ahead.let_go()
    assert len(streams.log) == copied + 1


def test_what_was_not_read_is_waited_for_and_gone_after_a_step_that_failed():
    streams = _Streams()
    weight = torch.randn(3, 4)

    def program(weight):
        begun.copier(weight)
        raise ValueError

    ahead, begun = HeadAhead(CPU, streams), HeadBegun(None, CPU, {})  # type: ignore[arg-type]
    with patch.object(head_ahead, "head_ahead_on", lambda _: ahead), pytest.raises(ValueError):
        begun.within(program)(weight)
    assert streams.log[-1][:2] == ("compute", "waits for") and not COMING


def test_without_memory_for_it_the_head_copies_it_when_it_comes():
    weight, ahead = torch.randn(3, 4), HeadAhead(CPU, _Streams())
    with patch.object(head_ahead.torch, "empty_like", side_effect=torch.OutOfMemoryError):
        assert ahead(weight) == ()
    assert not COMING and torch.equal(read(weight), weight)


def head_of(place: int, nbytes: int) -> HeadInHost:
    weight = Graph().placeholder("weight")
    weight.meta["example_value"] = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    return HeadInHost(place, weight)


def _plan(forward_seconds: float) -> MemoryPlan:
    """Of a layer that leaves a MiB free in its forward, and a head that waits for its copy."""
    choices = (Choice("layer", 0, 0, 2 << 20, 0, forward_seconds, 3.0), Choice("head", 0, 0, 0, 0, 2.0, 1.0))
    parts = tuple(Part(choice.name, choice.name, (choice,)) for choice in choices)
    budget = next(size for size in itertools.count(3 << 20) if roomy_bytes(size) == 3 << 20)
    return MemoryPlan(Problem(parts, 0, budget, 0), choices)


def test_seconds_are_without_what_of_the_copy_passes_beside_the_part_before():
    head, rates = head_of(1, 1 << 20), replace(H200, to_device=1 << 20)
    found = [begun_ahead(_plan(seconds), head, rates) for seconds in (0.25, 5.0)]
    assert [plan and plan.seconds for plan in found] == [0.25 + 3 + 3 - 0.25, 5 + 3 + 3 - 1.0]


def test_a_head_that_waits_for_what_the_layer_before_sends_is_foreseen_to_wait_all_the_same():
    waiting = _plan(5.0)
    sent = replace(waiting.choices[0], hosted=1, offload_seconds=1.75)
    problem = replace(waiting.problem, device_budget=1 << 30, host_budget=1)
    plan = MemoryPlan(problem, (sent, waiting.choices[1]))
    # The copy takes one of the head's two seconds, of which it would wait for 1.75 all the same.
    found = begun_ahead(plan, head_of(1, 1 << 20), replace(H200, to_device=1 << 20))
    assert found is not None and found.seconds == plan.seconds - 0.25


@pytest.mark.parametrize("place, nbytes", [(1, (1 << 20) + 1), (0, 1)])
def test_nothing_passes_beside_a_part_that_leaves_no_room_or_is_not_there(place, nbytes):
    assert begun_ahead(_plan(5.0), head_of(place, nbytes), H200) is None


def _quicker_plan(spared: float) -> MemoryPlan:
    """Of a layer that makes its weights once, in what of 4 MiB a copy of 1 MiB would take, and a head."""
    once = Choice("once", 0, 0, 7 << 19, 0, 5.0 - spared, 3.0)
    tiles = Choice("tiles", 0, 0, 3 << 20, 0, 5.0, 3.0, quicker=(once,))
    # What other parts can tell from it is no form of it.
    other = replace(tiles, name="other", hosted=1, forward_peak=0, forward_seconds=0.5, quicker=())
    head = Choice("head", 0, 0, 0, 0, 2.0, 1.0)
    parts = Part("layer", "layer", (tiles, other)), Part("head", "head", (head,))
    budget = next(size for size in itertools.count(4 << 20) if roomy_bytes(size) == 4 << 20)
    return with_quicker(MemoryPlan(Problem(parts, 0, budget, 0), (tiles, head)))


def test_the_layer_before_makes_its_weights_in_every_tile_where_the_copy_gains_more():
    head, rates = head_of(1, 1 << 20), replace(H200, to_device=1 << 20)
    plan = _quicker_plan(spared=0.5)
    assert plan.choices[0].name == "once"
    found = begun_ahead(plan, head, rates)
    assert found is not None and [choice.name for choice in found.choices] == ["tiles", "head"]
    assert found.seconds == plan.seconds + 0.5 - 1.0
    assert begun_ahead(_quicker_plan(spared=1.5), head, rates) is None


def test_a_layer_keeps_its_weights_made_once_where_the_copy_has_room_beside():
    found = begun_ahead(plan := _quicker_plan(spared=0.5), head_of(1, 1 << 18), H200)
    assert found is not None and found.choices == plan.choices and found.seconds < plan.seconds
