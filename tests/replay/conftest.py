"""Compiles models on a CPU as on a GPU that records: with a stand-in for CUDA graphs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import rewriter.arrangement
from rewriter.replay.plan import Plan, planned
from tests.replay.standin import StandInRecorder


@dataclass
class Recorded:
    """The compilations of a test: their plans in order, and the one recorder of all."""

    recorder: StandInRecorder = field(default_factory=StandInRecorder)
    plans: list[Plan] = field(default_factory=list)
    tokens: int | None = None

    def compile(self, model: nn.Module, **options) -> Callable:
        options = {"lowering": "eager", **options}
        return torch.compile(model, backend="rewriter", options=options)


class _PlanOfTest(Plan):
    recorder: StandInRecorder

    def replayed(self, program, notes, recorder=None):
        return super().replayed(program, notes, self.recorder)


@pytest.fixture
def recorded(monkeypatch) -> Iterator[Recorded]:
    found = Recorded()

    def plan(module, example_inputs, notes):
        made = planned(module, example_inputs, notes)
        mine = _PlanOfTest(made.module, made.example_inputs, made.reading, made.limits, made.device)
        mine.recorder = found.recorder
        if found.tokens is not None and mine.limits is not None:
            mine.limits = replace(mine.limits, tokens=found.tokens)
        found.plans.append(mine)
        return mine

    monkeypatch.setattr(rewriter.arrangement, "plan_recordings", plan)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()
