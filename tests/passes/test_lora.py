"""Golden graphs of the LoRA pass: each variant, each guard, and the numbers of the rewritten graph."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter.fusion import apply, apply_all
from rewriter.passes.dropout import dropout_pass
from rewriter.passes.lora import lora_pass
from tests.capture import capture
from tests.families import batch, build
from tests.golden import rewrite_with

X = torch.randn(2, 5, 32)
W, V = torch.randn(48, 32), torch.randn(16, 32)
A, B = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
C, D = torch.randn(4, 32, requires_grad=True), torch.randn(16, 4, requires_grad=True)


def adapted(x, w, a, b, scale=2.0, bias=None):
    return F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * scale


def test_one_linear_becomes_one_call():
    found = rewrite_with(lora_pass, adapted, X, W, A, B)
    assert [name for name in found.calls if "lora" in name] == found.calls
    found.assert_same_numbers()


def test_projections_of_one_input_become_one_call():
    def projections(x, w, v, a, b, c, d):
        return adapted(x, w, a, b), adapted(x, v, c, d)

    found = rewrite_with(lora_pass, projections, X, W, V, A, B, C, D)
    assert sum(call.startswith("lora_linears(") for call in found.calls) == 1
    found.assert_same_numbers()


def test_a_projection_of_another_input_is_a_call_of_its_own():
    def projections(x, w, v, a, b, c, d):
        return adapted(x, w, a, b), adapted(x * 2, v, c, d)

    found = rewrite_with(lora_pass, projections, X, W, V, A, B, C, D)
    assert sum(call.startswith("lora_linears(") for call in found.calls) == 2
    found.assert_same_numbers()


def test_projections_are_not_merged_across_a_write_into_their_input():
    def projections(x, w, v, a, b, c, d):
        y = x + 1
        first = adapted(y, w, a, b)
        y.mul_(2)
        return first, adapted(y, v, c, d)

    frozen = [t.detach() for t in (A, B, C, D)]
    found = rewrite_with(lora_pass, projections, X, W, V, *frozen)
    assert sum(call.startswith("lora_linears(") for call in found.calls) != 1
    found.assert_same_numbers()


@pytest.mark.parametrize("bias", [None, torch.randn(48, requires_grad=True)])
def test_a_linear_written_as_a_product_with_the_transposed_weight_becomes_one_call(bias):
    def product(x, w, bias, a, b):
        base = x @ w.T
        base = base if bias is None else base + bias
        return base + F.linear(F.linear(x, a), b) * 2.0

    found = rewrite_with(lora_pass, product, X, W, bias, A, B)
    assert list(found.rewrites) == ["lora" if bias is None else "lora_bias_added"]
    assert [name for name in found.calls if "lora" not in name] == []
    found.assert_same_numbers()


def test_a_result_that_is_written_in_place_becomes_one_call():
    def added(x, w, a, b):
        y = adapted(x, w, a, b)
        y += 1.0
        return y

    found = rewrite_with(lora_pass, added, X, W, A, B)
    assert list(found.rewrites) == ["lora"]
    found.assert_same_numbers()


def test_a_bias_wider_than_its_product_is_kept_apart():
    def product(x, w, bias, a, b):
        base = x @ w.T + bias
        return base + F.linear(F.linear(x, a), b) * 2.0

    half = (t.detach().bfloat16() for t in (X, W))
    found = rewrite_with(lora_pass, product, *half, torch.randn(48), A.bfloat16(), B.bfloat16())
    assert not found.rewrites
    assert any("a bias of torch.float32 is added to a product" in reason for reason in found.reasons)


@pytest.mark.parametrize("halved", [(W,), (A, B), (B,)], ids=["base", "adapter", "B"])
def test_products_of_two_dtypes_fail_as_in_eager(halved):
    inputs = [t.detach().half() if any(t is h for h in halved) else t for t in (X, W, A, B)]
    torch._dynamo.reset()
    for call in (adapted, torch.compile(adapted, backend="rewriter", options={"lowering": "eager"})):
        with rewriter.inspect() as report, pytest.raises(RuntimeError, match="same dtype"):
            call(*inputs)
    (record,) = [p for g in report.graphs for p in g.passes if p.name == "lora"]
    assert not record.count and "eager refuses to multiply" in record.misses[0].reason


def test_a_wide_adapter_is_kept():
    wide = torch.randn(16, 32), torch.randn(48, 16)
    found = rewrite_with(lora_pass, adapted, X, W, *wide)
    assert not found.rewrites
    assert any("rank 16 is wide beside a weight of (48, 32)" in reason for reason in found.reasons)


def test_an_adapter_whose_inner_product_is_also_returned_is_kept():
    def returned(x, w, a, b):
        down = F.linear(x, a)
        return F.linear(x, w) + F.linear(down, b) * 2.0, down

    found = rewrite_with(lora_pass, returned, X, W, A, B)
    assert not found.rewrites
    assert any("is also returned" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ({}, 0.0),
        ({"rslora": True}, 0.1),
        ({"nf4": True}, 0.1),
        ({"nf4": True, "double_quant": True}, 0.0),
    ],
)
def test_all_seven_linears_of_a_layer(kind, dropout):
    model = build("llama", dtype=torch.bfloat16, lora=True, lora_dropout=dropout, **kind)
    ((module, _),) = capture(model, **batch())
    done = apply_all([dropout_pass, lora_pass], module)
    dropouts, record = done.records
    assert record.error is None and record.count == 14 and not record.misses
    names = [getattr(n.target, "__name__", "") for n in done.module.graph.nodes]
    # q, k, v in one, o; gate and up in one, down.
    assert names.count("lora_linears") == 8
    assert names.count("dropped") == dropouts.count == (14 if dropout else 0) and "dropout" not in names


def test_a_4_bit_linear_without_adapter_is_dequantised_again_in_the_backward():
    model = build("llama", dtype=torch.bfloat16, nf4=True)
    ((module, _),) = capture(model, **batch())
    _, record = apply(lora_pass, module)
    assert {m.rewrite for m in record.matches} == {"bare_4bit"} and record.count == 14
