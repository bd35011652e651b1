"""What is added to a pool before a capture, and which tensors of it may be borrowed."""

import pytest
import torch

from rewriter.replay.pool import ROOMS, Needs, Reading, Segments, apart, extent, smallest

MIB = 2**20


def segment(address, *blocks, kind="large"):
    """Blocks of (MiB, whether a tensor has it)."""
    return {
        "address": address * MIB,
        "total_size": sum(size for size, _ in blocks) * MIB,
        "segment_type": kind,
        "blocks": [
            {"size": size * MIB, "state": "active_allocated" if taken else "inactive"}
            for size, taken in blocks
        ],
    }


SEGMENTS = Segments(
    [
        segment(0, (300, False), (10, True), (90, False)),
        segment(1000, (120, False)),
        segment(2000, (2, False), kind="small"),
    ]
)


@pytest.mark.parametrize(
    ("size", "lacking"), [(520, []), (620, [120, 300, 100]), (640, [120, 300, 120]), (1000, [480])]
)
def test_a_pool_gets_one_block_of_what_it_lacks(size, lacking):
    assert SEGMENTS.lacking(size * MIB) == [size * MIB for size in lacking]


def test_an_empty_pool_lacks_all():
    assert Segments(()).lacking(5) == [5]
    assert Segments(()).lacking(0) == []


def test_of_another_allocator_nothing_is_made_beforehand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    allocated = iter((7, 107))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    device = torch.device("cuda", 0)
    before, after = Reading.now(device), Reading.now(device)
    needs = after.needs_since(before)
    assert needs.kept == 100
    assert Segments.of((0, 1), device).lacking(needs.size(ROOMS[0])) == []


def test_what_another_device_has_is_no_need_of_a_forward(monkeypatch):
    free = [{"size": 9 * MIB, "state": "inactive"}]
    found = [{"device": index, "address": index, "blocks": free} for index in (0, 1)]
    given = {
        "get_allocator_backend": lambda: "native",
        "memory_allocated": lambda device: 7,
        "memory_stats": lambda device: {"allocated_bytes.large_pool.current": 5},
        "memory_snapshot": lambda **_: found,
    }
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert Reading.now(torch.device("cuda", 1)) == Reading(7, 5, {1: 9 * MIB})


def test_what_a_forward_needs_is_what_it_keeps_and_room_for_its_largest_transient():
    before = Reading(allocated=7, large=5, free={0: 900, 50: 400})
    after = Reading(allocated=107, large=85, free={0: 800, 50: 1000, 60: 20, 70: 10})
    needs = after.needs_since(before)
    assert (needs.kept, needs.size(1.1)) == (100, 80 + 22)
    assert before.needs_since(before).size(1.1) == 0


@pytest.mark.parametrize(
    ("beside", "tried", "best"),
    [
        ([0], 1, 0),
        ([100], 1, 0),
        ([200, 100], 2, 1),
        ([200, 220, 100], 3, 2),
        ([200] * len(ROOMS), len(ROOMS), 0),
        ([300, 400, 200, *[300] * (len(ROOMS) - 3)], len(ROOMS), 2),
    ],
)
def test_a_block_is_enlarged_while_more_than_one_is_made_beside_it(beside, tried, best):
    needs, seen = Needs(kept=0, large=1000 * MIB, transient=100 * MIB), []

    def pool_of(size):
        seen.append(size)
        return size + beside[len(seen) - 1] * MIB

    assert smallest(needs, pool_of) == needs.size(ROOMS[best])
    assert len(seen) == tried


def test_sizes_that_are_one_are_tried_once():
    needs, seen = Needs(kept=0, large=1000 * MIB, transient=0), []

    def pool_of(size):
        seen.append(size)
        return size + 200 * MIB

    assert smallest(needs, pool_of) == 1000 * MIB
    assert len(seen) == 1


def test_a_device_without_memory_for_a_larger_block_keeps_the_smaller_one():
    needs, seen = Needs(kept=0, large=1000 * MIB, transient=100 * MIB), []

    def pool_of(size):
        seen.append(size)
        if len(seen) == full:
            raise torch.OutOfMemoryError("full")
        return size + 200 * MIB

    full = 2
    assert smallest(needs, pool_of) == needs.size(ROOMS[0])
    full = 3
    with pytest.raises(torch.OutOfMemoryError):
        smallest(needs, pool_of)


def test_of_tensors_that_share_memory_one_may_be_borrowed():
    tensor, other = torch.zeros(10), torch.zeros(3)
    assert apart({0: tensor, 1: tensor, 2: other, 3: tensor[5:]}) == {0, 2}
    assert apart({0: tensor[:5], 1: tensor[5:]}) == {0, 1}


def test_an_extent_ends_behind_the_last_element():
    matrix = torch.zeros(3, 4)
    assert extent(matrix) == extent(matrix.t()) == 48
    assert extent(matrix[1:, ::2]) == (4 + 3) * 4
    assert extent(matrix[:1].expand(5, 4)) == 16
    assert extent(torch.zeros((), dtype=torch.bfloat16)) == 2


def test_a_tensor_lies_in_a_pool_if_all_of_it_does():
    tensor = torch.zeros(4)
    around = {"address": tensor.data_ptr() - 8, "total_size": 24}
    assert Segments([around]).hold(tensor)
    assert not Segments([{**around, "total_size": 23}]).hold(tensor)
    assert not Segments(()).hold(tensor)
