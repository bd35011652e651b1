"""Steps of tiny models under a memory budget, and the least budget that would do."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

import rewriter
from rewriter.memory.plan import Infeasible
from rewriter.memory.stage_run import StageRun
from tests.families import batch

LENGTHS = (24, 24)


def short_tiles(monkeypatch):
    """For a fixture: tiles that are shorter than the tests' sequences."""
    # Those of a GPU are longer than these sequences.
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 8))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches_of(lengths=LENGTHS) -> list[dict]:
    return [batch(rows=2, length=length, seed=number) for number, length in enumerate(lengths)]


def steps(model, batches) -> tuple[list, dict]:
    """Losses, and the gradients that all batches together leave."""
    losses = []
    for given in batches:
        loss = model(**given).loss
        loss.backward()
        losses.append(loss.detach())
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compiled(model, budget, **options):
    """``model`` under ``budget``, bytes of which there may be few."""
    size = f"{budget}B" if isinstance(budget, int) else budget
    given = {"lowering": "eager", "memory_budget": size, **options}
    model.compile(backend="rewriter", options=given, dynamic=None)
    return model


def infeasible(make: Callable, batches) -> Infeasible:
    with pytest.raises(Exception) as caught:
        steps(compiled(make(), 1000), batches)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Infeasible):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    assert error is not None, caught.value
    return error


@contextmanager
def ending(error: type[BaseException], method: str, at: int) -> Iterator[None]:
    """The ``at``-th stage that runs ("run", or "run_backward") raises ``error``, and all after it."""
    run, calls = getattr(StageRun, method), itertools.count(1)

    def ends(*given):
        if next(calls) >= at:
            raise error("as the test wants it")
        return run(*given)

    with patch.object(StageRun, method, ends):
        yield


def assert_near(ours, eager, tolerance) -> None:
    for mine, theirs in zip(ours[0], eager[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == eager[1].keys()
    for name, gradient in eager[1].items():
        distance = (ours[1][name].double() - gradient.double()).norm()
        assert distance <= tolerance * gradient.double().norm() + 1e-7, name


def last_plan():
    return [graph.memory for graph in rewriter.report().graphs if graph.memory][-1]


def write_other_weights(model) -> None:
    """In the place of some, as who loads a checkpoint does."""
    weight = next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.base_layer" in n)
    with torch.no_grad():
        weight.copy_(weight.flip(0))


def staged() -> int:
    return sum(count for _, way, count in last_plan().ways if "tiles" in way or "whole" in way)
