"""What a graph costs, from shapes: as counted by hand, and as much memory as running it takes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._guards import TracingContext, tracing

from rewriter.kernels.add_product import add_product_
from rewriter.memory.costs import graph_cost
from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import Growth
from rewriter.memory.joint import forward_graph, signature_of


@dataclass(frozen=True)
class Machine:
    """A second for each thousand: operations, bytes."""

    matrix_flops: float = 1000.0
    attention_forward_flops: float = 100.0
    attention_backward_flops: float = 50.0
    bandwidth: float = 1000.0


def _cost(function, shapes, tokens=7, hint=7):
    """Of ``function`` of tensors whose first dimension counts tokens where it is None."""
    fakes = StageFakes(hint)
    inputs = []
    for shape in shapes:
        rows = shape.index(None) if None in shape else None
        inputs.append(fakes.like(torch.empty([hint if s is None else s for s in shape]), rows))
    with tracing(TracingContext(fakes.mode)), torch.no_grad(), fakes.mode:
        graph = forward_graph(function, signature_of(function, inputs, [False] * len(inputs)))
    return graph_cost(graph, fakes, tokens, Machine())


def test_a_product_costs_its_operations():
    cost = _cost(lambda x, w: (x @ w,), [(None, 32), (32, 16)])
    assert cost.seconds == pytest.approx(2 * 7 * 32 * 16 / 1000)
    assert cost.result_bytes == cost.peak_bytes == 4 * 7 * 16


def test_a_narrow_product_costs_its_bytes():
    cost = _cost(lambda x, w: (x @ w,), [(None, 1), (1, 16)])
    assert cost.seconds == pytest.approx(4 * (7 + 16 + 7 * 16) / 1000)


def test_what_is_written_in_place_is_read_and_written():
    def add(total, a, b):
        total = total + 0
        add_product_(total, a, b, 1.0)
        return (total,)

    cost = _cost(add, [(None, 16), (None, 1), (1, 16)])
    assert cost.seconds == pytest.approx(4 * (7 * 16 * 2 + 7 + 16) / 1000)


def test_twice_the_tokens_cost_twice_the_operations_and_bytes():
    once, twice = (_cost(lambda x, w: (x @ w,), [(None, 32), (32, 16)], tokens) for tokens in (7, 14))
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert twice.peak_bytes == 2 * once.peak_bytes


def test_longer_sequences_than_were_traced_cost_what_those_would():
    """Of a stage that runs whole, whose sizes are not a tile's."""

    def layer(q, k, v, w):
        q, k, v = ((x @ w).view(q.shape[0], q.shape[1], 2, 8).transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(q, k, v),)

    def cost(length, growth, rows=2):
        outer, fakes = StageFakes(length), StageFakes(7)
        states = [fakes.like(outer.like(torch.empty(rows, length, 16), 1)) for _ in range(3)]
        inputs = [*states, fakes.like(torch.empty(16, 16))]
        with tracing(TracingContext(fakes.mode)), torch.no_grad(), fakes.mode:
            graph = forward_graph(layer, signature_of(layer, inputs, [False] * 4))
        return graph_cost(graph, fakes, 7, Machine(), growth)

    ours, theirs = cost(12, Growth(2.5, 2.5)), cost(30, Growth())
    assert ours.seconds == pytest.approx(theirs.seconds)
    assert (ours.peak_bytes, ours.result_bytes) == (theirs.peak_bytes, theirs.result_bytes)
    # More sequences see no more of each other.
    ours, theirs = cost(12, Growth(2.0, 1.0)), cost(12, Growth(), rows=4)
    assert ours.seconds == pytest.approx(theirs.seconds)
    assert ours.result_bytes == theirs.result_bytes


def test_a_product_of_weights_does_not_grow_with_the_tokens():
    once, twice = (_cost(lambda x, v, w: (v @ w,), [(None, 8), (8, 8), (8, 4)], t) for t in (7, 14))
    assert once == twice


def test_attention_has_a_rate_of_its_own():
    shapes = [(1, 2, None, 8)] * 3
    cost = _cost(lambda q, k, v: (F.scaled_dot_product_attention(q, k, v),), shapes)
    assert cost.seconds == pytest.approx(2 * 2 * 2 * 7 * 7 * 8 / 100)


def test_views_are_free():
    cost = _cost(lambda x: (x.view(-1, 2, 4).transpose(0, 1),), [(None, 8)])
    assert cost.seconds == 0 and cost.result_bytes == 0


def test_what_is_dead_is_not_counted_at_the_worst_moment():
    def chain(x, w):
        first = x @ w
        second = first @ w
        return (second @ w,)

    assert _cost(chain, [(None, 8), (8, 8)]).peak_bytes == 2 * 4 * 7 * 8


def test_a_view_keeps_what_it_views_alive():
    def held(x, w):
        first = (x @ w).view(-1)
        second = x @ w @ w
        return (first + second.view(-1),)

    assert _cost(held, [(None, 8), (8, 8)]).peak_bytes >= 3 * 4 * 7 * 8
