"""The line on a terminal that says what a compilation is at."""

import re

import pytest

from rewriter.progress import ProgressLine
from tests.memory.test_lengths import trained


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """All that lines say."""
    found: list[str] = []
    monkeypatch.setattr(ProgressLine, "now", lambda line, text: found.append(text))
    return found


@pytest.mark.parametrize("budget", ["280KB", "1GB"])
def test_what_is_compiled_is_counted_with_a_plan_and_without(said, budget):
    trained([20], max_tokens=80, memory_budget=budget)
    steps = [text for text in said if text.startswith("compiling")]
    assert any("the stages of" in step for step in steps) == (budget == "280KB")
    assert all(re.fullmatch(r"compiling .+, \d of \d", step) for step in steps)
    assert [step.rpartition(", ")[2] for step in steps] == [
        f"{number} of {len(steps)}" for number in range(1, len(steps) + 1)
    ]
