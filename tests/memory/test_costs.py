"""What a graph costs, from shapes: as counted by hand, and as much memory as running it takes."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

from rewriter.kernels.add_product import add_product_
from rewriter.kernels.attention_by_length import attention_by_length
from rewriter.kernels.attention_groups import by_groups
from rewriter.memory.costs import graph_cost
from rewriter.memory.fakes import StageFakes
from rewriter.memory.growth import Growth
from rewriter.memory.joint import forward_graph, signature_of
from rewriter.memory.operations import flops_of


@dataclass(frozen=True)
class Machine:
    """A second for each thousand: operations, bytes."""

    matrix_flops: float = 1000.0
    attention_forward_flops: float = 100.0
    attention_backward_flops: float = 50.0
    bandwidth: float = 1000.0
    launch_seconds: float = 0.0


def _cost(function, shapes, tokens=7, hint=7, launch=0.0):
    """Of ``function`` of tensors whose first dimension counts tokens where it is None."""
    fakes = StageFakes(hint)
    inputs = []
    for shape in shapes:
        rows = shape.index(None) if None in shape else None
        inputs.append(fakes.like(torch.empty([hint if s is None else s for s in shape]), rows))
    with tracing(TracingContext(fakes.mode)), torch.no_grad(), fakes.mode:
        graph = forward_graph(function, signature_of(function, inputs, [False] * len(inputs)))
    return graph_cost(graph, fakes, tokens, Machine(launch_seconds=launch))


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
    copying = 4 * 7 * 16 * 2
    assert cost.seconds == pytest.approx((copying + 4 * (7 * 16 * 2 + 7 + 16)) / 1000)


def test_a_product_that_adds_in_place_costs_its_operations():
    def add(total, a, b):
        add_product_(total, a, b, 1.0)
        return (total + 0,)

    cost = _cost(add, [(None, 16), (None, 32), (32, 16)])
    assert cost.seconds == pytest.approx((2 * 7 * 32 * 16 + 4 * 7 * 16 * 2) / 1000)


def test_pointwise_operations_cost_what_enters_and_leaves_them():
    def chain(x, y, w):
        wide = (x.view(-1) * 2).view(-1, 8) + y
        return (wide.exp() @ w,)

    cost = _cost(chain, [(None, 8), (None, 8), (8, 8)])
    assert cost.seconds == pytest.approx((4 * 7 * 8 * 3 + 2 * 7 * 8 * 8) / 1000)


def test_looking_rows_up_costs_what_is_found():
    cost = _cost(lambda ids, w: (F.embedding(ids.to(torch.int64), w),), [(None,), (1000, 8)])
    assert cost.seconds == pytest.approx((4 * 7 + 2 * 4 * 7 * 8) / 1000)


def test_no_kernel_is_shorter_than_its_launch():
    """Two products and a sum of their results, but not the view."""
    cost = _cost(lambda x, w: (x @ w + (x @ w.t()).view(-1, 8),), [(None, 8), (8, 8)], launch=50.0)
    assert cost.seconds == 150.0


def test_twice_the_tokens_cost_twice_the_operations_and_bytes():
    once, twice = (_cost(lambda x, w: (x @ w,), [(None, 32), (32, 16)], tokens) for tokens in (7, 14))
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert twice.peak_bytes == 2 * once.peak_bytes


def test_sequences_of_other_lengths_than_were_traced_cost_what_those_would():
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

    for there, here in ((12, 30), (30, 12)):
        ours, theirs = cost(there, Growth(here / there, here / there)), cost(here, Growth())
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
    # Of four tensors, and of a number in fp32 for each row.
    moved = 4 * (4 * 2 * 7 * 8 + 2 * 7)
    assert cost.seconds == pytest.approx(2 * 2 * 2 * 7 * 7 * 8 / 100 + moved / 1000)


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


@pytest.mark.parametrize(
    "tokens, causal, varies, copies",
    [(16500, True, False, 2), (16512, True, False, 0), (16500, False, False, 0), (300, True, False, 0),
     (16512, True, True, 2), (300, True, True, 0)],
)  # fmt: skip
def test_copies_of_keys_and_values_that_complete_a_block_are_memory(tokens, causal, varies, copies):
    """Where lengths vary, those of a shorter sequence, too."""
    keys, queries = (2 * heads * tokens * 64 for heads in (2, 4))
    beside = queries + 4 * 4 * tokens

    def forward(q, k, v):
        return (attention_by_length(q, k, v, 0.125, causal),)

    def backward(q, k, v, lse):
        op = torch.ops.rewriter.attention_by_length_backward
        return op(q, q, k, v, q, lse, 0.125, causal)

    def by_group(q, k, v, lse):
        op = by_groups[torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default]
        seed = lse.new_empty(2)
        given = q, q, k, v, q, lse.unsqueeze(-1), seed, seed, None, None, None, tokens, tokens, 0.0, causal
        return op(*given)

    def beyond(function, *others, rows=1):
        fakes, outer = StageFakes(tokens), FakeTensorMode()
        shapes = [(rows, heads, tokens, 64) for heads in (4, 2, 2)]
        with outer:
            given = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
            given += [torch.empty(shape, device="cuda") for shape in others]
        inputs = [fakes.like(x, 2 if varies else None) for x in given]
        with tracing(TracingContext(fakes.mode)), torch.no_grad(), fakes.mode:
            graph = forward_graph(function, signature_of(function, inputs, [False] * len(inputs)))
        return graph_cost(graph, fakes, tokens, Machine()).peak_bytes

    assert beyond(forward) == beside
    # The gradient of the queries in fp32, those of keys and values for each of their heads; three results.
    apart, gradients = 4 * queries, queries + 2 * keys
    assert beyond(backward, (1, 4, tokens)) == gradients + apart + copies * keys
    # Of several sequences, the gradients of keys and values that are padded too, before these are cut.
    assert beyond(backward, (2, 4, tokens), rows=2) == 2 * (gradients + apart + 2 * copies * keys)
    # One of two groups at a time; the seed stands for itself.
    assert beyond(by_group, (1, 4, tokens)) == gradients + 8 + (apart + copies * keys) // 2


def test_attention_whose_heads_share_keys_is_counted_here():
    """The formula of torch 2.11 refuses such shapes."""
    mode = FakeTensorMode()
    graph = Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    for node, heads in zip(nodes, (8, 2, 2), strict=True):
        with mode:
            node.meta["val"] = torch.empty(1, heads, 16, 64)
    node = graph.call_function(
        torch.ops.aten._scaled_dot_product_flash_attention.default, (*nodes, 0.0, True)
    )
    assert flops_of(node) == 0.0
