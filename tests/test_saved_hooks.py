"""Hooks of saved tensors see what a step saves, whether it was compiled meanwhile or not."""

import pytest
import torch
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from tests.families import batch, build


def compiled(**options: bool) -> torch.nn.Module:
    torch._dynamo.reset()
    model = build("llama", layers=2)
    model.compile(backend="rewriter", options={"lowering": "eager", **options})
    return model


@pytest.mark.parametrize("verify", (False, True))
def test_a_checkpoint_around_a_model_holds_from_the_first_step_on(verify: bool):
    model, plain = compiled(verify=verify), build("llama", layers=2)
    checkpoint(lambda: model(**batch()).loss, use_reentrant=False).backward()
    plain(**batch()).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_hooks_are_not_given_what_a_compilation_saves():
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        compiled()(**batch())
    assert saved and not any(isinstance(x, FakeTensor) for x in saved)
