"""Models under a memory budget train as they do without; one that is too small is told before any work."""

import contextlib
from collections.abc import Callable

import pytest
import torch

import rewriter
from rewriter.memory.plan import Infeasible
from tests.families import batch, build

LENGTHS = (24, 24)


@pytest.fixture(autouse=True)
def _short_tiles(monkeypatch):
    # Those of a GPU are longer than these sequences.
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 8))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _batches(lengths=LENGTHS) -> list[dict]:
    return [batch(rows=2, length=length, seed=number) for number, length in enumerate(lengths)]


def _steps(model, batches, around: Callable = contextlib.nullcontext) -> tuple[list, dict]:
    """Losses, and the gradients that all batches together leave."""
    losses = []
    for given in batches:
        with around():
            loss = model(**given).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _compiled(model, budget, **options):
    model.compile(
        backend="rewriter", options={"lowering": "eager", "memory_budget": budget, **options}, dynamic=None
    )
    return model


def _infeasible(make: Callable, batches) -> Infeasible:
    with pytest.raises(Exception) as caught:
        _steps(_compiled(make(), 1000), batches)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Infeasible):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    assert error is not None, caught.value
    return error


def _assert_near(ours, eager, tolerance) -> None:
    for mine, theirs in zip(ours[0], eager[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == eager[1].keys()
    for name, gradient in eager[1].items():
        distance = (ours[1][name].double() - gradient.double()).norm()
        assert distance <= tolerance * gradient.double().norm() + 1e-7, name


def _plan():
    return [graph.memory for graph in rewriter.report().graphs if graph.memory][-1]


def _staged() -> int:
    return sum(count for _, way, count in _plan().ways if "tiles" in way or "whole" in way)


def _checkpointed():
    model = build("llama", layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _tied():
    model = build("llama", layers=2)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


MODELS = {
    "full fine-tuning": lambda: build("llama", layers=2),
    "adapters on a fused projection": lambda: build("phi3", layers=2, lora=True),
    "gradient checkpointing": _checkpointed,
    "tied weights": _tied,
}


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_under_the_least_budget_that_would_do(name):
    make, batches = MODELS[name], _batches()
    least = _infeasible(make, batches).least_device
    ours = _steps(_compiled(make(), least), batches)
    _assert_near(ours, _steps(make(), batches), 1e-5)
    assert _staged() == 2
    assert _plan().peak <= _plan().device_budget <= least


def test_a_budget_between_mixes_ways_and_a_large_one_keeps_everything():
    batches = _batches()
    make = MODELS["full fine-tuning"]
    eager = _steps(make(), batches)
    peaks = []
    for budget in (int(_infeasible(make, batches).least_device * 1.1), "1GB"):
        torch._dynamo.reset()
        _assert_near(_steps(_compiled(make(), budget), batches), eager, 1e-5)
        peaks.append((_plan().peak, _plan().seconds, _staged()))
    (small, slow, staged), (large, fast, none) = peaks
    assert small < large and slow >= fast and staged > none == 0


def test_lengths_that_vary_are_planned_as_they_come():
    batches = _batches((24, 17, 9))
    make = MODELS["adapters on a fused projection"]
    budget = int(_infeasible(make, batches).least_device * 1.5)
    _assert_near(_steps(_compiled(make(), budget), batches), _steps(make(), batches), 1e-5)


def test_four_bit_weights_under_autocast():
    def make():
        return build("llama", layers=2, lora=True, nf4=True, dtype=torch.bfloat16)

    def around():
        return torch.autocast("cpu", torch.bfloat16)

    batches = _batches()
    budget = int(_infeasible(make, batches).least_device * 1.1)
    ours = _steps(_compiled(make(), budget), batches, around)
    assert _staged() > 0
    torch._dynamo.reset()
    unplanned = make()
    unplanned.compile(backend="rewriter", options={"lowering": "eager"})
    _assert_near(ours, _steps(unplanned, batches, around), 3e-2)


def test_a_budget_that_is_too_small_says_what_would_do_and_leaves_the_model_as_it_was():
    batches, model = _batches(), build("llama", layers=2)
    error = _infeasible(lambda: model, batches)
    assert "are needed, of which" in str(error) and f"memory_budget={error.least_device} is" in str(error)
    assert all(p.grad is None for p in model.parameters())
    torch._dynamo.reset()
    ours = _steps(_compiled(model, error.least_device), batches)
    _assert_near(ours, _steps(build("llama", layers=2), batches), 1e-5)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot hold this step"):
        _steps(_compiled(build("llama", layers=2), error.least_device - 40_000), batches)


def test_a_failure_of_planning_is_noted_and_everything_is_kept(monkeypatch):
    def fail(*_):
        raise RuntimeError("no plan today")

    monkeypatch.setattr("rewriter.memory.under_budget.planned", fail)
    batches, make = _batches(), MODELS["full fine-tuning"]
    _assert_near(_steps(_compiled(make(), 10_000), batches), _steps(make(), batches), 1e-5)
    (graph,) = rewriter.report().graphs
    assert graph.memory is None and any("planning failed: no plan today" in note for note in graph.notes)
