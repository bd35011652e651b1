"""A program under a plan: calls that run differently are regions of their own, the rest is as it was."""

import functools
from math import ceil

import pytest
import torch

from rewriter.memory import planned as planned_module
from rewriter.memory import ways as ways_module
from rewriter.memory.borders import parted_at_borders
from rewriter.memory.budgets import Budgets, card_bytes, usable_bytes
from rewriter.memory.choices import StagesOnce
from rewriter.memory.in_place import Inseparable
from rewriter.memory.plan import Infeasible, MemoryPlan, Problem
from rewriter.memory.planned import Choosing, everything_kept, kept_plan, parts_of, planned
from rewriter.memory.ways import Ways
from rewriter.regions.outline import outline
from rewriter.regions.program import source_of
from tests.families import build
from tests.memory.test_borders import _program
from tests.memory.test_choices import Linked
from tests.memory.test_head_ahead import head_of

CPU = torch.device("cpu")
AMPLE = 1 << 30


@pytest.fixture(scope="module")
def program():
    """Its ways to run depend on no budget: they are found once for all."""
    made, inputs = _program(build("llama", layers=4))
    found = outline(parted_at_borders(made), inputs)
    ways = functools.cache(lambda: Ways(found, Linked()))

    def once(asked, *given):
        return ways() if asked is found else Ways(asked, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_module, "Ways", once)
        yield found


@pytest.fixture(scope="module")
def least(program):
    with pytest.raises(Infeasible) as caught:
        planned(program, Budgets(0, AMPLE, 1000), Linked(), CPU)
    return caught.value.least_device


def test_where_everything_fits_the_program_is_as_it_was(program):
    found = planned(program, Budgets(AMPLE, AMPLE, 1000), Linked(), CPU)
    assert found.program is program and not found.staged
    assert set(found.plan.counts) == {(region.name, "keep all") for region in program.regions}


def test_to_keep_everything_has_to_leave_the_allocator_what_a_plan_leaves_it(program):
    peak = kept_plan(program, Budgets(0, 0, 1000), Linked()).peak
    assert everything_kept(program, Budgets(ceil(peak / 0.94), AMPLE, 1000), Linked(), CPU) is not None
    full = Budgets(peak, AMPLE, 1000)
    assert everything_kept(program, full, Linked(), CPU) is None
    found = planned(program, full, Linked(), CPU).plan
    assert found.leaves_room and found.seconds < 1.1 * kept_plan(program, full, Linked()).seconds


def test_layers_that_run_differently_have_names_of_their_own(program, least):
    found = planned(program, Budgets(int(least * 1.15), AMPLE, 1000), Linked(), CPU)
    names = [region.name for region in found.program.regions]
    assert len(set(names)) == len(names) > len(program.regions)
    assert not set(names) & {n.name for n in program.source.graph.nodes}
    assert all(name in source_of(found.program) for name in names)
    for before, after in zip(program.calls, found.program.calls, strict=True):
        assert (before.inputs, before.outputs) == (after.inputs, after.outputs)
        assert before.region.module is after.region.module
    assert found.plan.peak <= int(least * 1.15)


def test_the_least_budget_would_do_and_a_byte_less_would_not(program, least):
    assert planned(program, Budgets(least, AMPLE, 1000), Linked(), CPU).plan.peak == least
    with pytest.raises(Infeasible):
        planned(program, Budgets(least - 1, AMPLE, 1000), Linked(), CPU)


def test_a_hidden_state_is_the_layers_own_and_weights_and_tables_are_not(program, least):
    found = planned(program, Budgets(least, AMPLE, 1000), Linked(), CPU)
    for staged in found.staged.values():
        assert len(staged.stages.layer.own_inputs) == 1
        assert staged.owns_gradient


def test_without_host_memory_nothing_is_offloaded(program, least):
    with pytest.raises(Infeasible) as caught:
        planned(program, Budgets(0, 0, 1000), Linked(), CPU)
    assert caught.value.least_device >= least
    found = planned(program, Budgets(caught.value.least_device, 0, 1000), Linked(), CPU)
    assert found.plan.hosted == 0


@pytest.mark.parametrize("host", [0, AMPLE])
def test_weights_of_other_programs_that_stay_leave_room_for_copies_that_begin_early(program, host):
    with pytest.raises(Infeasible) as caught:
        planned(program, Budgets(0, host, 1000), Linked(), CPU)
    least = caught.value.least_device
    assert least is not None
    device = int(least * 1.1)
    found = planned(program, Budgets(device, host, 1000), Linked(), CPU)
    roomy = found.plan.problem.roomy
    assert (found.plan.hosted > 0) == (host > 0) and found.plan.peak < roomy
    most = roomy if host else found.plan.peak
    assert found.residents is not None and found.residents()._room == device - most


@pytest.mark.parametrize("head_bytes, way", [(140_000, "tiles of 8"), (160_000, "whole")])
def test_what_runs_is_the_form_of_a_layer_that_leaves_a_heads_copy_its_room(
    program, monkeypatch, head_bytes, way
):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 8))
    monkeypatch.setattr(planned_module, "head_away", lambda *_: head_of(len(program.calls) - 1, head_bytes))
    shared = planned_module.Ways(program, Linked())
    ways = next(iter(shared.all().values()))
    kept = "keep its input, what is before causal_attention, results of causal_attention · whole"
    parts = parts_of(program.calls, ways)
    choices = [next((c for c in part.choices if c.name == kept), part.choices[0]) for part in parts]
    peak = MemoryPlan(Problem(parts, 0, 0, 0), tuple(choices)).peak
    # The worst moment is the head's backward; the last layer's forward leaves 131,208 bytes.
    given = Budgets(ceil(peak / 0.94), 0, 0)
    found = MemoryPlan(Problem(parts, 0, given.device, 0), tuple(choices))
    run = Choosing(program, shared, given, Linked(), CPU).following(found, ways)

    assert run.plan.peak == peak and run.plan.choices[-2].name.endswith(way)
    calls = [call for call in run.program.calls if run.head is None or call.region is not run.head.region]
    for call, choice in zip(calls, run.plan.choices, strict=True):
        assert call.region not in run.staged or run.staged[call.region].way.choice is choice
    (note,) = run.notes
    waits = way == "whole"
    assert ("which waits" in note) == waits and (
        f"while the last {calls[-2].region.name} runs" in note
    ) != waits
    assert (run.head is None) == waits and (run.plan.seconds < found.seconds) != waits


@pytest.mark.parametrize("device", [CPU, None])
@pytest.mark.parametrize("usable", [1, 12345, 10**9, 23 * 2**30 + 7])
def test_the_card_for_some_bytes_has_them(usable, device):
    assert usable <= usable_bytes(card_bytes(usable, device), device) <= usable + 4


def test_weights_that_are_not_made_once_cost_no_plan_its_memory(program):
    ways, layer = Ways(program, Linked()), object()
    for once, less in (({("run", 0)}, False), (set(), True)):
        ways.refuse(StagesOnce(layer, frozenset(once)))  # type: ignore[arg-type]
        assert ways.refused == less


def test_a_layer_that_cannot_be_cut_keeps_everything_and_the_others_are_planned(monkeypatch):
    torch._dynamo.reset()
    program, _ = _program(build("llama", layers=3, lora=True))
    broken, sound = (region for region in program.regions if region.name.startswith("layer"))
    cut = ways_module.layer_graphs

    def graphs(region, shared, **said):
        if region is broken:
            raise RuntimeError("no stages today")
        return cut(region, shared, **said)

    monkeypatch.setattr(ways_module, "layer_graphs", graphs)
    ways = Ways(program, Linked())
    by_aside = ways.all()
    assert len(by_aside) == 3
    for found in by_aside.values():
        assert [way.choice.name for way in found[broken]] == ["keep all"] and len(found[sound]) > 1
    assert ways.notes == [
        f"{broken.name} keeps everything, planning it failed: RuntimeError: no stages today"
    ]


@pytest.mark.parametrize("fails", ["its backward", "its forward"])
def test_a_region_that_cannot_be_traced_is_foreseen_from_less(program, monkeypatch, fails, caplog):
    broken = program.calls[-1].region

    def failing(name, error):
        trace = getattr(ways_module, name)

        def traced(region, *given):
            if region is broken:
                raise error
            return trace(region, *given)

        monkeypatch.setattr(ways_module, name, traced)

    whole = kept_plan(program, Budgets(0, 0, 0), Linked())
    monkeypatch.setattr(planned_module, "Ways", Ways)
    failing("kept_graphs", Inseparable("not to be parted"))
    if fails == "its forward":
        failing("forward_cost", RuntimeError("no trace today"))
    found = kept_plan(program, Budgets(0, 0, 0), Linked())
    assert found.choices[-1].name == "keep all, foreseen from sizes alone"
    assert found.choices[:-1] == whole.choices[:-1] and found.peak > whole.peak / 2
    ours, traced = found.choices[-1], whole.choices[-1]
    assert ours.backward_seconds == 2 * ours.forward_seconds > 0
    if fails == "its backward":
        both = traced.forward_seconds + traced.backward_seconds
        assert both / 2 < 3 * ours.forward_seconds < 2 * both
    # What nobody foresaw is told, what has a name is not.
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert bool(warned) == (fails == "its forward")
