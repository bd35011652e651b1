"""What a report says of a model that is not prepared."""

import pytest
import torch
from torch import nn

from rewriter.advice import advice
from rewriter.huggingface import prepare
from tests.test_huggingface import four_bit, hooked, ids
from tests.tiny_llama import tiny_llama, with_lora


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def advised(function, *calls):
    """The lines for every graph that Dynamo makes in these calls; a step of a model where none is given."""
    lines = []

    def collect(graph, example_inputs):
        lines.extend(advice(graph))
        return graph

    compiled = torch.compile(function, backend=collect)
    for call in calls or (step(12),):
        compiled(**call)
    return lines


def step(length):
    return {"input_ids": ids()[:, :length], "labels": ids()[:, :length]}


def test_a_cache_that_is_returned_is_counted_and_weighed():
    (line,) = advised(tiny_llama())
    # 2 layers, keys and values of (2, 2, 12, 8) in four bytes.
    assert line.startswith("4 keys and values") and "rewriter.prepare" in line
    assert f", {4 * 2 * 2 * 12 * 8 * 4:,} bytes:" in line


def test_lengths_that_vary_leave_the_size_out():
    fixed, varying = advised(tiny_llama(), step(12), step(9))
    assert " bytes:" in fixed and " bytes:" not in varying and varying.startswith("4 keys and values")


def test_a_graph_that_the_hook_broke_is_named():
    lines = advised(hooked(with_lora(tiny_llama(num_hidden_layers=1))))
    assert sum("enable_input_require_grads" in line for line in lines) == 1


def test_4bit_products_that_were_traced_into_are_counted():
    model, x = four_bit(nn.Linear(64, 128, bias=False)), torch.randn(3, 64, requires_grad=True)
    (line,) = advised(model, {"x": x})
    assert line.startswith("1 products of 4-bit layers") and "rewriter.prepare" in line
    prepare(model)
    assert advised(model, {"x": x}) == []


def test_a_plain_concatenation_is_no_cache():
    assert advised(lambda x: torch.cat([x, x]), {"x": torch.ones(3)}) == []
