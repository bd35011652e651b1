"""Offload and reload on a device without streams: layouts, groups, sharing, and what follows an exception."""

import gc
import itertools
import sys
from types import FrameType

import pytest
import torch

from rewriter.memory.arena import HostArena, HostMemoryError
from rewriter.memory.layout import Layout
from rewriter.memory.spare import Spare
from rewriter.memory.transfer import Group, Ticket, Transfers
from tests.memory.late_copies import late_transfers, leave_all_streams

MiB = 1 << 20


def _transfers() -> Transfers:
    return late_transfers(HostArena(16 * MiB, pin=False, growth=MiB))


def _give_up_all(transfers: Transfers) -> None:
    transfers._leaving.hold_at_most(0)


LAYOUTS = {
    "dense": lambda: torch.randn(5, 7),
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "slice with gaps": lambda: torch.randn(8, 8)[1:, 2:5],
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.tensor(3.0),
    "bfloat16": lambda: torch.randn(9).bfloat16(),
    "float8": lambda: torch.randn(9).to(torch.float8_e4m3fn),
    "bool": lambda: torch.tensor([True, False, True]),
    "int64": lambda: torch.arange(11),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "inference": lambda: _made_in_inference(),
}


def _made_in_inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.randn(4)


def _contents(tensor: torch.Tensor) -> list[int]:
    return list(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_comes_back_with_its_values_and_strides(name):
    transfers, tensor = _transfers(), LAYOUTS[name]()
    expected, strides = tensor.clone(), tensor.stride()
    ticket = transfers.offload(tensor)
    del tensor
    back = transfers.reload(ticket)
    assert back.dtype == expected.dtype and back.stride() == strides
    assert _contents(back) == _contents(expected)
    assert transfers.arena.in_use == 0


def test_a_tensor_that_needs_a_gradient_comes_back_without_its_graph():
    transfers = _transfers()
    made = torch.randn(3, requires_grad=True) * 2
    assert not transfers.reload(transfers.offload(made)).requires_grad


def _forward(transfers: Transfers, groups: int = 4) -> tuple[list[list[Ticket]], list[list[torch.Tensor]]]:
    tickets, expected = [], []
    for i in range(groups):
        tensors = [torch.randn(100 + i, 10), torch.randn(33)]
        expected.append([tensor.clone() for tensor in tensors])
        with transfers.group():
            tickets.append([transfers.offload(tensor) for tensor in tensors])
    return tickets, expected


def _step(transfers: Transfers) -> None:
    tickets, expected = _forward(transfers)
    for i in reversed(range(len(tickets))):
        for ticket, tensor in zip(reversed(tickets[i]), reversed(expected[i]), strict=True):
            assert torch.equal(transfers.reload(ticket), tensor)
    assert transfers.arena.in_use == 0


def _windowed(
    transfers: Transfers, window: int, tile: bool, groups: int = 3
) -> list[tuple[Group, list[Ticket]]]:
    """Groups of four tensors of 400 bytes, each with the tickets in the order of the backward."""
    made = []
    for _ in range(groups):
        with transfers.group(window) as group:
            tickets = [transfers.offload(torch.randn(100), tile=tile) for _ in range(4)]
            group.will_need(tickets[::-1])
        made.append((group, tickets[::-1]))
    return made


def test_a_window_bounds_what_is_held_on_its_way_out_and_what_is_back_early():
    transfers = _transfers()
    made = _windowed(transfers, 1000, tile=True)
    assert transfers._leaving.held == 800
    _give_up_all(transfers)
    transfers.begin_backward(made[-1][0])
    assert transfers.stats.bytes_in == 800
    for number, ticket in enumerate(t for _, own in reversed(made) for t in own):
        transfers.reload(ticket)
        assert transfers.stats.bytes_in == min(400 * (number + 3), 400 * 12)
    assert transfers.arena.in_use == 0


def test_what_leaves_whole_has_its_place_beside_the_window_until_its_group_is_complete():
    transfers = _transfers()
    with transfers.group(1000):
        tickets = []
        for count in range(1, 5):
            tickets.append(transfers.offload(torch.randn(100)))
            assert transfers._leaving.held == 400 * count
    assert transfers._leaving.held == 800


def test_a_backward_begins_with_what_its_layer_asks_for_and_the_one_below_it():
    transfers = _transfers()
    (_, first), (group, second) = _windowed(transfers, 800, tile=False, groups=2)
    _give_up_all(transfers)
    # Those of its own have their place, since they exceed the window.
    transfers.begin_backward(group)
    assert transfers.stats.bytes_in == 1600 + 800
    for ticket in second + first:
        transfers.reload(ticket)
    assert transfers.stats.bytes_in == 3200


def test_a_layer_that_sent_nothing_has_those_below_it_begin():
    transfers = _transfers()
    ((_, tickets),) = _windowed(transfers, 1000, tile=True, groups=1)
    with transfers.group(1000) as nothing:
        pass
    _give_up_all(transfers)
    transfers.begin_backward(nothing)
    assert transfers.stats.bytes_in == 800
    for ticket in tickets:
        transfers.reload(ticket)


def test_what_is_on_its_way_out_when_a_backward_begins_stays_for_it_or_is_given_up():
    transfers = _transfers()
    transfers.expect([Spare(back=1000), Spare(back=1000)])
    made = _windowed(transfers, 0, tile=True, groups=2)
    assert transfers._leaving.held == 3200
    transfers.begin_backward(made[-1][0])
    assert transfers._leaving.held == 0 and transfers.stats.bytes_spared == 800
    for ticket in [t for _, own in reversed(made) for t in own]:
        transfers.reload(ticket)


def _most_held(transfers: Transfers, monkeypatch) -> list[int]:
    """The most bytes that were on their way out or back early at once, whenever memory was taken for more."""
    most, empty = [0], Layout.empty

    def noted(layout: Layout, device: torch.device) -> torch.Tensor:
        back = [
            copy.layout.nbytes
            for group in transfers._groups
            for copy in group.copies
            if copy.device is not None
        ]
        most[0] = max(most[0], transfers._leaving.held + sum(back) + layout.nbytes)
        return empty(layout, device)

    monkeypatch.setattr(Layout, "empty", noted)
    return most


def test_what_comes_back_takes_no_memory_before_what_is_on_its_way_out_has_given_up_its_own(monkeypatch):
    transfers = _transfers()
    transfers.expect([Spare(left=2400, back=1200)])
    with transfers.group(400) as group:
        tickets = [transfers.offload(torch.randn(100), tile=True) for _ in range(10)]
    most = _most_held(transfers, monkeypatch)
    transfers.begin_backward(group)
    assert most == [1200] and transfers.stats.bytes_in == 1200
    for ticket in tickets:
        transfers.reload(ticket)


def test_what_is_on_its_way_out_gives_way_to_what_a_reload_starts(monkeypatch):
    transfers, made = _transfers(), []
    above = Spare(left=1100, back=1000, below=1000)
    transfers.expect([Spare(back=1000, below=1000, above=above), above])
    for sizes in ([200, 100, 100], [75]):
        with transfers.group(0) as group:
            made.append((group, [transfers.offload(torch.randn(size), tile=True) for size in sizes]))
    (_, below), (group, (ticket,)) = made
    # The first of those below has no room beside this one.
    transfers.begin_backward(group)
    assert transfers.stats.bytes_in == 0 and transfers._leaving.held == 400
    most = _most_held(transfers, monkeypatch)
    transfers.reload(ticket)
    assert transfers.stats.bytes_in == 800 and most[0] - ticket.nbytes <= 1000
    for ticket in below:
        transfers.reload(ticket)


def test_a_backward_starts_nothing_of_a_forward_before_whose_own_may_never_come():
    transfers, made = _transfers(), []
    for _ in range(2):
        transfers.expect([Spare(1600, 0, 3200, 3200)])
        made += _windowed(transfers, 1600, tile=True, groups=1)
    (_, before), (group, tickets) = made
    transfers.begin_backward(group)
    for ticket in tickets:
        transfers.reload(ticket)
    assert transfers.stats.bytes_in == 1600
    transfers.begin_backward(made[0][0])
    assert transfers.stats.bytes_in == 3200
    for ticket in before:
        transfers.reload(ticket)


def test_where_memory_runs_out_ahead_of_need_copies_back_begin_at_their_use(monkeypatch):
    transfers, room, empty = _transfers(), [0], Layout.empty

    def one_at_a_time(layout: Layout, device: torch.device) -> torch.Tensor:
        room[0] -= 1
        if room[0] < 0:
            raise torch.OutOfMemoryError("no memory, as the test wants it")
        return empty(layout, device)

    given = [torch.randn(100) for _ in range(6)]
    expected, tickets = [tensor.clone() for tensor in given], []
    for i in (0, 2, 4):
        with transfers.group(8000) as group:
            tickets += [transfers.offload(tensor) for tensor in given[i : i + 2]]
            group.will_need(tickets[:-3:-1])
    del given
    _give_up_all(transfers)
    monkeypatch.setattr(Layout, "empty", one_at_a_time)
    for ticket, tensor in zip(reversed(tickets), reversed(expected), strict=True):
        room[0] = 1
        assert torch.equal(transfers.reload(ticket), tensor)
    assert transfers.stats.prefetches_skipped > 1 and transfers.stats.bytes_in == 2400


def test_groups_can_be_made_by_hand_and_offloads_have_their_own_otherwise():
    transfers = _transfers()
    group: Group = transfers.group()
    first, alone = transfers.offload(torch.ones(4), group), transfers.offload(torch.ones(5))
    second = transfers.offload(torch.ones(6), group)
    group.close()
    assert [int(transfers.reload(t).sum()) for t in (second, first, alone)] == [6, 4, 5]
    with pytest.raises(ValueError, match="group is closed"):
        transfers.offload(torch.ones(3), group)


def test_a_tensor_offloaded_twice_is_copied_once():
    transfers, tensor = _transfers(), torch.randn(50)
    with transfers.group(1000):
        first = transfers.offload(tensor)
    with transfers.group(1000):
        second = transfers.offload(tensor)
        assert transfers.offload(tensor[1:]) is not first
    assert second is first and transfers.stats.bytes_out == 4 * 99
    assert torch.equal(transfers.reload(second), tensor)
    assert transfers.arena.in_use > 0
    assert torch.equal(transfers.reload(first), tensor)
    with pytest.raises(ValueError, match="reloaded already"):
        transfers.reload(first)


def test_another_tensor_at_the_same_address_is_not_taken_for_the_first():
    transfers, storage = _transfers(), torch.zeros(10)
    first = transfers.offload(storage)
    storage.fill_(7)
    second = transfers.offload(storage)
    assert transfers.reload(second).sum() == 70
    assert transfers.reload(first).sum() == 0


def test_given_up_memory_is_poisoned_only_where_nobody_else_holds_it():
    transfers, kept = _transfers(), torch.ones(10)
    view = (base := torch.ones(20))[5:15]
    transfers.offload(kept)
    transfers.offload(view)
    del view
    assert not kept.isnan().any() and not base.isnan().any()


def test_a_tensor_written_after_its_offload_is_not_handed_out():
    transfers, tensor = _transfers(), torch.zeros(3)
    with transfers.group(1000):
        ticket = transfers.offload(tensor)
        tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) was written in place"):
        transfers.reload(ticket)


def test_a_forward_without_a_backward_gives_its_memory_back():
    transfers = _transfers()
    for _ in range(20):
        _forward(transfers)
    gc.collect()
    _step(transfers)


def test_past_the_limit_nothing_has_changed():
    transfers = Transfers(HostArena(MiB, pin=False), "cpu")
    ticket = transfers.offload(torch.ones(1000))
    with pytest.raises(HostMemoryError, match="host_budget"):
        transfers.offload(torch.ones(MiB))
    assert transfers.reload(ticket).sum() == 1000
    assert transfers.arena.in_use == 0


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.eye(3).to_sparse(), "has no strides"),
        (torch.randn(3, dtype=torch.complex64).conj(), "lazily conjugated"),
        (torch.empty(3, device="meta"), "is on meta"),
    ],
)
def test_what_cannot_be_moved_is_refused(tensor, reason):
    with pytest.raises(ValueError, match=reason):
        _transfers().offload(tensor)


def test_reset_voids_tickets_and_leaves_others_blocks_alone():
    transfers = _transfers()
    other = transfers.arena.allocate(100)
    tickets, _ = _forward(transfers)
    transfers.reload(tickets[3][0])
    transfers.reset()
    assert transfers.arena.in_use == 512
    with pytest.raises(ValueError, match="dropped by reset"):
        transfers.reload(tickets[0][0])
    del tickets
    transfers.arena.free(other)
    _step(transfers)


def test_what_a_forward_sent_that_failed_is_given_back_though_its_tickets_are_held_and_no_others():
    transfers, read_by_both = _transfers(), torch.randn(50)
    tickets, numbers = [], []
    for _ in range(2):
        numbers.append(transfers.expect([Spare()]))
        with transfers.group(1000):
            tickets.append([transfers.offload(read_by_both), transfers.offload(torch.randn(70))])
    transfers.begin_backward(transfers._groups[-1])
    sent = transfers.arena.in_use
    transfers.forget(numbers[1])
    assert transfers.arena.in_use == sent // 2
    with pytest.raises(ValueError, match=r"dropped by reset\(\) or forget\(\)"):
        transfers.reload(tickets[1][0])
    assert torch.equal(transfers.reload(tickets[0][0]), read_by_both)
    transfers.reload(tickets[0][1])
    assert transfers.arena.in_use == 0
    _step(transfers)


def test_after_an_interrupt_at_any_line_a_reset_makes_the_next_step_work():
    transfers = _transfers()
    for line in range(10_000):
        if not _interrupted(transfers, line):
            break
        transfers.reset()
        assert transfers.arena.in_use == 0
        if line % 10 == 0:
            _step(transfers)
    assert 300 < line < 9_999
    _step(transfers)


@pytest.mark.parametrize("first", range(3))
def test_after_an_interrupt_at_any_line_the_next_steps_lack_no_memory(first):
    """Without a reset: who goes on after Ctrl-C knows of none."""
    for line in itertools.count(first, 9):
        transfers = _transfers()
        if not _interrupted(transfers, line):
            break
        _step(transfers)
        (slab,) = transfers.arena._slabs
        assert slab.extents.free == [(0, transfers.arena.capacity)], line
    assert line > 300


def _interrupted(transfers: Transfers, line: int) -> bool:
    """Whether a step reached its ``line``-th line within the package, where it was interrupted."""
    left = line

    def trace(frame: FrameType, event: str, _: object):
        nonlocal left
        # Python swallows what a __del__ raises, so that an interrupt there does not end the step.
        if "/rewriter/memory/" not in frame.f_code.co_filename or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        _step(transfers)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        leave_all_streams()
    return False
