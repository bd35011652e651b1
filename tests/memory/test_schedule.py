"""The steps of a layer: what every fate makes of them, and that no schedule reads what is not there."""

import itertools
import random

import pytest

from rewriter.memory.schedule import Schedule, StageValues, Step, schedule

# A decoder layer: projections, attention that saves its sums, and the rest.
LAYER = (
    StageValues("projections", ("h",), ("q", "k"), ("h",), ("h",)),
    StageValues("attention", ("q", "k"), ("out", "sums"), ("q", "k", "out", "sums"), ("q", "k")),
    StageValues("mlp", ("h", "out"), ("result",), ("h", "out"), ("h", "out")),
)


def _text(steps: tuple[Step, ...]) -> str:
    return " ".join(
        f"{s.kind} {LAYER[s.stage].name}" if s.stage >= 0 else f"{s.kind} {s.value}" for s in steps
    )


def _layer(**fates: str) -> Schedule:
    return schedule(LAYER, ["h"], ["result"], fates)


def test_everything_kept_is_freed_as_the_backward_passes_it():
    plan = _layer()
    assert plan.kept == ("h", "q", "k", "out", "sums") and plan.offloaded == ()
    assert _text(plan.forward) == "run projections run attention run mlp"
    assert _text(plan.backward) == (
        "backward mlp backward attention free q free k free out free sums backward projections free h"
    )


def test_an_offloaded_input_leaves_before_anything_runs_and_returns_for_its_first_reader():
    plan = _layer(h="offload")
    assert plan.offloaded == ("h",)
    assert _text(plan.forward) == "offload h run projections run attention run mlp free h"
    assert _text(plan.backward).startswith("reload h backward mlp")


def test_an_offloaded_result_leaves_as_soon_as_it_is_made():
    plan = _layer(out="offload", sums="offload")
    assert _text(plan.forward) == (
        "run projections run attention offload out offload sums free sums run mlp free out"
    )
    assert _text(plan.backward) == (
        "reload out backward mlp reload sums backward attention free q free k free out free sums "
        "backward projections free h"
    )


def test_a_recomputed_result_is_freed_in_the_forward_and_its_stage_runs_again():
    plan = _layer(q="recompute", k="recompute")
    assert plan.kept == ("h", "out", "sums")
    assert _text(plan.forward) == "run projections run attention free q free k run mlp"
    assert _text(plan.backward) == (
        "backward mlp run projections backward attention free out free sums free q free k "
        "backward projections free h"
    )


def test_recomputing_attention_runs_what_it_reads_first_and_once():
    plan = _layer(q="recompute", k="recompute", out="recompute", sums="recompute")
    assert plan.kept == ("h",)
    assert _text(plan.backward) == (
        "run projections run attention backward mlp backward attention free q free k free out free sums "
        "backward projections free h"
    )


def test_what_is_offloaded_may_be_what_recomputing_reads():
    plan = _layer(h="offload", q="recompute", k="recompute", out="offload", sums="offload")
    assert plan.kept == () and plan.offloaded == ("h", "out", "sums")
    assert _text(plan.backward) == (
        "reload h reload out backward mlp run projections reload sums backward attention "
        "free out free q free k free sums backward projections free h"
    )


def test_a_stage_that_runs_again_keeps_and_offloads_none_of_its_values():
    plan = _layer(q="recompute", k="offload", out="recompute", sums="keep")
    assert plan.kept == ("h",) and plan.offloaded == ()
    assert plan.backward == _layer(q="recompute", k="recompute", out="recompute", sums="recompute").backward


def test_a_value_that_only_a_recomputation_reads_is_kept_for_it():
    stages = (
        StageValues("first", ("x",), ("a",), (), ("x",)),
        StageValues("second", ("a",), ("b",), ("b",), ("a",)),
    )
    assert schedule(stages, ["x"], ["b"], {}).kept == ("b",)
    assert schedule(stages, ["x"], [], {"b": "recompute"}).kept == ("a",)
    assert schedule(stages, ["x"], [], {"b": "recompute", "a": "recompute"}).kept == ("x",)


def test_a_result_that_its_own_backward_reads_outlives_the_forward_twice():
    stages = (StageValues("only", ("x",), ("y",), ("y",), ("x",)),)
    plan = schedule(stages, ["x"], ["y"], {"y": "offload"})
    assert plan.forward == (Step("run", 0), Step("free", value="x"), Step("offload", value="y"))


def test_a_result_that_nobody_reads_is_freed_at_once():
    stages = (StageValues("only", ("x",), ("y", "unused"), ("x",), ("x",)),)
    plan = schedule(stages, ["x"], ["y"], {})
    assert plan.forward == (Step("run", 0), Step("free", value="unused"))


def test_a_stage_without_a_backward_of_its_own_does_not_hold_its_inputs():
    stages = (
        StageValues("positions", ("ids",), ("mask",), (), ()),
        StageValues("work", ("x", "mask"), ("y",), ("x", "mask"), ("x",)),
    )
    assert schedule(stages, ["x", "ids"], ["y"], {}).kept == ("x", "mask")
    recomputed = schedule(stages, ["x", "ids"], ["y"], {"mask": "recompute"})
    assert recomputed.kept == ("x", "ids")


def test_an_input_that_is_to_be_recomputed_is_refused_by_name():
    with pytest.raises(ValueError, match="h is an input of the layer: keep or offload it"):
        _layer(h="recompute")


def test_the_same_fates_make_the_same_schedule():
    assert _layer(q="offload") == _layer(q="offload") and hash(_layer()) == hash(_layer())


def _every_choice():
    for fates in itertools.product(("keep", "offload", "recompute"), repeat=4):
        for own in ("keep", "offload"):
            yield dict(zip(("q", "k", "out", "sums"), fates, strict=True)) | {"h": own}


def test_every_fate_of_every_value_of_a_decoder_layer_runs():
    for fates in _every_choice():
        _simulate(LAYER, ["h"], ["result"], fates)


@pytest.mark.parametrize("hundred", range(10))
def test_no_schedule_reads_what_is_not_there_or_leaves_anything_behind(hundred):
    for seed in range(100):
        _simulate(*_drawn(random.Random(100 * hundred + seed)))


def _drawn(draw: random.Random):
    """A layer of any shape, in which every stage reads what came before, and fates for its values."""
    inputs = [f"x{i}" for i in range(draw.randint(1, 3))]
    made, stages = list(inputs), []
    for i in range(draw.randint(1, 6)):
        reads = tuple(draw.sample(made, draw.randint(1, min(3, len(made)))))
        gives = tuple(f"v{i}_{j}" for j in range(draw.randint(1, 3)))
        back = [v for v in (*reads, *gives) if draw.random() < 0.6]
        gradients = tuple(v for v in reads if draw.random() < 0.8)
        stages.append(StageValues(f"stage {i}", reads, gives, tuple(back), gradients))
        made += gives
    results = [v for v in made if v not in inputs]
    outputs = draw.sample(results, draw.randint(1, min(2, len(results))))
    fates = {v: draw.choice(("keep", "offload")) for v in inputs if draw.random() < 0.8}
    fates |= {v: draw.choice(("keep", "offload", "recompute")) for v in results if draw.random() < 0.9}
    return tuple(stages), inputs, outputs, fates


def _simulate(stages, inputs, outputs, fates) -> None:
    plan = schedule(stages, inputs, outputs, fates)
    assert not set(plan.kept) & set(plan.offloaded)
    assert all(fates.get(v, "keep") == "keep" for v in plan.kept)
    assert all(fates[v] == "offload" for v in plan.offloaded)

    here, host = set(inputs), set()
    for place, step in enumerate(plan.forward):
        _take(step, stages, here, host, plan.forward[:place])
    assert [s.stage for s in plan.forward if s.kind == "run"] == list(range(len(stages)))
    assert here == {*plan.kept, *outputs}
    assert host == set(plan.offloaded)

    here = set(plan.kept)
    for place, step in enumerate(plan.backward):
        _take(step, stages, here, host, plan.backward[:place])
    runs = [s.stage for s in plan.backward if s.kind == "run"]
    assert len(set(runs)) == len(runs)
    assert [s.stage for s in plan.backward if s.kind == "backward"] == list(reversed(range(len(stages))))
    assert not here and not host


def _take(step, stages, here, host, before) -> None:
    freed = {s.value for s in before if s.kind == "free"}
    if step.kind == "run":
        stage = stages[step.stage]
        assert here.issuperset(stage.reads), "a stage reads what is not there"
        assert not freed.intersection(stage.gives), "a freed value is made once more"
        here.update(stage.gives)
    elif step.kind == "backward":
        assert here.issuperset(stages[step.stage].backward_reads), "a backward reads what is not there"
    elif step.kind == "offload":
        assert step.value in here
        host.add(step.value)
    elif step.kind == "reload":
        assert step.value not in here, "reloaded though it is there"
        host.remove(step.value)
        here.add(step.value)
    elif step.kind == "free":
        here.remove(step.value)
