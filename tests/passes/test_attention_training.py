"""The attention pass on whole models: that the rewritten graph trains as the model does."""

import contextlib

import pytest
import torch
from torch import fx

import rewriter
from rewriter.fusion import apply
from rewriter.passes.attention import attention_pass
from tests.families import batch, build
from tests.passes.attention_cases import TOKENS, boolean_squares, calls, capture, without_names


def _left_padding() -> dict:
    return {"attention_mask": (torch.arange(TOKENS)[None] >= torch.tensor([[0], [5]])).long()}


def _packing() -> dict:
    positions = torch.cat([torch.arange(6), torch.arange(TOKENS - 6)])
    return {"position_ids": positions[None].expand(2, -1).contiguous()}


def _losses_and_gradients(module: fx.GraphModule, inputs: list) -> list[torch.Tensor]:
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    loss = next(o for o in module(*inputs) if isinstance(o, torch.Tensor) and o.dim() == 0)
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]


# Without padding or packing tests/test_parity.py trains every family, where sizes are numbers.
PARITY = [
    ("llama", {}, True),
    ("llama", _left_padding(), None),
    ("llama", _packing(), None),
    ("mistral", _left_padding(), None),
    ("mistral", _packing(), True),
    ("gemma2", _packing(), None),
    ("gemma3", _packing(), None),
    ("gpt_oss", _left_padding(), None),
]


@pytest.mark.parametrize(("family", "extra", "dynamic"), PARITY)
def test_the_rewritten_graph_trains_as_the_model_does(family, extra, dynamic):
    labels = batch(length=TOKENS, ignored=6)
    graph, inputs = capture(build(family), dynamic=dynamic, **labels, **extra)
    new, record = apply(attention_pass, graph)
    assert record.count > 0 and record.misses == ()
    ours, theirs = _losses_and_gradients(new, inputs), _losses_and_gradients(graph, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "extra", "call"),
    [
        ("llama", _packing(), "attention(causal=True, segments)"),
        ("gemma2", _left_padding(), "attention(causal=True, window=8, key_mask, softcap=50.0)"),
        ("gpt_oss", {}, "attention(causal=True, window=8, sinks)"),
    ],
)
def test_inside_checkpoints_the_mask_is_proven_and_no_longer_passed(family, extra, call):
    model = build(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    graph, inputs = capture(model, **batch(length=TOKENS, ignored=6), **extra)
    new, record = apply(attention_pass, graph)
    assert record.misses == () and record.count == 2
    assert call in map(without_names, calls(new))
    assert boolean_squares(new) == []
    ours, theirs = _losses_and_gradients(new, inputs), _losses_and_gradients(graph, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_is_seen_wherever_it_was_entered(outside):
    model = build("mistral")

    def inside(**inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs)

    around = torch.autocast("cpu", dtype=torch.bfloat16) if outside else contextlib.nullcontext()
    with around:
        graph, inputs = capture(model if outside else inside, **batch(length=TOKENS))
        new, record = apply(attention_pass, graph)
        assert record.count == 2 and record.misses == ()
        ours, theirs = _losses_and_gradients(new, inputs)[0], _losses_and_gradients(graph, inputs)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_checkpointed_model_compiles_with_a_value_more_and_the_mask_less_in_its_bodies():
    model = build("mistral")
    inputs = {**batch(length=TOKENS, ignored=6), **_packing()}
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    options = {"lowering": "eager", "passes": ["attention"]}
    with rewriter.inspect() as report:
        torch.compile(model, backend="rewriter", options=options)(**inputs).loss.backward()
    assert report.counts()["attention"] == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
