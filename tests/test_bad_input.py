"""What is wrong with a user's input is said at once, or gives what eager gives."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rewriter
from rewriter import PatternError, passes
from rewriter.fusion import Pass
from rewriter.passes import pass_names

EAGER = {"lowering": "eager"}


class Layer(nn.Module):
    """A norm, a gated MLP, and a loss over shifted labels, as models write them."""

    def __init__(self, vocabulary=32, hidden=16):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.weight = nn.Parameter(torch.rand(hidden))
        self.gate, self.up, self.down = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def norm(self, x):
        h = x.to(torch.float32)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def forward(self, ids, labels):
        x = self.embed(ids)
        h = self.norm(x)
        x = self.norm(x + self.down(F.silu(self.gate(h)) * self.up(h)))
        logits = self.head(x)
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        flat = logits.float().view(-1, logits.shape[-1])
        return F.cross_entropy(flat, shifted.view(-1), ignore_index=-100), logits


def step(model, ids, labels, *, compiled):
    """Loss, logits and gradients of one step."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    call = torch.compile(model, backend="rewriter", options=EAGER) if compiled else model
    loss, logits = call(ids, labels)
    loss.backward()
    return loss.detach(), logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_as_eager(model, ids, labels):
    ours, eager = (step(model, ids, labels, compiled=c) for c in (True, False))
    torch.testing.assert_close(ours, eager, equal_nan=True)


def batch(rows=2, tokens=6):
    ids = torch.randint(0, 32, (rows, tokens))
    return ids, ids.clone()


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_any_length_is_as_eager_one_token_too(tokens):
    assert_as_eager(Layer(), *batch(tokens=tokens))


def test_a_batch_with_every_label_ignored_is_as_eager():
    ids, labels = batch()
    assert_as_eager(Layer(), ids, labels.fill_(-100))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_an_empty_batch_is_as_eager(shape):
    ids = torch.zeros(shape, dtype=torch.long)
    assert_as_eager(Layer(), ids, ids.clone())


def with_nan(name):
    model = Layer()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = float("nan")
    return model


@pytest.mark.parametrize("name", ["weight", "gate.weight", "embed.weight"])
def test_nan_in_the_weights_propagates_as_in_eager(name):
    assert_as_eager(with_nan(name), *batch())


def test_nan_in_the_head_reaches_the_loss_and_every_gradient():
    # Not element by element as in eager: a token without a label is left out of the loss, NaN or not.
    loss, logits, gradients = step(with_nan("head.weight"), *batch(), compiled=True)
    assert loss.isnan() and logits.isnan().any()
    assert all(gradient.isnan().any() for gradient in gradients.values())


def test_a_model_of_float64_is_as_eager():
    assert_as_eager(Layer().double(), *batch())


def test_integer_inputs_of_a_norm_are_as_eager():
    torch._dynamo.reset()
    model, x = Layer(), torch.randint(-9, 9, (3, 16))
    torch.testing.assert_close(torch.compile(model.norm, backend="rewriter", options=EAGER)(x), model.norm(x))


def test_integers_of_a_gate_raise_as_in_eager():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.silu(x) * x, backend="rewriter", options=EAGER)
    with pytest.raises(Exception, match="not implemented for 'Long'"):
        compiled(torch.arange(4))


def test_a_model_on_the_meta_device_runs_and_has_no_values():
    torch._dynamo.reset()
    with torch.device("meta"):
        model, (ids, labels) = Layer(), batch()
    loss, logits = torch.compile(model, backend="rewriter", options=EAGER)(ids, labels)
    assert loss.is_meta and logits.is_meta
    assert logits.shape == (2, 6, 32)


@pytest.mark.parametrize("pattern", [3, "norm", F.silu(torch.ones(1)), nn.SiLU(), torch.relu, Layer])
def test_a_pattern_that_is_no_function_is_refused_at_its_declaration(pattern):
    with pytest.raises(PatternError, match="a pattern is a plain function, got"):
        rewriter.rewrite(to=F.relu)(pattern)


def test_a_pass_that_raises_is_reported_and_the_graph_stays(monkeypatch, caplog):
    def broken(graph):
        graph.output(next(iter(graph.nodes)))
        raise ZeroDivisionError("a bug in a pass")

    monkeypatch.setattr(passes, "_PASSES", (Pass("broken", broken), *passes._PASSES))
    with rewriter.inspect() as report, caplog.at_level(logging.WARNING):
        assert_as_eager(Layer(), *batch())
    failed, *others = [p for p in report.graphs[0].passes if p.name in ("broken", "norm", "gated_mlp")]
    assert failed.error == "ZeroDivisionError: a bug in a pass"
    assert all(p.count for p in others)
    assert "pass broken failed and was left out" in caplog.text
    assert "broken: left out, it failed: ZeroDivisionError" in str(report)


def test_a_pass_that_leaves_a_broken_graph_is_reported_and_the_graph_stays(monkeypatch):
    def broken(graph):
        # Reads a value before it is made: the graph's own check finds it.
        *_, last, output = graph.nodes
        output.prepend(next(iter(graph.find_nodes(op="placeholder"))))
        raise AssertionError(f"{last} in disorder")

    monkeypatch.setattr(passes, "_PASSES", (Pass("broken", broken),))
    with rewriter.inspect() as report:
        assert_as_eager(Layer(), *batch())
    assert report.graphs[0].passes[-1].error is not None


def test_an_unknown_option_and_an_unknown_pass_are_refused_with_the_nearest_name():
    for options, hint in (({"verfy": True}, "'verify'"), ({"passes": ["normm"]}, "'norm'")):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"did you mean {hint}"):
            torch.compile(Layer(), backend="rewriter", options=options)(*batch())


def test_a_graph_without_anything_to_rewrite_gives_inductors_own_result():
    torch._dynamo.reset()
    x = torch.randn(5, 7)

    def function(x):
        return torch.tanh(x).cumsum(0)

    with rewriter.inspect() as report:
        ours = torch.compile(function, backend="rewriter")(x)
    torch._dynamo.reset()
    assert torch.equal(ours, torch.compile(function, backend="inductor")(x))
    assert sum(report.counts().values()) == 0
    assert set(report.counts()) == set(pass_names())
