"""The attention pass on whole models: what each kind of a family's attention becomes."""

import pytest

from rewriter.fusion import apply
from rewriter.passes.attention import attention_pass
from tests.families import batch, build
from tests.passes.attention_cases import TOKENS, boolean_squares, calls, capture, without_names

CAUSAL, WINDOW = "causal_attention()", "attention(causal=True, window=8)"
# Families whose attention is not plain causal in every layer.
OTHERS = {
    "mistral": [WINDOW, WINDOW],
    "starcoder2": [WINDOW, WINDOW],
    "gemma2": [
        "attention(causal=True, window=8, softcap=50.0)",
        "attention(causal=True, softcap=50.0)",
    ],
    "gemma2_sdpa": [WINDOW, CAUSAL],
    "gemma3": [WINDOW, WINDOW, CAUSAL],
    "cohere2": [WINDOW, CAUSAL],
    "exaone4": [WINDOW, CAUSAL],
    # Two halves of the values in each layer.
    "diffllama": [CAUSAL] * 4,
    # The first layer is a convolution.
    "lfm2": [CAUSAL],
    "gemma3n": [WINDOW, CAUSAL],
    "gpt_oss": ["attention(causal=True, window=8, sinks)", "attention(causal=True, sinks)"],
}


# Those beside them that write projections, rotation or scale in their own way. The others' attention and mask
# are one of these's; tests/test_parity.py counts them.
CAUSAL_IN_EVERY_LAYER = ("llama", "phi3", "gpt_neox", "falcon", "granite", "deepseek_v3")


@pytest.mark.parametrize("family", [*CAUSAL_IN_EVERY_LAYER, *OTHERS])
def test_every_attention_of_a_family_is_rewritten_and_its_mask_is_gone(family):
    graph, _ = capture(build(family), **batch(length=TOKENS))
    new, record = apply(attention_pass, graph)
    wanted = OTHERS.get(family, [CAUSAL, CAUSAL])
    assert record.error is None and record.misses == () and record.count == len(wanted)
    assert [without_names(c) for c in calls(new)] == wanted
    assert boolean_squares(new) == []
