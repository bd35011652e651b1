"""A compiled model against eager and fp64: loss and every gradient, over families and kinds of training.

The rewritten graph runs through AOTAutograd; a few also run through Inductor, whose compilation takes long.
Every family is one graph, and with adapters each of its structures is rewritten.
"""

import pytest
import torch

import rewriter
from tests.families import FAMILIES, batch, build
from tests.parity import parity
from tests.positional import dropout_by_position
from tests.test_families import structures

EAGER = {"backend": "rewriter", "options": {"lowering": "eager"}}
KINDS = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "lora": {"dtype": torch.bfloat16, "lora": True},
    "nf4": {"dtype": torch.bfloat16, "lora": True, "nf4": True, "double_quant": True},
}
# One of each: packed projections, a sandwich of norms, parallel blocks, experts.
QUANTISED = ("phi3", "gpt_neox", "mixtral")
# With adapters all run; and on a GPU.
BARE = ("llama", "cohere", "gpt_oss")
# All their structures are other families' too. They train once: in 16 bit, all weights beside the adapters.
COMPOSED = (
    "llama_rope_llama3", "llama_rope_linear", "llama_rope_yarn", "qwen2", "gemma2_sdpa", "smollm3",
    "granitemoe", "cohere_qk_norm", "cohere2", "stablelm", "starcoder2", "qwen3_moe", "ernie4_5", "hunyuan",
    "exaone4", "nemotron",
)  # fmt: skip
# Their layers are of two kinds. All others' are equal: in fp32, where no rounding hides a fault, one does.
TWO_KINDS = ("gemma2", "gemma3", "gpt_oss", "deepseek_v3", "lfm2", "gemma3n")
BATCHES = [batch(seed=seed) for seed in range(1, 5)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in COMPOSED])
def test_every_structure_trains_as_eager_does_in_fp32(name):
    # Two batches do: without 16-bit rounding there is little luck to average over.
    layers = None if name in TWO_KINDS else 1
    trains_as_eager_does(build(name, layers=layers), BATCHES[:2])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_with_adapters_trains_as_eager_does_in_16_bit(name):
    model = build(name, **KINDS["lora"], all_experts=True)
    if name in COMPOSED:
        model.requires_grad_(True)
    assert trains_as_eager_does(model).counts() == structures(name)


@pytest.mark.parametrize("name", BARE)
def test_all_weights_train_as_eager_does_in_16_bit(name):
    trains_as_eager_does(build(name, **KINDS["bf16"], all_experts=True))


@pytest.mark.parametrize("name", QUANTISED)
def test_4_bit_weights_train_as_eager_does(name):
    trains_as_eager_does(build(name, **KINDS["nf4"], all_experts=True))


def test_llama_through_inductor_trains_as_eager_does():
    # One layer is one graph, of which C++ compiles in half the time.
    parity(build("llama", layers=1, **KINDS["nf4"]), BATCHES, {"backend": "rewriter"}).check()


def test_adapters_with_dropout_train_as_eager_does_where_that_drops_by_position_too():
    model = build("llama", lora=True, lora_dropout=0.3)
    parity(model, BATCHES, EAGER, eagerly=dropout_by_position).check()


def test_autocast_entered_outside_the_model():
    parity(build("llama", lora=True), BATCHES, EAGER, autocast=torch.bfloat16).check()


def trains_as_eager_does(model, batches=BATCHES):
    with rewriter.inspect() as report:
        outcome = parity(model, batches, EAGER)
    assert not errors(report) and len(report.graphs) == 1
    outcome.check()
    return report


def errors(report):
    return [record.error for graph in report.graphs for record in graph.passes if record.error]
