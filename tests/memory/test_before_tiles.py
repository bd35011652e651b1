"""What a stage's tiles read alike is made once before them: every bit is as when each tile makes it."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.memory.at_once import AtOnceUncompiled
from rewriter.memory.before_tiles import Parted, parted
from rewriter.memory.choices import StagesOnce, staged_choices
from rewriter.memory.steps import steps_of
from tests.memory.small_layers import as_promised, every_fate, new_transfers, scheduled
from tests.memory.test_choices import Linked
from tests.memory.test_extended_products import BF16, _layer
from tests.memory.test_layer import _step

EVERY = frozenset({("run", 0), ("backward", 0)})


def _same(ours, theirs):
    (results, gradients), (expected, truths) = ours, theirs
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert gradients.keys() == truths.keys() and len(gradients) > 6
    assert all(torch.equal(gradients[name], truth) for name, truth in truths.items())


def _halves(layer) -> tuple[Parted, Parted]:
    """What is parted of the forward and of the backward of its one stage."""
    (graphs,) = layer.graphs.graphs
    assert graphs.forward_parted is not None and graphs.backward_parted is not None
    return graphs.forward_parted, graphs.backward_parted


@pytest.mark.parametrize("saving", [False, True], ids=["computing again", "saving"])
def test_results_and_gradients_are_those_of_weights_made_in_every_tile_bit_for_bit(saving):
    layer, transfers, ran = _layer(saving), new_transfers(), []

    def counted(module, inputs, mode):
        run = as_promised(module, inputs, mode)
        return lambda *values: ran.append(module) or run(*values)

    stages = layer.graphs.compiled(counted, EVERY)
    forward, backward = _halves(layer)
    for fates in every_fate(layer):
        expected = _step(scheduled(layer, fates, 5, transfers=transfers), layer)
        ran.clear()
        _same(_step(scheduled(layer, fates, 5, stages=stages, transfers=transfers), layer), expected)
        # 13 tokens: three tiles, forward and backward.
        assert [ran.count(backward.before), ran.count(backward.tile)] == [1, 3]
        assert ran.count(forward.tile) == 3 * ran.count(forward.before) > 0


def test_no_tile_reads_a_packed_weight():
    layer = _layer(saving=False)
    for apart in _halves(layer):
        nodes = {node.name: node for node in apart.tile.graph.find_nodes(op="placeholder")}
        arguments = list(nodes.values())
        names = layer.graphs.wiring.takes[0]
        packed = [i for i, name in enumerate(names) if name in ("gate", "up", "down", "gate_absmax")]
        assert len(packed) == 4 and all(i in apart.takes and not arguments[i].users for i in packed)


def test_a_stage_that_runs_in_one_piece_makes_its_weights_too():
    layer = _layer(saving=False)
    stages = layer.graphs.compiled(as_promised, EVERY)
    _same(_step(scheduled(layer, {}, 64, stages=stages), layer), _step(scheduled(layer, {}, 64), layer))


def _traced(function, *shapes):
    with FakeTensorMode():
        return make_fx(function, tracing_mode="real")(*(torch.empty(s, dtype=BF16) for s in shapes))


def _targets(module):
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def test_what_a_compiler_fuses_with_the_rows_that_read_it_is_left_in_the_tiles():
    def scaled(x, norm):
        return x * (norm * 2 + 1)

    assert parted(_traced(scaled, (4, 8), (8,)), [True, False]) is None

    def both(x, weight):
        doubled = weight * 2
        return x @ doubled, x[0] + doubled

    assert parted(_traced(both, (8, 8), (8, 8)), [True, False]) is None


def test_what_is_drawn_or_written_or_returned_is_left_in_the_tiles():
    def drawn(x, weight):
        return x @ torch.rand_like(weight)

    def written(x, weight):
        made = weight @ weight
        before = x @ made
        return before @ made.add_(1)

    def returned(x, weight):
        made = weight * 2
        return x @ made, made

    for function in (drawn, written, returned):
        assert parted(_traced(function, (4, 8), (8, 8)), [True, False]) is None, function


def test_what_checks_a_weight_is_left_in_the_tiles():
    def checked(x, weight):
        torch.ops.aten._assert_async.msg((weight > 0).all(), "not all of it is positive")
        return x @ (weight * 2)

    apart = parted(_traced(checked, (4, 8), (8, 8)), [True, False])
    assert apart is not None and _targets(apart.before) == ["aten.mul.Tensor"]
    assert _targets(apart.tile)[-2:] == ["aten._assert_async.msg", "aten.mm.default"]


def _dequantised(use):
    def weight(data, absmax):
        packed = (data, [64, 64], absmax, 64, "nf4", None, None, None)
        return torch.ops.rewriter.dequantize_4bit(*packed, BF16, use)

    return weight


def test_a_weight_that_two_products_read_is_there_once_whatever_its_uses_are_called():
    def stage(x, data, absmax):
        return x @ _dequantised(0)(data, absmax) @ _dequantised(1)(data, absmax).t()

    with FakeTensorMode():
        given = torch.empty(4, 64, dtype=BF16), torch.empty(2048, dtype=torch.uint8), torch.empty(64)
        module = make_fx(stage)(*given)
    apart = parted(module, [True, False, False])
    assert apart is not None and apart.takes == (1, 2)
    assert _targets(apart.before) == ["rewriter.dequantize_4bit.default"]
    assert _targets(apart.tile) == ["aten.mm.default", "aten.t.default", "aten.mm.default"]


@pytest.fixture
def ways(monkeypatch):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 5))
    return staged_choices(_layer(saving=False).graphs, Linked(), True)


def test_a_quicker_form_spares_time_and_its_peak_holds_what_it_makes(ways):
    (graphs,) = ways[0].layer.graphs
    made = sum(n.meta["val"].nbytes for n in graphs.backward_parted.before.graph.output_node().args[0])
    for way in ways:
        assert bool(way.quicker) == (way.tile == 5)
        for form in way.quicker:
            seconds = [w.choice.forward_seconds + w.choice.backward_seconds for w in (form, way)]
            assert seconds[0] < seconds[1] and form.choice.saved == way.choice.saved
        if way.quicker:
            most = way.quicker[-1]
            assert most.once == EVERY and most.choice.backward_peak > made
            assert way.choice.backward_peak < most.choice.backward_peak < way.choice.backward_peak + made


def test_steps_say_which_stages_make_their_weights_once(ways):
    way = next(way for way in ways if way.quicker)
    assert "weights made once" not in steps_of(way)
    assert steps_of(way.quicker[-1]).count("# in tiles of 5 tokens, weights made once") == 2
    assert steps_of(dataclasses.replace(way, once=frozenset({("backward", 0)}))).count("made once") == 1


def test_the_forms_that_need_a_graph_in_two_are_given_up_where_it_cannot_be_compiled(ways):
    way = next(way for way in ways if way.quicker)
    (graphs,), stages = way.layer.graphs, StagesOnce(way.layer, EVERY)
    for direction, apart in (("run", graphs.forward_parted), ("backward", graphs.backward_parted)):

        def fails(module, inputs, mode, tile=apart.tile):
            if module is tile:
                raise RuntimeError("no kernel today")
            return module

        with pytest.raises(AtOnceUncompiled, match="RuntimeError: no kernel today") as caught:
            stages.compiled(fails)
        refused = stages.at_fault(caught.value)
        assert refused == StagesOnce(way.layer, frozenset({(direction, 0)}))
        left = way.without({refused})
        expected = [form for form in way.quicker if (direction, 0) not in form.once]
        assert list(left.quicker) == expected and len(expected) < len(way.quicker)
        assert list(left.choice.quicker) == [form.choice for form in expected]
    assert [form.once for form in expected] == [{("run", 0)}]
    assert stages.at_fault(RuntimeError("no kernel today")) == StagesOnce(way.layer, frozenset())
