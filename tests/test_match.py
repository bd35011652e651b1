"""The matcher: what a pattern matches, what it binds, and the reason where it does not."""

import pytest
import torch
import torch.nn.functional as F

from rewriter import replace
from rewriter.canonical import canonical
from rewriter.effects import Effects
from rewriter.fusion import apply
from rewriter.match import Match
from rewriter.passes.norm import norm
from rewriter.pattern import declare, maybe, require
from rewriter.search import match
from tests.golden import trace

X = torch.randn(2, 3, 4)


def anything(**bindings):
    return bindings


def result(pattern, function, *inputs, where=None, dynamic=False):
    """The match of ``pattern`` at the last operation of ``function``'s graph, or its misses."""
    rewrite = declare(pattern, to=anything, where=where)
    module, _ = trace(function, *inputs, dynamic=dynamic)
    effects = Effects.of(module.graph)
    *_, last, _ = module.graph.nodes
    return match(rewrite, last, effects)


def found(*args, **kwargs):
    outcome = result(*args, **kwargs)
    assert isinstance(outcome, Match), [m.reason for m in outcome]
    return outcome


def reasons(*args, **kwargs):
    outcome = result(*args, **kwargs)
    assert isinstance(outcome, list)
    return [m.reason for m in outcome]


def test_holes_bind_values_constants_and_none():
    outcome = found(
        lambda x, w, b, c: F.linear(x, w, b) * c, lambda x, w: F.linear(x, w) * 3, X, torch.ones(5, 4)
    )
    assert (outcome.x.name, outcome.w.name, outcome.b, outcome.c) == ("x", "w", None, 3)
    assert outcome["x"] is outcome.x
    assert outcome.value("w").shape == (5, 4)


def test_a_hole_binds_a_symbolic_float_as_its_number():
    outcome = found(lambda x, c: torch.tanh(x) * c, lambda x, c: torch.tanh(x) * c, X, 0.5, dynamic=True)
    assert outcome.c == 0.5


def test_a_hole_that_is_not_bound_is_an_error_that_lists_those_that_are():
    with pytest.raises(AttributeError, match="binds x; not `y`"):
        _ = found(lambda x: torch.tanh(x), lambda x: torch.tanh(x), X).y


@pytest.mark.parametrize("operation", [torch.add, torch.mul])
def test_sums_and_products_match_in_either_order(operation):
    def pattern(x, y):
        return operation(torch.tanh(x), torch.sigmoid(y))

    outcome = found(pattern, lambda x, y: operation(torch.sigmoid(y), torch.tanh(x)), X, X.clone())
    assert (outcome.x.name, outcome.y.name) == ("x", "y")


def test_differences_do_not_match_in_the_other_order():
    def pattern(x, y):
        return torch.tanh(x) - torch.sigmoid(y)

    assert reasons(pattern, lambda x, y: torch.sigmoid(y) - torch.tanh(x), X, X.clone())


def test_every_order_of_nested_sums_is_tried():
    def pattern(x, y, z):
        return (torch.tanh(x) + torch.sigmoid(y)) + torch.exp(z)

    def function(x, y, z):
        return torch.exp(z) + (torch.sigmoid(y) + torch.tanh(x))

    outcome = found(pattern, function, X, X.clone(), X.clone())
    assert [outcome[h].name for h in "xyz"] == ["x", "y", "z"]


def test_a_hole_used_twice_must_bind_one_value():
    def pattern(x):
        return torch.tanh(x) - torch.sigmoid(x)

    assert found(pattern, lambda x: torch.tanh(x) - torch.sigmoid(x), X)
    (reason,) = reasons(pattern, lambda x, y: torch.tanh(x) - torch.sigmoid(y), X, X.clone())
    assert reason == "`x` is `x` of float32 in one place and `y` of float32 in another"


def test_a_cast_matches_a_value_that_has_the_dtype_already():
    def pattern(x):
        return torch.tanh(x.float()).to(x.dtype)

    assert found(pattern, lambda x: torch.tanh(x), X).x.name == "x"
    assert found(pattern, lambda x: torch.tanh(x.float()).bfloat16(), X.bfloat16()).x.name == "x"


def test_a_cast_to_another_dtype_is_a_miss_that_names_both():
    def pattern(x):
        return torch.tanh(x.float()).to(x.dtype)

    (reason, *_) = reasons(pattern, lambda x: torch.tanh(x.float()).half(), X.bfloat16())
    assert "expected torch.bfloat16, found" in reason


def test_expressions_over_shapes_are_evaluated_on_what_is_bound():
    def pattern(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    def rotate(at):
        return lambda x: torch.cat((-x[..., at:], x[..., :at]), dim=2)

    assert found(pattern, rotate(2), X).x.name == "x"
    assert any("expected 2, found 1" in r for r in reasons(pattern, rotate(1), X))


def test_expressions_over_symbolic_shapes_are_compared_without_a_guard():
    def pattern(x):
        return x.view(x.shape[0], x.shape[1], -1).tanh()

    outcome = found(pattern, lambda x: x.view(x.shape[0], x.shape[1], -1).tanh(), X, dynamic=True)
    assert outcome.x.name == "x"


def test_maybe_matches_the_function_or_its_absence():
    def pattern(x, p, training):
        return torch.tanh(maybe(F.dropout, x, p, training))

    dropped = found(pattern, lambda x: torch.tanh(F.dropout(x, 0.1)), X)
    assert (dropped.x.name, dropped.p, dropped.training) == ("x", 0.1, True)
    plain = found(pattern, lambda x: torch.tanh(x), X)
    assert (plain.x.name, plain.p, plain.training) == ("x", None, None)


def test_maybe_of_a_product_matches_in_either_order():
    def pattern(x, scale):
        return torch.tanh(maybe(torch.mul, torch.sigmoid(x), scale))

    outcome = found(pattern, lambda x, s: torch.tanh(s * torch.sigmoid(x)), X, torch.ones(4))
    assert (outcome.x.name, outcome.scale.name) == ("x", "s")


def test_a_guard_refuses_with_its_reason():
    def wide(match):
        require(match.value("x").shape[-1] > 100, "too narrow")

    assert reasons(lambda x: torch.tanh(x), lambda x: torch.tanh(x), X, where=wide) == ["too narrow"]


def test_a_value_that_is_read_elsewhere_or_returned_is_a_miss():
    def pattern(x):
        return torch.tanh(x).exp()

    def used(x):
        y = torch.tanh(x)
        return y.sum(), y.exp()

    def returned(x):
        y = torch.tanh(x)
        return y, y.exp()

    assert reasons(pattern, used, X) == ["`y` is also used by `sum_1`"]
    assert reasons(pattern, returned, X) == ["`y` is also returned"]


def test_a_second_result_may_be_read_elsewhere():
    def pattern(x, y):
        h = x + y
        return torch.tanh(h), h

    def function(x, y):
        h = x + y
        return h * 2, torch.tanh(h)

    outcome = found(pattern, function, X, X.clone())
    assert [o.name for o in outcome.outputs] == ["tanh", "h"]


def test_a_miss_names_both_lines_and_what_differs():
    def pattern(x):
        return torch.tanh(torch.sigmoid(x))

    (miss,) = result(pattern, lambda x: torch.tanh(torch.exp(x)), X)
    assert miss.reason == "expected sigmoid, found exp"
    assert miss.depth == 1
    assert miss.pattern_line == f"{__file__}:{pattern.__code__.co_firstlineno + 1}"
    assert "test_match.py" in miss.model_line


@pytest.mark.parametrize(
    ("constant", "reason"), [(2, None), (2.0, None), (3, "expected the constant 2, found 3")]
)
def test_constants_match_by_value(constant, reason):
    outcome = result(lambda x: torch.tanh(x) * 2, lambda x: torch.tanh(x) * constant, X)
    assert isinstance(outcome, Match) if reason is None else reason in [m.reason for m in outcome]


def test_the_search_looks_at_each_operation_once_and_its_attempts_grow_with_the_graph(monkeypatch):
    def layer(x, w):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + F.silu(F.linear(w * h, torch.eye(4))) * F.linear(h, torch.eye(4))

    def model(x, w, layers):
        for _ in range(layers):
            x = layer(x, w)
        return x

    looked, attempts = [], []
    monkeypatch.setattr(replace, "canonical", lambda n: looked.append(n) or canonical(n))
    monkeypatch.setattr(replace, "match", lambda r, n, *rest: attempts.append(n) or match(r, n, *rest))

    def work(layers):
        looked.clear(), attempts.clear()
        _, record = apply(norm, trace(model, X, torch.ones(4), layers)[0])
        assert record.count == layers
        assert len(looked) == len(set(looked))
        return len(attempts)

    assert work(9) - work(8) == work(4) - work(3)
