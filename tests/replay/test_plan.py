"""Which graphs are recorded at all, up to how many tokens, and what the report says of it."""

import pytest
import torch
from torch import nn

import rewriter
from rewriter.replay import plan
from tests.capture import capture


class Linear(nn.Module):
    def __init__(self, features=8):
        super().__init__()
        self.table, self.linear = nn.Embedding(50, features), nn.Linear(features, features)

    def forward(self, ids, more=None):
        x = self.table(ids) if more is None else self.table(ids) + more
        return self.linear(x)


def graph_of(model, **inputs):
    (graph,) = capture(model, **inputs)
    return graph


def ids(length=12):
    return torch.zeros(2, length, dtype=torch.int64)


def test_a_graph_of_known_operations_is_recorded():
    notes = []
    made = plan.planned(*graph_of(Linear(), ids=ids()), notes)
    assert made.reading is not None
    assert notes[0].startswith("CUDA graphs: steps of up to ")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"ids": ids(), "more": torch.zeros(8, requires_grad=True)}, "no dense parameter needs a gradient"),
        ({"ids": torch.zeros(12, dtype=torch.int64)}, "no input is a batch of ids"),
    ],
)
def test_what_may_not_be_recorded_says_why(inputs, reason):
    assert reason in str(plan.refusal(*graph_of(Linear(), **inputs)))


def test_tensors_of_another_device_say_why():
    module, (first, *rest) = graph_of(Linear(), ids=ids())
    assert plan.refusal(module, (first.to("meta"), *rest)) == "its tensors are on 2 devices"


def test_frozen_models_are_not_recorded():
    model = Linear().requires_grad_(False)
    assert plan.refusal(*graph_of(model, ids=ids())) == "nothing is trained"


def test_more_weights_allow_fewer_tokens_and_more_operations_more():
    narrow, wide = (plan.most_tokens(*graph_of(Linear(n), ids=ids())) for n in (8, 64))
    assert wide < narrow
    module, examples = graph_of(nn.Sequential(Linear(64), nn.SiLU(), nn.Tanh()), input=ids())
    assert plan.most_tokens(module, examples) > wide


def test_steps_five_times_as_long_are_recorded_where_few_weights_are_trained():
    model = Linear(4096).requires_grad_(False)
    model.linear.bias.requires_grad_(True)
    for trained, longer in ((model.linear.bias, True), (model.linear.weight, False)):
        trained.requires_grad_(True)
        notes = []
        limits = plan.planned(*graph_of(model, ids=ids()), notes).limits
        assert limits is not None and limits.long == limits.tokens * (5 if longer else 1)
        assert ("where their size comes back" in notes[0]) == longer


def test_on_a_cpu_nothing_is_planned_and_nothing_said():
    notes = []
    module, examples = graph_of(Linear(), ids=ids())
    made = plan.plan_recordings(module, examples, notes)
    assert made.reading is None and made.module is module and not notes
    assert made.replayed(print, notes) is print


def test_a_failing_analysis_leaves_the_graph_as_it_is(monkeypatch):
    def fail(*_):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(plan, "read", fail)
    notes = []
    module, examples = graph_of(Linear(), ids=ids())
    made = plan.planned(module, examples, notes)
    assert made.reading is None and made.module is module
    assert notes == ["CUDA graphs: none, reading failed: IndexError: tuple index out of range"]


def test_the_report_tells_what_was_recorded(recorded):
    call = recorded.compile(Linear())
    for length in (12, 9, 14):
        call(ids(length)).sum().backward()
    assert "CUDA graphs: length 64 recorded, 0.00 GiB held in all" in str(rewriter.report())


def test_turned_off_nothing_is_planned(recorded):
    call = recorded.compile(Linear(), cuda_graphs=False)
    call(ids()).sum().backward()
    assert not recorded.plans
