"""Whole tiny models through the kernels, beside eager and fp64: loss and every gradient."""

import pytest
import torch

from tests.families import FAMILIES, batch, build
from tests.parity import parity

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

EAGER = {"backend": "rewriter", "options": {"lowering": "eager"}}


@pytest.mark.parametrize("lora", [False, True], ids=["bf16", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_as_eager_does_through_the_kernels(name, lora):
    model = build(name, dtype=torch.bfloat16, lora=lora, all_experts=True, device="cuda")
    batches = [batch(seed=seed, device="cuda") for seed in range(1, 5)]
    parity(model, batches, EAGER).check()
