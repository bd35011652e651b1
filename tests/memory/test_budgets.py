"""What is there all the time: weights, gradients and optimizer states, each counted once, at any time."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rewriter.memory.budgets import static_bytes, with_what_comes

GIVEN, TRAINED, OTHERS = 1000, 100, 30


@pytest.mark.parametrize("others", [0, OTHERS])
@pytest.mark.parametrize("states", [0, 2 * TRAINED])
@pytest.mark.parametrize("gradients", [0, TRAINED // 2, TRAINED])
def test_what_is_there_at_the_peak_is_counted_whatever_of_it_is_there_now(gradients, states, others):
    allocated = GIVEN + others + gradients + states
    found = with_what_comes(allocated, GIVEN, TRAINED, gradients)
    assert found == GIVEN + others + 3 * TRAINED


def test_an_optimizer_with_larger_states_is_counted_as_it_is():
    assert with_what_comes(GIVEN + 5 * TRAINED, GIVEN, TRAINED, 0) == GIVEN + 6 * TRAINED


def test_gradients_are_those_of_a_call_that_is_planned_for_later(monkeypatch):
    with FakeTensorMode():
        trained, frozen = nn.Parameter(torch.empty(25, device="cuda")), torch.empty(250, device="cuda")
        # After a step, of which the gradients were let go.
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1100 + 30 + 200)
        device = torch.device("cuda", 0)
        program: Any = None
        before = static_bytes(program, device, [trained, frozen, 7])
        trained.grad = torch.empty(25, device="cuda")
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1100 + 30 + 300)
        assert static_bytes(program, device, [trained, frozen, 7]) == before == 1100 + 30 + 300
