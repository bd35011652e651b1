"""Golden graphs of the dropout pass: the graph that it makes, each guard, and what is dropped then."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from rewriter.passes.dropout import dropout_pass
from tests.golden import rewrite_with
from tests.positional import dropout_by_position

X = torch.randn(2, 5, 32)


def results(module, inputs):
    torch.manual_seed(0)
    return module(*inputs)


def assert_drops_by_position(function, *inputs, **kwargs):
    """Results of the rewritten graph are those of ``function`` with dropout by position in its place."""
    found = rewrite_with(dropout_pass, function, *inputs, **kwargs)
    with dropout_by_position():
        torch.manual_seed(0)
        expected = function(*inputs)
    for ours, theirs in zip(results(found.after, found.inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
    return found


def test_seeds_are_drawn_together_where_the_graph_begins():
    def twice(x):
        first = F.dropout(x.sin(), 0.25)
        return first, F.dropout(first.cos(), p=0.5, training=True)

    found = assert_drops_by_position(twice, X)
    assert found.calls == [
        "dropout_seeds(2, cpu)",
        "unbind(dropout_seeds)",
        "getitem(unbind, 0)",
        "getitem(unbind, 1)",
        "arange(5, device=cpu)",
        "sin(x)",
        "dropped(sin, arange, getitem, 0.25)",
        "cos(dropped)",
        "dropped(cos, arange, getitem_1, 0.5)",
    ]
    assert found.record.count == 2 and not found.reasons


def test_modules_of_every_length_drop_by_position():
    module = torch.nn.Dropout(0.5)
    found = assert_drops_by_position(lambda x, y: (module(x), module(y)), X, X[:, :3])
    assert [call for call in found.calls if call.startswith("arange")] == [
        "arange(5, device=cpu)",
        "arange(3, device=cpu)",
    ]


def test_a_symbolic_length_is_read_from_the_graphs_inputs():
    found = assert_drops_by_position(lambda x: (F.dropout(x, 0.5), F.dropout(x * 2, 0.5)), X, dynamic=True)
    (arange,) = [call for call in found.calls if call.startswith("arange")]
    assert arange.startswith("arange(s")
    assert not any(call.startswith("size") for call in found.calls)


def test_a_length_that_is_computed_is_read_from_the_input():
    found = assert_drops_by_position(lambda x: (F.dropout(x[:, 1:], 0.5),), X, dynamic=True)
    assert sum(call.startswith("size(") for call in found.calls) == 1


def test_a_probability_that_is_a_symbol_is_a_number():
    class Model(torch.nn.Module):
        p = 0.3

        def forward(self, x):
            return (F.dropout(x, self.p),)

    assert_drops_by_position(Model(), X, dynamic=True)


def test_the_body_of_a_checkpoint_draws_seeds_of_its_own():
    def twice(x, w):
        h = F.dropout(x, 0.5)
        return (checkpoint(lambda h: F.dropout(torch.tanh(h @ w), 0.25), h, use_reentrant=False),)

    found = assert_drops_by_position(twice, X.requires_grad_(), torch.randn(32, 8))
    assert found.record.count == 2
    assert sum(call.startswith("dropout_seeds(1") for call in found.calls) == 1


def test_bodies_of_two_checkpoints_drop_other_elements_each():
    """After autograd both are one graph, in which a partitioner would take their draws for one."""

    def twice(x):
        first = checkpoint(lambda x: F.dropout(x * 1.0, 0.5), x, use_reentrant=False)
        second = checkpoint(lambda x: F.dropout(x * 1.0, 0.5).neg(), x, use_reentrant=False)
        return first, second

    torch._dynamo.reset()
    x = torch.ones(1, 64, 64, requires_grad=True)
    compiled = torch.compile(twice, backend="rewriter", options={"lowering": "eager"})
    first, second = compiled(x)
    assert 1500 < (first.bool() != second.bool()).sum() < 2600
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.dropout(x.view(10, 32), 0.5), "what it drops is not (batch, tokens, channels)"),
        (lambda x: F.dropout(x.view(2, 5, 4, 8), 0.5), "what it drops is not (batch, tokens, channels)"),
        (lambda x: F.dropout(x * 1, 0.5, True, True), "expected the constant False, found True"),
    ],
    ids=["rows", "heads", "in place"],
)
def test_other_dropout_is_kept_and_reported(function, reason):
    found = rewrite_with(dropout_pass, function, X.detach())
    assert not found.rewrites and len(found.reasons) == 1
    assert reason in found.reasons[0]


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.5, False)])
def test_dropout_that_draws_nothing_is_kept_without_a_word(p, training):
    found = rewrite_with(dropout_pass, lambda x: F.dropout(x, p, training), X.detach())
    assert not found.rewrites and not found.reasons
    assert not any("dropout_seeds" in call for call in found.calls)


def test_a_graph_without_dropout_stays_the_same_graph():
    found = rewrite_with(dropout_pass, torch.sin, X.detach())
    assert found.after is found.before
