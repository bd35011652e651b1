"""What a planned layer does reads as code: what runs, leaves the device and comes back, in order."""

from dataclasses import replace

import pytest

from rewriter.memory.choices import StagedChoice, staged_choices
from rewriter.memory.steps import steps_of
from tests.memory.decoder import decoder
from tests.memory.test_choices import Linked


@pytest.fixture
def ways(monkeypatch):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 5))
    layer = decoder(trained=False).graphs
    return staged_choices(layer, Linked(), True)


def test_each_value_that_leaves_comes_back_and_each_stage_is_there_in_both_directions(ways):
    for way in ways:
        forward, backward = steps_of(way).split("\n\n")
        for moved in ("offload(", "= reload("):
            assert (moved in forward + backward) == bool(way.schedule.offloaded), way.choice.name
        assert "reload" not in forward and "offload" not in backward
        for title in way.layer.titles:
            assert f"= {title}(" in forward and f"{title}.backward(" in backward
        assert ("# in tiles of 5 tokens" in forward) == (way.tile == 5)
        again = {s.stage for s in way.schedule.backward if s.kind == "run"}
        assert again == {i for i, title in enumerate(way.layer.titles) if f"= {title}(" in backward}


def test_what_leaves_in_tiles_says_so(ways):
    way = next(way for way in ways if way.schedule.offloaded)
    text = steps_of(replace(way, in_tiles=frozenset(way.schedule.offloaded[:1])))
    assert text.count("# tile by tile") == 2


def test_what_runs_as_without_a_plan_has_no_steps(ways):
    assert steps_of(StagedChoice(ways[0].choice)) == ""
