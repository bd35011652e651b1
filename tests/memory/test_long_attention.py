"""Long attention's backward goes by groups of heads, or all at once where a plan has the memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from rewriter.kernels.attention_groups import at_once, by_groups
from rewriter.memory.at_once import AtOnceUncompiled
from rewriter.memory.choices import StagesOnce, staged_choices
from rewriter.memory.long_attention import attend_by_groups, heads_at_once
from rewriter.memory.steps import steps_of
from tests.memory.decoder import decoder
from tests.memory.small_layers import as_promised, every_fate, new_transfers, scheduled
from tests.memory.test_choices import Linked
from tests.memory.test_layer import _step

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ATTENTION = frozenset({("backward", 1)})


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr("rewriter.memory.long_attention.LONG", 1)
    # Of another length than others' layers, which are traced once for all tests.
    return decoder(rows=2, tokens=17, dtype=torch.bfloat16, saving=True)


@pytest.fixture
def ways(layer):
    return staged_choices(layer.graphs, Linked(), True)


def _targets(graph):
    return [node.target for node in graph.graph.nodes]


def test_the_other_graph_has_attention_that_goes_by_no_groups_and_is_else_the_same(layer):
    graphs = layer.graphs.graphs[1]
    grouped, whole = graphs.backward, graphs.backward_with_heads_at_once
    assert by_groups[FLASH] in _targets(grouped) and FLASH not in _targets(grouped)
    assert _targets(whole.graph) == [at_once.get(target, target) for target in _targets(grouped)]
    assert heads_at_once(whole.graph) is None


def test_short_attention_has_one_graph_alone():
    layer = decoder(saving=True)
    assert all(graphs.backward_with_heads_at_once is None for graphs in layer.graphs.graphs)
    assert not any(way.quicker for way in staged_choices(layer.graphs, Linked(), True) if way.tile is None)


def test_results_and_gradients_have_the_same_bits_either_way(layer):
    transfers, ran = new_transfers(), []

    def counted(module, inputs, mode):
        run = as_promised(module, inputs, mode)
        return lambda *values: ran.append(module) or run(*values)

    stages = layer.graphs.compiled(counted, ATTENTION)
    whole = layer.graphs.graphs[1].backward_with_heads_at_once.graph
    for fates in every_fate(layer):
        results, gradients = _step(scheduled(layer, fates, transfers=transfers), layer)
        ran.clear()
        others, theirs = _step(scheduled(layer, fates, stages=stages, transfers=transfers), layer)
        assert ran.count(whole) == 1
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
        assert gradients.keys() == theirs.keys()
        assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


def test_a_quicker_form_has_all_heads_at_once_and_says_so(ways):
    forms = [(way, form) for way in ways for form in way.quicker if form.once == ATTENTION]
    assert forms
    for way, form in forms:
        assert form.choice.name == f"{way.choice.name}, heads at once"
        assert form.choice.backward_seconds < way.choice.backward_seconds
        assert form.choice.backward_peak >= way.choice.backward_peak
    assert steps_of(form).count("# all heads at once") == 1 and "at once" not in steps_of(way)


def test_heads_go_by_groups_where_what_has_them_at_once_cannot_be_compiled(ways):
    way = next(way for way in ways if way.quicker)
    whole = way.layer.graphs[1].backward_with_heads_at_once.graph

    def fails(module, inputs, mode):
        if module is whole:
            raise RuntimeError("no kernel today")
        return module

    stages = StagesOnce(way.layer, ATTENTION)
    with pytest.raises(AtOnceUncompiled, match="RuntimeError: no kernel today") as caught:
        stages.compiled(fails)
    refused = stages.at_fault(caught.value)
    assert refused == stages and refused.words == " with heads at once"
    assert not any(form.once & ATTENTION for form in way.without({refused}).quicker)


def test_heads_that_all_share_their_keys_are_one_group_and_go_at_once(monkeypatch):
    monkeypatch.setattr("rewriter.memory.long_attention.LONG", 1)
    for heads, target in ((1, FLASH), (2, by_groups[FLASH])):
        graph, fake = Graph(), FakeTensorMode()
        shapes = [(1, 4, 9, 8), (1, 4, 9, 8), *[(1, heads, 9, 8)] * 2]
        given = [graph.placeholder(name) for name in ("grad", "q", "k", "v")]
        for node, shape in zip(given, shapes, strict=True):
            with fake:
                node.meta["val"] = torch.empty(shape)
        attention = graph.call_function(FLASH, (*given, given[1], given[1], 0.0, True))
        graph.output(attention)
        module = GraphModule({}, graph)
        attend_by_groups(module)
        assert attention.target is target
