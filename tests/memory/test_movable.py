"""Which weights of a program an error says could be in host memory."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from rewriter.host_weights import could_live_in_host_memory
from rewriter.memory.movable import movable_bytes
from tests.golden import trace


def movable(model, *, trained: bool = False) -> dict[str, int]:
    model.requires_grad_(trained)
    module, _ = trace(lambda ids: model(ids) * 1, torch.zeros(3, dtype=torch.int64))
    program: Any = SimpleNamespace(source=module)
    return movable_bytes(program)


def test_a_frozen_embedding_could_leave_the_device_and_a_trained_one_could_not():
    assert movable(torch.nn.Embedding(8, 4)) == {"embedding": 8 * 4 * 4}
    assert movable(torch.nn.Embedding(8, 4), trained=True) == {}


def test_a_tied_embedding_is_needed_there():
    class Tied(torch.nn.Embedding):
        def forward(self, input):
            return F.linear(super().forward(input), self.weight)

    assert movable(Tied(8, 4)) == {}


def test_the_text_says_how():
    assert could_live_in_host_memory({}, abs) == ""
    text = could_live_in_host_memory({"embedding": 2**30, "layers": 3 * 2**30}, lambda spared: 2**33 - spared)
    assert (
        "embedding's 1.00 GiB and the frozen layers' 3.00 GiB" in text
        and "after prepare(model, host=('embedding', 'layers')), memory_budget=4294967296 would do" in text
    )
