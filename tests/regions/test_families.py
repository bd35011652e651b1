"""Which regions each family's layers become, and that they compute what the graph did."""

import pytest
import torch

from tests.families import batch, build
from tests.regions.outlined import assert_equal, numbers, outlined, run_program

# How many layers, and the calls in order.
ONE_KIND = (3, "beginning a a a end")
ALTERNATING = (4, "beginning a b a b end")
# An adapter on the first layer reads an embedding that needs no gradient.
ADAPTED = (3, "beginning a b b end")
ADAPTED_ALTERNATING = (4, "beginning a b c b end")

# One of each structure that a border or an order depends on; tests/test_parity.py trains all in regions.
PLAIN = {
    "llama": ONE_KIND,
    "gemma3": (6, "beginning a a b a a b end"),
    "mixtral": ONE_KIND,
    # Its norms follow the projections: a region is an MLP and the next layer's attention.
    "olmo2": (4, "beginning a a a end"),
    "granite": ONE_KIND,
    "cohere": ONE_KIND,
    "glm4": ONE_KIND,
    "gpt_neox": ONE_KIND,
    "falcon": ONE_KIND,
    "gpt_oss": ALTERNATING,
    # The first layer is dense, and alone of its kind.
    "deepseek_v3": (4, "beginning a a a end"),
}
ADAPTERS = {
    "llama": ADAPTED,
    "gemma2": ADAPTED_ALTERNATING,
}
# The structure alone.
VARIANTS = {
    "exaone4": (4, "beginning a b a end"),
    "lfm2": ALTERNATING,
    "gptj": ONE_KIND,
}
QUANTISED = {
    "llama": ADAPTED,
    "phi3": ADAPTED,
    "smollm3": ADAPTED_ALTERNATING,
}

# Compiled, too; the others' regions are run as they are, to save time.
_LOWERED = {
    "llama",
    "gemma3",
    "olmo2",
    "falcon",
    "deepseek_v3",
}
# A layer's input is read by two norms and a sum. The first layer, run by the function of the others, adds the
# three gradients in their order, the graph in its own: the embedding's gradient differs by one rounding.
_ANOTHER_ORDER = {"gpt_neox", "falcon"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_family_becomes_the_regions_of_the_table_and_computes_the_same(name):
    layers, order = PLAIN[name]
    case = outlined(build(name, layers=layers), **batch(), lowered=name in _LOWERED)
    assert case.order == order
    ours, theirs = numbers(run_program(case), case.values), numbers(case.body, case.values)
    if name in _ANOTHER_ORDER:
        unequal = [
            i
            for i, pair in enumerate(zip(ours.gradients, theirs.gradients, strict=True))
            if not torch.equal(*pair)
        ]
        assert len(unequal) <= 1
        torch.testing.assert_close(ours.gradients, theirs.gradients, rtol=1e-5, atol=1e-6)
    else:
        assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_family_with_adapters_becomes_the_regions_of_the_table_and_computes_the_same(name):
    layers, order = ADAPTERS[name]
    case = outlined(build(name, lora=True, layers=layers), **batch())
    assert case.order == order
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))


@pytest.mark.parametrize("name", QUANTISED)
def test_four_bit_layers_become_the_regions_of_the_table_and_compute_the_same(name):
    layers, order = QUANTISED[name]
    case = outlined(build(name, lora=True, nf4=True, layers=layers), **batch())
    assert case.order == order
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))


@pytest.mark.parametrize("name", VARIANTS)
def test_another_family_or_variant_becomes_the_regions_of_the_table(name):
    layers, order = VARIANTS[name]
    assert outlined(build(name, layers=layers), **batch()).order == order


def test_adapters_on_a_dense_layer_and_on_layers_of_experts_become_two_kinds():
    model = build("deepseek_v3", lora=True, layers=4)
    assert outlined(model, **batch()).order == "beginning a a a end"
