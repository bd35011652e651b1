"""A compiled model against eager and fp64: loss and every gradient, over families and kinds of training.

The rewritten graph runs through AOTAutograd; a few also run through Inductor, whose compilation takes long.
"""

import pytest
import torch

import rewriter
from tests.families import FAMILIES, batch, build
from tests.parity import parity

EAGER = {"backend": "rewriter", "options": {"lowering": "eager"}}
KINDS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "lora": {"dtype": torch.bfloat16, "lora": True},
    "nf4": {"dtype": torch.bfloat16, "lora": True, "nf4": True, "double_quant": True},
}
# One of each structure; what differs in names alone is left to the test of all families.
STRUCTURES = ("llama", "mistral", "qwen3", "phi3", "gemma3", "olmo2", "cohere", "glm4", "gpt_neox", "mixtral")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_as_eager_does_in_fp32(name):
    with rewriter.inspect() as report:
        outcome = parity(build(name), batch(), EAGER)
    assert not errors(report)
    outcome.check()


@pytest.mark.parametrize("kind", ["bf16", "lora", "nf4"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_trains_as_eager_does_in_16_bit(name, kind):
    experts = {"all_experts": True} if name == "mixtral" else {}
    with rewriter.inspect() as report:
        outcome = parity(build(name, **KINDS[kind], **experts), batch(), EAGER)
    assert not errors(report)
    outcome.check()


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_llama_through_inductor_trains_as_eager_does(kind):
    outcome = parity(build("llama", **KINDS[kind]), batch(), {"backend": "rewriter"})
    outcome.check()


def test_dropout_draws_eagers_masks_and_gives_eagers_gradients():
    model = build("llama", lora=True, lora_dropout=0.3)
    parity(model, batch(), EAGER, same_dropout=True).check()


def test_autocast_entered_outside_the_model():
    parity(build("llama", lora=True), batch(), EAGER, autocast=torch.bfloat16).check()


def errors(report):
    return [record.error for graph in report.graphs for record in graph.passes if record.error]
