"""The line on a terminal that says what a compilation is at."""

import io
import pty
import re
import sys
from contextlib import suppress

import pytest
import torch

import rewriter
from rewriter.memory.stage_run import StageRun
from rewriter.progress import ProgressLine
from tests.memory.test_lengths import trained
from tests.regions.chains import Chain


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


@pytest.mark.parametrize("watched", [True, False])
def test_a_plan_stays_on_a_terminal_and_is_there_before_anything_has_run(monkeypatch, watched):
    screen, ran = io.StringIO(), []
    monkeypatch.setattr(screen, "isatty", lambda: watched)
    monkeypatch.setattr(sys, "stderr", screen)
    run = StageRun.run
    monkeypatch.setattr(StageRun, "run", lambda *given: ran.append(screen.getvalue()) or run(*given))
    trained([20], max_tokens=80, memory_budget="280KB")
    monkeypatch.undo()
    before = [part for part in ran[0].split("\r\x1b[2K") if part.endswith("\n")]
    assert before == ([f"rewriter: {rewriter.report().memory}\n"] if watched else [])
    assert not watched or re.search(r"^rewriter: memory: .* forward and backward\n  beginning × 1", before[0])


def test_a_terminal_shows_one_line_that_is_gone_at_the_end_and_a_log_nothing(monkeypatch):
    watched, terminal = pty.openpty()
    chain = Chain((), ("attention", "residual"), 3, ("tuple",))
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="rewriter", options={"lowering": "eager"})
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        compiled(*chain.inputs())[0].backward()
        monkeypatch.undo()
    before, *lines = _all_of(watched).split("\r\x1b[2K")
    assert before == "" and lines[-1] == ""
    time = r"[\d.,]+ (s|ms|µs)"
    traced = rf"rewriter: traced \d+ operations in {time}"
    matched = traced + r" · \d+ rewrites"
    steps = [traced + " · matching", *(f"{matched} · {step}" for step in ("outlining", "planning"))]
    regions = [f"{name}, {number} of 3" for number, name in enumerate(("beginning", "layer_a", "end"), 1)]
    steps += [f"{matched} · compiling {region}" for region in regions]
    steps += [f"{matched} · compiling the backward of {region}" for region in reversed(regions)]
    shown = [line for line in lines if line]
    assert len(shown) == len(steps)
    assert all(re.fullmatch(f"{step} · {time}", line) for step, line in zip(steps, shown, strict=True)), shown

    log = io.StringIO()
    ProgressLine(log).now("matching")
    assert log.getvalue() == ""


def _all_of(watched: int) -> str:
    """What a terminal was given, once nobody writes to it."""
    parts = []
    # It ends by an error.
    with open(watched, "rb", buffering=0) as screen, suppress(OSError):
        while part := screen.read(1 << 16):
            parts.append(part)
    return b"".join(parts).decode()
