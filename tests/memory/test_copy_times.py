"""When copies begin: how long a step waits for them, by a clock in the place of a device."""

from dataclasses import replace

import pytest

from rewriter.memory.crowding import spacious_bytes
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.spare import Spare, spare_of
from tests.memory.clocked_copies import RATE, Timed, waited

# Each copy of a layer takes 4 s, and each layer 10 s.
WHOLE = Timed(10.0, 10.0, 4 * RATE)
TILES = Timed(10.0, 10.0, RATE, tiles=4)
NOTHING = Timed(10.0, 10.0)
WINDOW = 2 * RATE


def _spares(layers: list[Timed], window: int, free: list[int]) -> list[Spare]:
    """Of a plan in which each layer, in both directions, leaves so many bytes free, and the head none."""
    sizes = [layer.nbytes * layer.sends for layer in layers]
    flights = [0 if layer.tiles else max(n - window, 0) for layer, n in zip(layers, sizes, strict=True)]
    filled = max(free) + max(flights)
    choices = []
    for size, flight, before, room in zip([*sizes, 0], [*flights, 0], [0, *flights], [*free, 0], strict=True):
        peak = filled - before - room
        choices.append(Choice(f"part {len(choices)}", 0, size, peak, peak, 1.0, 1.0, flight=flight))
    parts = tuple(Part(c.name, c.name, (c,)) for c in choices)
    least = filled + window
    budget = next(b for b in range(least, 2 * least) if spacious_bytes(b, 0) >= least)
    problem = Problem(parts, 0, budget, 1 << 20, window=window)
    return spare_of(MemoryPlan(problem, tuple(choices)), [True] * len(layers) + [False], window)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_a_copy_hides_behind_the_layer_above_that_sends_nothing(window):
    layers = [WHOLE, NOTHING, NOTHING]
    assert waited(layers, window, _spares(layers, window, [0, 0, 0]), head=10.0) == 0


@pytest.mark.parametrize("layer, window", [(WHOLE, 0), (TILES, WINDOW)])
def test_copies_of_all_layers_hide_where_they_take_less_than_a_layer(layer, window):
    layers = [layer, layer, layer, NOTHING]
    assert waited(layers, window, _spares(layers, window, [0, 0, 0, 0]), head=10.0) == 0


def test_copies_that_take_longer_than_a_layer_hide_where_there_is_room_to_begin_early():
    slow = Timed(10.0, 10.0, 15 * RATE)
    layers = [slow, NOTHING, NOTHING, NOTHING]
    full, spacious = ([0, 0, 0, 0], [0, 0, 15 * RATE, 0])
    # 5 s in each direction.
    assert waited(layers, 0, _spares(layers, 0, full), head=20.0) == pytest.approx(10.0)
    assert waited(layers, 0, _spares(layers, 0, spacious), head=20.0) == 0


def test_weights_of_the_layer_below_come_before_what_lower_ones_ask_for_and_after_what_this_one_does():
    # They take 2 s each. What is sent has left when the last layer's forward ends.
    far, near = Timed(10.0, 10.0, 10 * RATE, weights=2 * RATE), Timed(10.0, 10.0, weights=2 * RATE)
    own, last = replace(near, nbytes=4 * RATE), replace(near, forward=100.0)
    # From the backward of ``own`` on there is room for all.
    top = Spare(left=0.0, back=0.0, below=0.0)
    room = [Spare(back=14 * RATE, below=14 * RATE, above=top)]
    room += [Spare(back=14 * RATE, below=14 * RATE, above=room[0])]
    room += [Spare(back=14 * RATE, below=14 * RATE, above=room[1])]
    spares = [*reversed(room), top]
    # For the first weights, and what ``own`` sent. The weights that it starts arrive with 8 s to spare.
    assert waited([far, near, own, last], 0, spares) == pytest.approx(2.0 + 4.0)
