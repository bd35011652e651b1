"""The ways to run a layer: each is there once, and what it costs follows from its steps."""

from dataclasses import dataclass

import pytest

from rewriter.memory.choices import staged_choices
from tests.memory.decoder import decoder
from tests.memory.test_costs import Machine


@dataclass(frozen=True)
class Linked(Machine):
    to_host: float = 500.0
    to_device: float = 250.0


@pytest.fixture
def choices(monkeypatch):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 64, 8, 5))
    layer = decoder(trained=False).graphs
    return layer, staged_choices(layer, layer.tokens, Linked(), True)


def test_no_two_ways_are_the_same(choices):
    _, ways = choices
    assert len({(way.schedule, way.tile) for way in ways}) == len(ways)
    assert len({way.choice.name for way in ways}) == len(ways)


def test_tiles_are_no_longer_than_the_sequence(choices):
    _, ways = choices
    assert {way.tile for way in ways} == {None, 8, 5}


def test_what_is_saved_and_hosted_is_what_the_schedule_says(choices):
    layer, ways = choices
    size = layer.sizes()
    for way in ways:
        assert way.choice.saved == sum(size[v] for v in way.schedule.kept)
        assert way.choice.hosted == sum(size[v] for v in way.schedule.offloaded)
        assert way.choice.offload_seconds == pytest.approx(way.choice.hosted / 500)
        assert way.choice.reload_seconds == pytest.approx(way.choice.hosted / 250)


def test_computing_again_takes_time_and_saves_memory(choices):
    _, ways = choices
    by_name = {way.choice.name: way.choice for way in ways}
    kept = next(
        c
        for name, c in by_name.items()
        if "whole" in name and "offload" not in name and "recompute" not in name
    )
    again = [
        c for name, c in by_name.items() if "whole" in name and "recompute" in name and "offload" not in name
    ]
    assert again and all(c.saved < kept.saved for c in again)
    assert all(c.backward_seconds >= kept.backward_seconds for c in again)
    assert all(c.forward_seconds == kept.forward_seconds for c in again)


def test_no_peak_is_below_what_is_kept(choices):
    layer, ways = choices
    for way in ways:
        assert way.choice.backward_peak >= way.choice.saved + layer.sizes()["result"]
        assert way.choice.forward_peak >= way.choice.saved
