"""How many of each structure the passes rewrite in each family, with adapters on its linears.

The numbers are what the models have: norms, pairs turned, attentions, adapted linears, gates and one
loss. Zeros are structures that a family lacks, but for GPT-J's attention. Here they are held to where lengths
are symbols; where they are numbers tests/test_parity.py does so, of the graphs that it trains.
"""

import pytest
import torch

from rewriter.backend import rewrite_graph
from rewriter.options import Options
from rewriter.report import GraphRecord, Report
from tests.capture import capture
from tests.families import FAMILIES, batch, build

COLUMNS = ("lora", "norm", "rotary", "attention", "gated_mlp", "lm_head_loss")
COUNTS = {
    "llama": (14, 5, 2, 2, 2, 1),
    "llama_bias": (14, 5, 2, 2, 2, 1),
    "llama_rope_llama3": (14, 5, 2, 2, 2, 1),
    "llama_rope_linear": (14, 5, 2, 2, 2, 1),
    "llama_rope_yarn": (14, 5, 2, 2, 2, 1),
    "mistral": (14, 5, 2, 2, 2, 1),
    "qwen2": (14, 5, 2, 2, 2, 1),
    "qwen3": (14, 9, 2, 2, 2, 1),
    "phi3": (8, 5, 2, 2, 2, 1),
    "gemma": (14, 5, 2, 2, 2, 1),
    "gemma2": (14, 9, 2, 2, 2, 1),
    "gemma2_sdpa": (14, 9, 2, 2, 2, 1),
    "gemma3": (21, 19, 3, 3, 3, 1),
    "mixtral": (8, 5, 2, 2, 2, 1),
    "smollm3": (14, 5, 1, 2, 2, 1),
    "olmo2": (14, 9, 2, 2, 2, 1),
    "granite": (14, 5, 2, 2, 2, 1),
    "cohere": (14, 3, 2, 2, 2, 1),
    "cohere_qk_norm": (14, 7, 2, 2, 2, 1),
    "cohere2": (14, 3, 1, 2, 2, 1),
    "glm4": (12, 9, 2, 2, 2, 1),
    "phi": (12, 3, 2, 2, 0, 1),
    "gpt_neox": (8, 5, 2, 2, 0, 1),
    "stablelm": (14, 5, 2, 2, 2, 1),
    "starcoder2": (12, 5, 2, 2, 0, 1),
    "falcon": (8, 5, 2, 2, 0, 1),
    "gpt_oss": (8, 5, 2, 2, 2, 1),
    "deepseek_v3": (10, 9, 2, 2, 3, 1),
    "qwen3_moe": (8, 9, 2, 2, 2, 1),
    "granitemoe": (8, 5, 2, 2, 2, 1),
    "ernie4_5": (14, 5, 2, 2, 2, 1),
    "hunyuan": (14, 9, 2, 2, 2, 1),
    "exaone4": (14, 9, 1, 2, 2, 1),
    "nemotron": (12, 5, 2, 2, 0, 1),
    "bitnet": (14, 9, 2, 2, 2, 1),
    "apertus": (12, 9, 2, 2, 0, 1),
    "diffllama": (14, 7, 2, 4, 2, 1),
    "lfm2": (12, 7, 1, 1, 2, 1),
    "gptj": (12, 3, 2, 0, 0, 1),
    "gemma3n": (25, 24, 4, 2, 4, 1),
}


def test_the_table_names_every_family():
    assert COUNTS.keys() == FAMILIES.keys()


# Between them they have every structure with a size, a scale or an epsilon of its own: what others add to one
# of these, a weight or a bias, is no symbol.
DYNAMIC = (
    "mistral", "phi3", "gemma3", "granite", "cohere_qk_norm", "glm4", "gpt_neox", "gpt_oss",
    "deepseek_v3", "gemma3n",
)  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_every_structure_is_rewritten_where_settings_are_symbols(name):
    """In dynamic graphs scales and epsilons are symbols too."""
    ((module, _),) = capture(build(name, lora=True, dtype=torch.bfloat16), dynamic=True, **batch())
    record = GraphRecord("captured")
    rewrite_graph(module, Options(), record)
    assert not [p.error for p in record.passes if p.error]
    assert Report([record]).counts() == structures(name)


def structures(name: str) -> dict[str, int]:
    """By pass, what is to be rewritten in a family with adapters."""
    return {"dropout": 0, **dict(zip(COLUMNS, COUNTS[name], strict=True))}
