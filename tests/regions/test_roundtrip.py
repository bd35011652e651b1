"""A program put back together is the graph that it was made of: the same dataflow, the same numbers."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rewriter.regions.outline import _Outliner
from tests.regions.chains import Chain, chains, each_layer_writes, inputs_of_writers
from tests.regions.dataflow import dataflow
from tests.regions.inlined import inline
from tests.regions.outlined import Numbers, Outlined, assert_equal, numbers, outlined, run_program

_few = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def assert_program_computes(case: Outlined, truth: Numbers, *, one_order: bool) -> None:
    """Results are equal bit for bit; gradients, too, unless they are sums in another order."""
    ours = numbers(run_program(case), case.values)
    assert_equal(Numbers(ours.results, []), Numbers(truth.results, []))
    if one_order:
        assert_equal(ours, truth)
    for a, b in zip(ours.gradients, truth.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * (1 + b.abs().max().item()))


@settings(max_examples=30, **_few)
@given(chain=chains(), dynamic=st.sampled_from((None, True)))
def test_outlining_then_inlining_gives_back_an_equal_graph(chain: Chain, dynamic):
    case = outlined(chain, *chain.inputs(), dynamic=dynamic)
    if case.program is None:
        return
    flat = inline(case.program)
    assert dataflow(flat.graph) == dataflow(case.program.source.graph)
    truth = numbers(case.body, case.values)
    # A weight of all layers gets the sum of their gradients.
    assert_program_computes(case, truth, one_order=not chain.tied)
    ours = numbers(flat, case.values)
    assert_equal(Numbers(ours.results, []), Numbers(truth.results, []))


@settings(max_examples=6, **_few)
@given(chain=chains(), dynamic=st.sampled_from((None, True)))
def test_compiled_regions_compute_what_the_graph_does(chain: Chain, dynamic):
    case = outlined(chain, *chain.inputs(), dynamic=dynamic, lowered=True)
    assume(case.program is not None)
    # AOTAutograd adds the gradient of a result after the others, eager where it comes.
    one_order = not chain.tied and not chain.middle
    assert_program_computes(case, numbers(case.body, case.values), one_order=one_order)


@settings(max_examples=8, **_few)
@given(chain=chains(skips=(0,), repeats=(4, 6)))
def test_layers_in_a_row_are_always_found(chain: Chain):
    case = outlined(chain, *chain.inputs())
    assert case.program is not None, case.reason
    assert len(case.program.regions) < len(case.program.calls)


def test_32_layers_have_as_many_kinds_as_8_and_take_as_many_fake_tensors(monkeypatch):
    border, made = _Outliner._border, []
    monkeypatch.setattr(_Outliner, "_border", lambda self, value: made.append(value) or border(self, value))
    shallow, deep = (Chain((), ("attention", "tuple"), n, ("norm",)) for n in (8, 32))
    few, fakes = dict(outlined(shallow, *shallow.inputs()).times), len(made)
    many = dict(outlined(deep, *deep.inputs()).times)
    assert few.keys() == many.keys()
    assert all(many[name] - times == (24 if "layer" in name else 0) for name, times in few.items())
    assert len(made) == 2 * fakes


def test_two_streams_that_never_meet_stay_one_graph():
    def function(a, b, weights):
        for w in weights:
            a, b = torch.tanh(a @ w) + b, a * torch.sigmoid(b)
        return a.sum() + b.sum()

    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(4)]
    case = outlined(function, torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), weights)
    assert case.program is None and not case.reason


def test_an_operation_before_and_after_a_write_is_not_shared():
    def function(h, mask, weights):
        mask = mask + 1
        h = torch.tanh(h)
        for index, w in enumerate(weights):
            h = h + torch.sin(h @ w) * mask.exp()
            if index == 0:
                mask.mul_(0.5)
        return h.sum()

    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(4)]
    case = outlined(function, torch.randn(3, 8, requires_grad=True), torch.rand(3, 8), weights)
    assert_program_computes(case, numbers(case.body, case.values), one_order=True)


def test_a_tensor_that_several_layers_write_into_keeps_one_graph():
    case = outlined(each_layer_writes, *inputs_of_writers())
    assert case.program is None and "writes in place" in case.reason


def test_what_the_beginning_writes_in_place_is_shared_by_the_layers():
    def function(h, mask, weights):
        mask = mask + 1
        mask.masked_fill_(mask > 1.5, 0.0)
        h = torch.tanh(h)
        for w in weights:
            h = h + torch.sin(h @ w) * mask.exp()
        return h.sum()

    weights = [torch.randn(8, 8, requires_grad=True) for _ in range(4)]
    case = outlined(function, torch.randn(3, 8, requires_grad=True), torch.rand(3, 8), weights, lowered=True)
    assert case.order == "beginning a a a a end"
    (once,) = [n for n in case.program.source.graph.nodes if n.target == "exp"]
    assert once in case.program.calls[0].outputs
    assert_program_computes(case, numbers(case.body, case.values), one_order=True)
