"""Batches that vary: one plan serves those up to its length, longer ones are planned anew, in place."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from rewriter import lower
from rewriter.lower_planned import PlanLowering
from rewriter.memory.budgets import Budgets
from rewriter.memory.lengths import growth_of
from rewriter.memory.longer import Longer, PlannedByLength
from rewriter.memory.plan import Infeasible
from tests.regions.outlined import outlined

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


def test_where_everything_was_kept_a_longer_batch_is_compiled_anew():
    lengths = [20, 12, 30]
    found, plans = trained(lengths, memory_budget="298KB")
    assert_as_eager(found, lengths)
    assert len(plans) == 2


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + (self.query(x) @ x.transpose(1, 2)).softmax(-1) @ self.value(x)


def test_what_keeps_everything_does_not_serve_lengths_whose_scores_would_not_fit(monkeypatch):
    monkeypatch.setattr(f"{__name__}.Layer", Attending)
    held: list[float] = []
    monkeypatch.setattr("rewriter.memory.under_budget.hold_to", lambda _, most: held.append(most))
    _, (long,) = trained([200], memory_budget="1GB")
    for share in (0.6, 1.1):
        trained([50], memory_budget=int(share * long.peak))
    # Of that length are four times the tokens, with sixteen times the scores.
    assert 2 < held[1] < 4 <= held[2] < 4.5


def test_what_keeps_everything_serves_all_lengths_that_fit_whenever_that_was_found(monkeypatch):
    monkeypatch.setattr("rewriter.memory.under_budget.cannot_keep_all", lambda *_: True)
    lengths = [20, 22, 24]
    found, plans = trained(lengths, memory_budget="400KB")
    assert_as_eager(found, lengths)
    assert len(plans) == 1


def test_a_longer_batch_is_planned_anew_and_not_compiled_anew(monkeypatch):
    did = []
    linked, whole = PlanLowering._linked, lower.lower_beside

    def told(self, planned):
        run, peak = linked(self, planned), planned.plan.peak
        return lambda *inputs: did.append(peak) or run(*inputs)

    monkeypatch.setattr(PlanLowering, "_linked", told)
    monkeypatch.setattr(lower, "lower_beside", lambda *given: did.append("compiled") or whole(*given))
    lengths = [30, 44, 30, 43, 20]
    found, (plan,) = trained(lengths)
    assert_as_eager(found, lengths)
    while "compiled" in did[:3]:
        did.remove("compiled")
    # Shorter batches keep the plan that they had, and the report has the last.
    first = did[0]
    assert did == [first, plan.peak, first, plan.peak, first]
    notes = [note for note in rewriter.report().graphs[-1].notes if "anew" in note]
    assert notes == ["memory: planned anew, and not compiled anew, for batches of up to 88 tokens"]
    # It is as good as that of one that is compiled with the longest, beside which there are longer inputs.
    _, (fresh,) = trained([44])
    assert plan.seconds == pytest.approx(fresh.seconds, rel=0.01)
    assert plan.peak <= plan.device_budget


def test_sequences_that_run_otherwise_when_they_are_long_are_compiled_anew(monkeypatch):
    monkeypatch.setattr("rewriter.memory.under_budget.LONG", 40)
    found, plans = trained([30, 40, 41])
    assert_as_eager(found, [30, 40, 41])
    assert len(plans) == 2


def test_more_and_shorter_sequences_run_in_tiles_that_are_no_larger(monkeypatch):
    sizes, whole = [], lower.lower_stage

    def told(*given):
        run = whole(*given)
        return lambda *values: (
            sizes.append(max(x.shape[:2].numel() for x in values if x.dim() == 3)) or run(*values)
        )

    monkeypatch.setattr(lower, "lower_stage", told)
    monkeypatch.setattr("rewriter.memory.choices._TILES", (8,))
    torch._dynamo.reset()
    chain, eager = _chain(), _chain()
    options = {"memory_budget": "280KB", "lowering": "eager"}
    chain.compile(backend="rewriter", dynamic=True, options=options)
    for rows, length in ((2, 40), (10, 8), (16, 5)):
        x = torch.randn(rows, length, 8)
        for model in (chain, eager):
            model(x).square().mean().backward()
    assert len(sizes) > 100 and max(sizes) == 16
    torch.testing.assert_close([p.grad for p in chain.parameters()], [p.grad for p in eager.parameters()])


def test_a_batch_that_is_too_long_is_told_before_any_work_and_shorter_ones_go_on():
    torch._dynamo.reset()
    chain = _chain()
    options = {"memory_budget": "280KB", "lowering": "eager"}
    chain.compile(backend="rewriter", dynamic=True, options=options)
    _losses(chain, [30])
    chain.zero_grad()
    with pytest.raises(Infeasible, match=r"memory_budget=\d+ is the least that would do"):
        chain(torch.randn(2, 100, 8))
    assert all(p.grad is None for p in chain.parameters())
    assert_as_eager(_losses(chain, [30, 40]), [30, 40])


@pytest.mark.parametrize(
    ("tokens", "before", "fits", "asked"),
    [
        (110, 100, 1000, [112.5]),
        (150, 100, 1000, [150]),
        (110, 100, 111, [112.5, 110]),
        (110, 100, 109, [112.5, 110]),
        (390, 380, 1000, [400]),
    ],
)
def test_a_plan_holds_for_an_eighth_more_where_that_fits_and_is_within_reach(tokens, before, fits, asked):
    plans = []

    def at_worst(given):
        plans.append(given.growth.tokens * 100)

    def chosen(given):
        at_worst(given)
        if plans[-1] > fits:
            raise Infeasible("too long", 1, 0)

    longer = Longer(len, len, 100, 50, 1.0, 4.0, lambda _: Budgets(0, 0, 0), chosen, at_worst)
    assert longer.planned_for(range(tokens), before)[0] == asked[-1]
    assert plans == pytest.approx(asked)


@pytest.mark.parametrize(
    ("rows", "fixed", "length"),
    [(2, (), 4.0), (2, (1,), 1.0), pytest.param(6, (), 2.0, id="one symbol for both")],
)
def test_more_tokens_that_are_said_are_longer_sequences_where_their_length_varies(rows, fixed, length):
    x = torch.randn(rows, 6, 8)
    torch._dynamo.mark_static(x, fixed)
    program = outlined(_chain(), x, dynamic=True).program
    assert program is not None and growth_of(program, 4 * rows * 6) == (4.0, length)


def test_more_sequences_of_a_length_are_planned_for_as_such():
    asked = []
    unasked: Any = pytest.fail
    noted: Any = lambda given: asked.append(given.growth)  # noqa: E731
    longer = Longer(prod, max, 100, 50, 1.0, 16.0, lambda _: Budgets(0, 0, 0), noted, unasked)
    for rows_and_length in ((8, 50), (2, 200), (1, 800)):
        longer.planned_for(rows_and_length, 100)
    assert asked == [(4, 1), (4, 4), (8, 16)]
    fixed = replace(longer, lengthened=lambda _: 1.0)
    # An eighth more of sequences of one length is an eighth more of them.
    fixed.planned_for((17, 50), 800)
    assert asked[3:] == [(9, 1)]


def test_the_most_that_is_said_is_within_the_first_plan():
    # 322 times (4096 / 322) is a little less than 4096.
    unasked: Any = pytest.fail
    longer = Longer(len, len, 322, 322, 4096 / 322, 100.0, unasked, unasked, unasked)
    run = PlannedByLength(longer, lambda *inputs: len(inputs), unasked, unasked)
    assert run(*range(4096)) == 4096


@dataclass
class Planned:
    notes: tuple[str, ...] = ()


@pytest.mark.parametrize(("pairs", "fewer"), [(False, "first"), (True, "anew")])
def test_a_plan_serves_longer_sequences_of_fewer_tokens_unless_pairs_of_tokens_are_held(pairs, fewer):
    chosen: Any = lambda given: Planned()  # noqa: E731
    anew: Any = lambda planned: (lambda *_: "anew", planned)  # noqa: E731
    longer = Longer(
        prod, max, 100, 50, 1.0, 4.0, lambda _: Budgets(0, 0, 0), chosen, pytest.fail, pairs=pairs
    )
    run = PlannedByLength(longer, lambda *_: "first", anew, lambda _: None)
    assert [run(*batch) for batch in ((2, 50), (1, 80), (1, 80), (4, 20))] == ["first", fewer, fewer, "first"]


def test_one_plan_serves_all_lengths_up_to_the_most_that_is_said():
    lengths = [20, 12, 30, 40, 25]
    found, plans = trained(lengths, max_tokens=80, memory_budget="266KB")
    assert_as_eager(found, lengths)
    (plan,) = plans
    assert plan is not None and any("offload" in way or "recompute" in way for _, way, _ in plan.ways)


def test_the_most_that_is_said_may_be_passed():
    lengths = [20, 30]
    found, (plan,) = trained(lengths, max_tokens=44, memory_budget="245KB")
    assert_as_eager(found, lengths)
    assert plan is not None and plan.peak <= plan.device_budget


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
