"""Batches that vary: one plan serves those up to its length, a longer one is planned anew."""

import pytest
import torch
from torch import nn

import rewriter

WIDTH = 16


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(5))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def _chain():
    torch.manual_seed(0)
    return Chain()


def _losses(chain, lengths):
    losses = []
    for seed, length in enumerate(lengths):
        x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))
        loss = chain(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses, [p.grad for p in chain.parameters()]


def trained(lengths, **options):
    """Losses and gradients under a budget that is too small to keep everything, and the plans."""
    torch._dynamo.reset()
    chain = _chain()
    given = {"memory_budget": "280KB", "lowering": "eager", **options}
    chain.compile(backend="rewriter", dynamic=True, options=given)
    with rewriter.inspect() as report:
        found = _losses(chain, lengths)
    return found, [graph.memory for graph in report.graphs]


def assert_as_eager(found, lengths):
    torch.testing.assert_close(found, _losses(_chain(), lengths))


def test_a_longer_batch_is_planned_anew():
    lengths = [20, 12, 20, 30, 25]
    found, plans = trained(lengths)
    assert_as_eager(found, lengths)
    assert len(plans) == 2


def test_one_plan_serves_all_lengths_up_to_the_most_that_is_said():
    lengths = [20, 12, 30, 40, 25]
    found, plans = trained(lengths, max_tokens=80)
    assert_as_eager(found, lengths)
    (plan,) = plans
    assert plan is not None and any("offload" in way or "recompute" in way for _, way, _ in plan.ways)


def test_the_most_that_is_said_may_be_passed():
    lengths = [20, 30]
    found, plans = trained(lengths, max_tokens=44)
    assert_as_eager(found, lengths)
    assert len(plans) == 2


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_a_number_of_tokens_that_is_none_is_an_error(value):
    from rewriter.options import OptionError, Options

    with pytest.raises(OptionError, match="'max_tokens' is .* whole number above 0"):
        Options.parse({"max_tokens": value}, None, ["norm"])


def test_the_report_has_the_plan_as_a_chart_and_as_a_picture():
    _, (plan,) = trained([20, 12], max_tokens=80)
    assert plan is not None and plan.peak <= plan.device_budget
    assert "forward" in plan.chart and plan.chart.count("\n") > 5
    assert plan.picture.startswith("<svg") and plan.picture.rstrip().endswith("</svg>")
