"""What the planner chooses from: whole numbers, without what another choice makes needless."""

from rewriter.memory.options import NOTHING, Overlap, options_of, unit_of
from rewriter.memory.plan import Choice, Part


def parts(*choices: Choice, count: int = 3) -> list[Part]:
    return [Part(str(i), "kind", choices) for i in range(count)]


def test_copies_that_hide_are_none_and_those_of_the_last_part_never_hide():
    slow = Choice("host", 0, 8, 8, 8, 2.0, 4.0, 1.5, 4.0)
    first, second, last = options_of(parts(slow), 0.5)
    assert first.overlaps == second.overlaps == (NOTHING,)
    assert last.overlaps == (Overlap(3, 8),)
    assert (first.flight.tolist(), last.flight.tolist()) == ([8], [0])


def test_of_copies_that_do_not_hide_the_time_is_kept():
    first, *_ = options_of(parts(Choice("host", 0, 8, 8, 8, 2.0, 4.0, 3.0, 4.0)), 1.0)
    assert first.overlaps == (Overlap(3, 0),)


def test_a_choice_that_another_beats_whatever_the_neighbours_do_is_left_out():
    keep = Choice("keep", 4, 0, 8, 8, 2.0, 4.0)
    slower = Choice("slower", 4, 0, 8, 8, 2.0, 5.0)
    # Its forward is longer, its backward shorter by more.
    uneven = Choice("uneven", 4, 0, 8, 8, 2.5, 3.0)
    for options in options_of(parts(keep, slower, uneven), 0.5):
        assert options.index.tolist() == [2]


def test_a_choice_that_is_faster_behind_a_long_copy_alone_stays():
    host = Choice("host", 0, 8, 8, 8, 2.0, 4.0, 6.0, 0.0)
    # After that copy both forwards end when it does, and the shorter backward counts.
    long_forward = Choice("long forward", 4, 0, 4, 4, 6.0, 4.0)
    short_forward = Choice("short forward", 4, 0, 4, 4, 2.0, 5.0)
    first, second, _ = options_of(parts(host, long_forward, short_forward), 0.5)
    assert first.index.tolist() == [0, 2]
    assert second.index.tolist() == [0, 1, 2]


def test_units_are_powers_of_two_and_without_time_there_is_none():
    kind = parts(Choice("keep", 4, 0, 8, 8, 2.0, 4.0))
    assert 18 / 1e10 <= unit_of(kind) < 2 * 18 / 1e10
    assert options_of(kind, float("inf"))[0].forward.tolist() == [0]
