"""The report asks for segments that grow where a plan on a GPU offloads."""

import pytest
import torch

from rewriter.memory.expandable import in_fixed_segments
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem

GPU = torch.device("cuda", 0)


def _plan(hosted: int) -> MemoryPlan:
    choice = Choice("way", 0, hosted, 10, 10, 1.0, 1.0)
    return MemoryPlan(Problem((Part("layer", "layer", (choice,)),), 0, 100, 100), (choice,))


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_a_plan_that_offloads_asks_for_segments_that_grow():
    (note,) = in_fixed_segments(_plan(1), GPU)
    assert "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in note


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_nothing_is_said_where_they_do(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512, expandable_segments: True")
    assert in_fixed_segments(_plan(1), GPU) == ()
    monkeypatch.setenv(name, "expandable_segments:False")
    assert in_fixed_segments(_plan(1), GPU)


def test_nothing_is_said_of_a_plan_that_offloads_nothing_or_runs_on_a_cpu():
    assert in_fixed_segments(_plan(0), GPU) == () == in_fixed_segments(_plan(1), torch.device("cpu"))
