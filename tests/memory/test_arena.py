"""The host arena against a plain model: ranges never overlap, nothing is lost, and misuse is named."""

import random

import pytest
import torch

from rewriter.memory.arena import HostArena, HostMemoryError
from rewriter.memory.extents import ALIGNMENT, Extents, aligned

MiB = 1 << 20


def _small(limit: int = 64 * MiB, growth: int = MiB) -> HostArena:
    return HostArena(limit, pin=False, growth=growth)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_never_overlap_and_free_ones_are_what_is_left(seed):
    chance, capacity = random.Random(seed), 200 * ALIGNMENT
    extents, taken = Extents(capacity), {}
    for _ in range(400):
        if taken and chance.random() < 0.45:
            start = chance.choice(list(taken))
            del taken[start]
            extents.give_back(start)
        else:
            nbytes = chance.randrange(0, 20 * ALIGNMENT)
            start = extents.take(nbytes)
            free = _free_ranges(taken, capacity)
            fitting = [(end - begin, begin) for begin, end in free if end - begin >= aligned(nbytes)]
            assert start == (min(fitting)[1] if fitting else None)
            if start is not None:
                taken[start] = aligned(nbytes)
        assert extents.taken == taken
        assert extents.free == _free_ranges(taken, capacity)


def _free_ranges(taken: dict[int, int], capacity: int) -> list[tuple[int, int]]:
    used = [False] * (capacity // ALIGNMENT) + [True]
    for start, size in taken.items():
        for unit in range(start // ALIGNMENT, (start + size) // ALIGNMENT):
            assert not used[unit]
            used[unit] = True
    ranges, begin = [], None
    for unit, busy in enumerate(used):
        if not busy and begin is None:
            begin = unit
        if busy and begin is not None:
            ranges.append((begin * ALIGNMENT, unit * ALIGNMENT))
            begin = None
    return ranges


def test_freed_in_any_order_all_is_one_range_again():
    extents = Extents(100 * ALIGNMENT)
    starts = [extents.take(10 * ALIGNMENT) for _ in range(10)]
    assert extents.take(1) is None
    random.Random(0).shuffle(starts)
    for start in starts:
        extents.give_back(start)
    assert extents.free == [(0, 100 * ALIGNMENT)]


def test_a_hole_is_not_enough_for_more_than_it_holds():
    extents = Extents(4 * ALIGNMENT)
    first, _, third, _ = (extents.take(ALIGNMENT) for _ in range(4))
    extents.give_back(first)
    extents.give_back(third)
    assert extents.largest_free == ALIGNMENT
    assert extents.take(2 * ALIGNMENT) is None


def test_free_ranges_can_be_worked_out_again_from_those_in_use():
    extents = Extents(10 * ALIGNMENT)
    starts = [extents.take(ALIGNMENT) for _ in range(10)]
    for start in starts[::3]:
        extents.give_back(start)
    expected, extents.free = extents.free, []
    extents.rebuild()
    assert extents.free == expected


def test_sizes_are_not_rounded_to_powers_of_two():
    arena = _small()
    arena.reserve(3 * MiB + 1)
    assert arena.capacity == 3 * MiB + ALIGNMENT
    block = arena.allocate(2 * MiB + 7)
    assert block.bytes.numel() == 2 * MiB + 7
    assert arena.in_use == 2 * MiB + ALIGNMENT
    assert block.bytes.data_ptr() % ALIGNMENT == 0


def test_blocks_hold_what_is_written_to_them():
    arena, chance, blocks = _small(), random.Random(1), {}
    for value in range(200):
        blocks[value % 251] = block = arena.allocate(chance.randrange(0, 40_000))
        block.bytes.fill_(value % 251)
        if chance.random() < 0.5:
            arena.free(blocks.pop(chance.choice(list(blocks))))
        assert all(bool((block.bytes == value).all()) for value, block in blocks.items())
    for block in blocks.values():
        arena.free(block)
    assert arena.in_use == 0 < arena.peak


def test_what_is_reserved_is_one_piece_where_the_limit_has_no_room_for_rests():
    arena = _small(limit=8 * MiB)
    arena.reserve(2 * MiB)
    arena.reserve(4 * MiB)
    assert len(arena._slabs) == 2
    held = arena.allocate(MiB)
    arena.reserve(6 * MiB)
    assert len(arena._slabs) == 3
    arena.free(held)
    arena.reserve(7 * MiB)
    assert len(arena._slabs) == 1 and arena.capacity == 7 * MiB


def test_reserved_memory_is_not_reserved_twice_and_grows_only_past_it():
    arena = _small()
    arena.reserve(4 * MiB)
    arena.reserve(3 * MiB)
    assert arena.capacity == 4 * MiB
    blocks = [arena.allocate(MiB) for _ in range(4)]
    assert arena.capacity == 4 * MiB
    blocks.append(arena.allocate(3 * MiB))
    assert arena.capacity == 7 * MiB
    for block in blocks:
        arena.free(block)
    arena.release()
    assert arena.capacity == arena.in_use == 0


def test_growth_stops_at_the_limit():
    arena = _small(limit=3 * MiB, growth=2 * MiB)
    arena.allocate(MiB + 1)
    arena.allocate(MiB)
    assert arena.capacity == 3 * MiB


def test_past_the_limit_the_error_says_what_was_asked_what_is_used_and_the_way_out():
    arena = _small(limit=4 * MiB)
    arena.allocate(3 * MiB)
    with pytest.raises(
        HostMemoryError, match=r"allocate 2.00 MiB with 3.00 MiB in use .* budget of 4.00 MiB; give"
    ):
        arena.allocate(2 * MiB)
    with pytest.raises(HostMemoryError, match=r"reserve 5.00 MiB"):
        arena.reserve(5 * MiB)
    assert arena.in_use == 3 * MiB
    arena.allocate(MiB)


def test_slabs_that_hold_nothing_give_way_to_a_larger_one_at_the_limit():
    arena = _small(limit=4 * MiB)
    blocks = [arena.allocate(MiB) for _ in range(4)]
    for block in blocks:
        arena.free(block)
    arena.allocate(3 * MiB)
    assert arena.capacity <= 4 * MiB


def test_a_block_freed_twice_is_named():
    arena = _small()
    block = arena.allocate(1000)
    arena.free(block)
    with pytest.raises(ValueError, match="block of 1000 bytes at 0 is freed twice"):
        arena.free(block)
    arena.allocate(1000)
    with pytest.raises(ValueError, match="freed twice"):
        arena.free(block)
    assert arena.in_use == 1024


def test_negative_sizes_and_a_release_in_use_are_refused():
    arena = _small()
    with pytest.raises(ValueError, match="-1 bytes"):
        arena.allocate(-1)
    arena.allocate(0)
    with pytest.raises(ValueError, match="released with [0-9]+ bytes in use"):
        arena.release()


def test_blocks_of_one_owner_are_freed_together_and_others_stay():
    arena, mine = _small(), object()
    other = arena.allocate(MiB, owner=object())
    for _ in range(5):
        arena.allocate(MiB, owner=mine)
    arena.free_owned(mine)
    assert arena.in_use == MiB
    arena.free(other)
    arena.release()


def test_what_was_reserved_for_something_that_fails_is_given_back_and_the_rest_stays():
    arena = _small(limit=8 * MiB)
    arena.reserve(2 * MiB)
    with pytest.raises(RuntimeError, match="no kernel"), arena.reserved(5 * MiB):
        assert arena.capacity == 5 * MiB
        raise RuntimeError("no kernel")
    assert arena.capacity == 2 * MiB
    with pytest.raises(KeyboardInterrupt), arena.reserved(5 * MiB):
        blocks = [arena.allocate(2 * MiB) for _ in range(2)]
        raise KeyboardInterrupt
    assert arena.capacity == 5 * MiB and arena.in_use == 4 * MiB, "blocks in it are somebody's"
    for block in blocks:
        arena.free(block)
    with arena.reserved(6 * MiB):
        pass
    assert arena.capacity >= 6 * MiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs page-locked memory")
def test_blocks_are_page_locked():
    arena = HostArena(64 * MiB, growth=MiB)
    assert arena.allocate(5000).bytes.is_pinned() and arena.pinned
