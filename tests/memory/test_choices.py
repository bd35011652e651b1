"""The ways to run a layer: each is there once, and what it costs follows from its steps."""

from dataclasses import dataclass

import pytest

from rewriter.memory.choices import staged_choices
from rewriter.memory.walk import _waiting
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
    return layer, staged_choices(layer, Linked(), True)


@pytest.fixture
def windowed(monkeypatch):
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 64, 8, 5))
    layer = decoder(trained=False, saving=True).graphs
    size = layer.sizes()
    window = sum(size[name] for name in layer.saved_in_tiles) // 2
    ways = [staged_choices(layer, Linked(), True, w) for w in (0, window)]
    return layer, window, *({w.choice.name: w for w in found} for found in ways)


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
        # A little longer than measured, so that what hides still does where kernels are faster.
        assert way.choice.offload_seconds == pytest.approx(1.07 * way.choice.hosted / 500)
        assert way.choice.reload_seconds == pytest.approx(1.07 * way.choice.hosted / 250)


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


def test_with_a_window_what_stages_save_in_tiles_is_never_there_as_a_whole(windowed):
    layer, window, without, ways = windowed
    streaming = [name for name, way in ways.items() if way.in_tiles]
    assert streaming and not any(way.in_tiles for way in without.values())
    for name in streaming:
        one, other = ways[name].choice, without[name].choice
        assert ways[name].in_tiles <= layer.saved_in_tiles.intersection(ways[name].schedule.offloaded)
        assert ways[name].tile is not None and one.hosted == other.hosted
        assert one.flight + window < other.flight + one.hosted
        assert one.forward_peak <= other.forward_peak and one.backward_peak <= other.backward_peak
    lower = [n for n in streaming if ways[n].choice.backward_peak + window < without[n].choice.backward_peak]
    assert lower


def test_what_exceeds_the_window_is_in_flight(windowed):
    _, window, without, ways = windowed
    for name, way in ways.items():
        size = sum(
            w for v, w in windowed[0].sizes().items() if v in way.schedule.offloaded and v not in way.in_tiles
        )
        assert way.choice.flight == max(0, size - window)
        assert way.window == window
        assert without[name].choice.flight == without[name].choice.hosted and without[name].window == 0


def test_tiles_wait_for_what_a_small_window_cannot_hold():
    # Two tiles of 10 s, each of which takes 25 s to come back.
    assert _waiting(2, 10.0, 25.0, 50.0) == 0
    assert _waiting(2, 10.0, 25.0, 40.0) == 0
    assert _waiting(2, 10.0, 25.0, 30.0) == 10
    assert _waiting(2, 10.0, 25.0, 20.0) == 5 + 15
    assert _waiting(3, 30.0, 25.0, 25.0) == 0
    assert _waiting(1, 10.0, 0.0, 0.0) == 0
