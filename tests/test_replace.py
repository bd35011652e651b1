"""Putting replacements into graphs: whole or not at all, in the right place, and nothing else lost."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rewriter.fusion import apply, pattern_pass
from rewriter.nested import duplicate
from rewriter.pattern import declare
from tests.golden import calls, rewrite_with, trace

X = torch.randn(4, 8)


def squared(x):
    return F.relu(x).pow(2)


def fused(x):
    return F.relu(x) * F.relu(x)


def one(pattern, to, anchors=("relu",), **constants):
    return pattern_pass("one", [declare(pattern, to=to, **constants)], anchors)


SQUARED = one(squared, fused)


def test_a_match_becomes_one_call_and_its_operations_are_gone():
    done = rewrite_with(SQUARED, lambda x: squared(x) + 1, X)
    assert done.calls == ["fused(x)", "add(fused, 1)"]
    done.assert_same_numbers()


def test_the_graph_given_is_left_as_it_was():
    module, _ = trace(lambda x: squared(x), X)
    before = calls(module)
    after, _ = apply(SQUARED, module)
    assert after is not module
    assert calls(module) == before


def test_a_graph_without_a_match_is_returned_itself():
    module, _ = trace(lambda x: x + 1, X)
    assert apply(SQUARED, module)[0] is module


def test_matches_inside_one_another_are_all_replaced():
    done = rewrite_with(SQUARED, lambda x: squared(squared(squared(x))), X)
    assert done.calls == ["fused(x)", "fused(fused)", "fused(fused_1)"]
    done.assert_same_numbers()


def test_a_replacement_of_another_dtype_is_a_miss():
    done = rewrite_with(one(squared, lambda x: fused(x).double()), squared, X)
    assert done.rewrites == {}
    assert done.reasons == ["the replacement gives torch.float64, the graph has torch.float32"]


def test_a_replacement_of_another_shape_is_a_miss():
    done = rewrite_with(one(squared, lambda x: fused(x)[:1]), squared, X)
    assert done.reasons == ["the replacement gives shape (1, 8), the graph has (4, 8)"]


def test_a_replacement_that_returns_several_values_for_one_is_a_miss():
    done = rewrite_with(one(squared, lambda x: 3), squared, X)
    assert done.reasons == ["the replacement gives int, the graph has FakeTensor"]


def test_constants_and_what_a_callable_makes_of_the_match_are_arguments():
    def scaled(x, factor, width):
        return fused(x)

    done = rewrite_with(
        one(squared, scaled, factor=2.0, width=lambda match: match.value("x").shape[-1]), squared, X
    )
    assert done.calls == ["scaled(x, 2.0, 8)"]


def test_both_results_are_handed_on():
    def pattern(x, y):
        h = x + y
        return torch.tanh(h), h

    def both(x, y):
        h = x + y
        return torch.tanh(h), h

    def function(x, y):
        h = x + y
        return torch.tanh(h) * 2, h * 3

    done = rewrite_with(one(pattern, both), function, X, X.clone())
    assert done.calls == [
        "both(x, y)",
        "getitem(both, 0)",
        "getitem(both, 1)",
        "mul(getitem, 2)",
        "mul(getitem_1, 3)",
    ]
    done.assert_same_numbers()


def test_a_result_needed_before_all_inputs_are_known_is_a_miss():
    def pattern(x, w):
        h = torch.sigmoid(x)
        return h * w, h

    def both(x, w):
        h = torch.sigmoid(x)
        return h * w, h

    def function(x):
        h = torch.sigmoid(x)
        return h * h.exp()

    done = rewrite_with(one(pattern, both, ("sigmoid",)), function, X)
    assert done.rewrites == {}
    assert done.reasons == ["`exp` needs a result before `exp` is known"]


def test_writes_in_place_survive():
    def function(x, total):
        total.add_(1.0)
        return squared(x)

    done = rewrite_with(SQUARED, function, X, torch.zeros(3))
    assert done.calls == ["add_(total, 1.0)", "fused(x)"]
    done.assert_same_numbers()


def test_random_numbers_and_modes_survive():
    def function(x):
        with torch.no_grad():
            y = squared(x)
        return F.dropout(y, 0.5)

    done = rewrite_with(SQUARED, function, X)
    assert [c.partition("(")[0] for c in done.calls] == [
        "_set_grad_enabled",
        "fused",
        "_set_grad_enabled",
        "dropout",
    ]
    done.assert_same_numbers()


def test_a_replacement_knows_its_value_and_its_place_in_the_model():
    done = rewrite_with(SQUARED, squared, X)
    (call,) = [n for n in done.after.graph.nodes if n.op == "call_function"]
    assert call.meta["example_value"].shape == (4, 8)
    assert "test_replace.py" in call.meta["stack_trace"]


def test_bodies_of_checkpoints_are_rewritten_and_shared_with_no_copy():
    def function(x):
        return checkpoint(squared, x, use_reentrant=False)

    module, _ = trace(function, X.clone().requires_grad_())
    copied = duplicate(module)
    after, record = apply(SQUARED, copied)
    assert record.count == 1
    (rewritten,) = [m for m in after.modules() if m is not after]
    assert [c.partition("(")[0] for c in calls(rewritten)] == ["fused"]
    (original,) = [m for m in module.modules() if m is not module]
    assert [c.partition("(")[0] for c in calls(original)] == ["relu", "pow"]
