"""Stages that cannot be compiled: their layers run in other ways, and the report says so."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

import rewriter
from rewriter import lower
from rewriter.lower_planned import PlanLowering
from rewriter.memory.arena import HostArena
from tests.memory.on_device import free_bus, poisoned
from tests.memory.test_lengths import Layer, assert_as_eager, trained

LENGTHS = [20, 20]


@pytest.fixture
def fails(monkeypatch):
    """Stages fail to compile: as many as are said, of all or of those whose graphs are ``which``."""
    compile_stage, failed = lower.lower_stage, []

    def set_up(most: int, which: Callable[[GraphModule], bool] = lambda graph: True):
        def failing(graph, *others):
            if len(failed) < most and which(graph):
                failed.append(graph)
                raise RuntimeError("no kernel today")
            return compile_stage(graph, *others)

        monkeypatch.setattr(lower, "lower_stage", failing)

    return set_up


def test_where_none_can_be_compiled_everything_is_kept_and_that_it_does_not_fit_is_said(fails):
    fails(1000)
    grown = patch.object(HostArena, "_add", autospec=True, side_effect=HostArena._add)
    with free_bus(), poisoned("cpu") as transfers, grown as add:
        found, (plan,) = trained(LENGTHS, max_tokens=80)
    assert add.called and not transfers.arena.capacity, "what was locked for a plan that is not run"
    assert_as_eager(found, LENGTHS)
    assert plan is not None and plan.peak > plan.device_budget
    assert {way for kind, way, _ in plan.ways if kind.startswith("layer")} == {"keep all"}
    notes = rewriter.report().graphs[-1].notes
    assert any("compiling its stages failed: RuntimeError: no kernel today" in note for note in notes)
    assert any("this step may run out of it" in note and "are needed" in note for note in notes)


def test_where_some_can_be_compiled_the_plan_is_made_of_those(fails):
    fails(1)
    found, (plan,) = trained(LENGTHS, max_tokens=80)
    assert_as_eager(found, LENGTHS)
    assert plan is not None and plan.peak <= plan.device_budget
    assert {way for kind, way, _ in plan.ways if kind.startswith("layer")} != {"keep all"}
    notes = rewriter.report().graphs[-1].notes
    assert any("runs in other ways" in note for note in notes)
    assert not any("may run out" in note for note in notes)
    torch._dynamo.reset()


class Casting(Layer):
    def forward(self, x):
        up, down = (linear.weight.double() for linear in (self.up, self.down))
        return x + F.linear(torch.tanh(F.linear(x.double(), up)), down).float()


def _is_given_weights(graph: GraphModule) -> bool:
    """Whether it runs in tiles that do not make them."""
    return any(n.name.startswith("made_") for n in graph.graph.find_nodes(op="placeholder"))


def test_where_weights_made_once_cannot_be_compiled_tiles_make_them(fails, monkeypatch):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 8))
    monkeypatch.setattr("tests.memory.test_lengths.Layer", Casting)
    fails(1000, _is_given_weights)
    found, (plan,) = trained([20], max_tokens=80)
    assert_as_eager(found, [20])
    assert plan is not None and plan.peak <= plan.device_budget
    ways = [way for kind, way, _ in plan.ways if kind.startswith("layer")]
    assert ways and all(way.endswith("tiles of 8") for way in ways)
    notes = rewriter.report().graphs[-1].notes
    why = "compiling its stages with weights made once failed: RuntimeError: no kernel today"
    assert notes and all(why in note for note in notes)
    torch._dynamo.reset()


class Failing:
    def compiled(self, compile_graph):
        raise RuntimeError("no kernel today")


def test_a_later_plan_whose_stages_cannot_be_compiled_gives_way_to_another(monkeypatch):
    monkeypatch.setattr(PlanLowering, "_linked", lambda self, planned: planned.run)
    without = []
    other: Any = SimpleNamespace(layers={}, compilations=0, run="other's code", host_memory=nullcontext)
    layer = Failing()
    later: Any = SimpleNamespace(compilations=1, host_memory=nullcontext)
    later.layers, later.without = {layer: "layer_a"}, lambda *failed: without.append(failed) or other
    options: Any = None
    assert PlanLowering(options).again(later) == ("other's code", other)
    ((refused, error),) = without
    assert refused is layer and str(error) == "no kernel today"
