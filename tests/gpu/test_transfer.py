"""Offload and reload on a GPU: no missing wait, bounded memory, no growth, a host that never waits.

Freed memory is poisoned, and each test can hold back one of the three streams, so that a copy which did not
wait for the others moves or leaves NaN.
"""

import gc
import warnings

import pytest
import torch

from rewriter.memory import pinned
from rewriter.memory.arena import HostArena
from rewriter.memory.transfer import Group, Ticket, Transfers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MiB = 1 << 20
# Cycles of the GPU's clock: some 10 ms, longer than any copy here.
HOLD = 20_000_000


def _transfers(**options) -> Transfers:
    return Transfers(HostArena(2048 * MiB, growth=256 * MiB), "cuda", **options)


def _hold_back(transfers: Transfers, stream: str) -> None:
    if stream == "none":
        return
    streams = transfers._copier.streams
    held = streams.compute() if stream == "compute" else getattr(streams, stream)
    with torch.cuda.stream(held):
        torch.cuda._sleep(HOLD)


def _layer(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(hidden @ weight, (weight.shape[1],))


def _step(
    transfers: Transfers, groups: int, held_back: str = "none", window: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what came back, what went out) of tensors between products which reuse all memory that is given up."""
    weight = torch.randn(2048, 2048, device="cuda") / 45
    hidden = torch.randn(4096, 2048, device="cuda")
    tickets: list[tuple[Group, Ticket, Ticket]] = []
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(groups):
        _hold_back(transfers, held_back)
        hidden = _layer(hidden, weight)
        wide = (hidden[:, : 512 + i] * 2).t()
        with transfers.group(window) as group:
            tickets.append((group, transfers.offload(hidden), transfers.offload(wide, tile=True)))
        sent.append((hidden.clone(), wide.clone()))
        del wide
    del hidden
    back = []
    grad = torch.randn(4096, 2048, device="cuda")
    for i in reversed(range(groups)):
        _hold_back(transfers, held_back)
        group, *own = tickets[i]
        transfers.begin_own(group)
        transfers.begin_backward(group)
        for ticket, out in zip(own, sent[i], strict=True):
            again = transfers.reload(ticket)
            back.append((again.clone(), out))
            assert again.stride() == out.stride()
            again.fill_(float("nan"))
            del again
        grad = _layer(grad, weight)
    return back


@pytest.mark.parametrize("window", [0, 8 * MiB, 64 * MiB])
@pytest.mark.parametrize("held_back", ["none", "compute", "out", "back"])
def test_contents_survive_whichever_stream_is_late(held_back, window):
    transfers = _transfers(poison=True)
    for _ in range(3):
        back = _step(transfers, groups=12, held_back=held_back, window=window)
        assert all(torch.equal(again, out) for again, out in back)
    assert transfers.arena.in_use == 0 and transfers.stats.prefetches_skipped == 0


def test_the_poison_shows_a_wait_that_is_missing(monkeypatch):
    transfers = _transfers(poison=True)
    monkeypatch.setattr(transfers._copier, "streams", _Hasty(transfers._copier.streams))
    back = _step(transfers, groups=4, held_back="out")
    assert not all(torch.equal(again, out) for again, out in back)
    torch.cuda.synchronize()


class _Hasty:
    """Streams of which the computing one waits for nobody."""

    def __init__(self, streams):
        self._streams = streams

    def __getattr__(self, name: str):
        return getattr(self._streams, name)

    def compute(self):
        return _NeverWaits(self._streams.compute())


class _NeverWaits(torch.cuda.Stream):
    def __new__(cls, stream: torch.cuda.Stream):
        return super().__new__(
            cls, stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )

    def __init__(self, stream: torch.cuda.Stream):
        pass

    def wait_event(self, event) -> None: ...


def test_the_host_never_waits():
    transfers = _transfers()
    transfers.arena.reserve(512 * MiB)
    _step(transfers, groups=8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100 * HOLD)
        _step(transfers, groups=8)
        ahead = torch.cuda.current_stream().record_event()
        assert not ahead.query(), "the host reached the end of the step when the GPU did"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_device_memory_is_bounded_however_far_the_host_runs_ahead(groups):
    transfers, size = _transfers(), 64 * MiB
    transfers.arena.reserve(20 * size)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(20 * HOLD)
    tickets = []
    for i in range(20):
        tensor = torch.full((size,), i, dtype=torch.uint8, device="cuda")
        with transfers.group(groups * size):
            tickets.append(transfers.offload(tensor))
        del tensor
    assert torch.cuda.max_memory_allocated() - before <= (groups + 1) * size + MiB
    torch.cuda.reset_peak_memory_stats()
    sums = []
    while tickets:
        sums.append(transfers.reload(tickets.pop())[::4096].sum())
    # The group that is used, and as many within the window: ahead of it, or never given up.
    assert torch.cuda.max_memory_allocated() - before <= (groups + 1) * size + MiB
    assert [int(s) for s in sums] == [i * size // 4096 for i in reversed(range(20))]


def test_two_hundred_steps_grow_nothing():
    transfers, sizes = _transfers(poison=True), torch.randint(1, 4 * MiB, (200, 6)).tolist()
    transfers.arena.reserve(256 * MiB)
    exact, about = [], []
    for step, lengths in enumerate(sizes):
        tickets, expected = [], []
        for i, length in enumerate(lengths):
            tensor = torch.full((length,), i, dtype=torch.uint8, device="cuda")
            with transfers.group():
                tickets.append(transfers.offload(tensor))
            expected.append(i * length)
        del tensor
        while tickets:
            assert transfers.reload(tickets.pop()).sum() == expected.pop()
        if step in (20, 199):
            torch.cuda.synchronize()
            reserved = torch.cuda.memory_reserved()
            exact.append((torch.cuda.memory_allocated(), transfers.arena.capacity, transfers.arena.in_use))
            about.append((reserved // (64 * MiB), _resident()))
    assert exact[0] == exact[1]
    assert about[1][0] <= about[0][0] + 1
    assert about[1][1] <= about[0][1] + 16 * MiB


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_offloads_and_reloads_work_in_autograd_and_on_another_stream():
    transfers = _transfers(poison=True)
    weight = torch.randn(512, 512, device="cuda")
    x = torch.randn(1024, 512, device="cuda", requires_grad=True)
    (expected,) = torch.autograd.grad((x @ weight).sin().sin().sum(), x)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        y = x @ weight
        for _ in range(2):
            y = _Sine.apply(y, transfers)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.cuda.synchronize()
    assert torch.equal(gradient, expected)


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, transfers):
        ctx.transfers, ctx.ticket = transfers, transfers.offload(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.transfers.reload(ctx.ticket).cos(), None


def test_after_running_out_of_memory_a_reset_makes_the_next_step_work():
    transfers = _transfers(poison=True)
    with pytest.raises(torch.OutOfMemoryError):
        _step_that_runs_out(transfers)
    transfers.reset()
    assert transfers.arena.in_use == 0
    assert all(torch.equal(again, out) for again, out in _step(transfers, groups=4))


def _step_that_runs_out(transfers: Transfers) -> None:
    for _ in range(4):
        with transfers.group():
            transfers.offload(torch.randn(1 << 20, device="cuda"))
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


def test_a_prefetch_that_finds_no_room_begins_at_its_use():
    transfers, size, tickets = _transfers(), 256 * MiB, []
    for i in range(2):
        with transfers.group(size):
            tickets.append(transfers.offload(torch.full((size,), i, dtype=torch.uint8, device="cuda")))
    transfers._leaving.hold_at_most(0)
    ballast = _take_free_blocks(size)
    free, total = torch.cuda.mem_get_info()
    assert free > 2 * size, "only the cap refuses"
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size + size // 2) / total)
        assert transfers.reload(tickets.pop())[:9].sum() == 9
        assert transfers.stats.prefetches_skipped == 1
        assert transfers.reload(tickets.pop())[:9].sum() == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del ballast


def _take_free_blocks(size: int) -> list[torch.Tensor]:
    """All blocks of ``size`` that the allocator has free, taken: the next one is new memory."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken: list[torch.Tensor] = []
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        while True:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return taken
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_cannot_be_locked_is_used_unlocked_with_one_warning(monkeypatch):
    register = pinned.register

    def twice(address: int, nbytes: int, flags: int) -> int:
        assert not register(address, nbytes, flags)
        error = register(address, nbytes, flags)  # CUDA refuses, and keeps the error for the next launch
        torch.cuda.cudart().cudaHostUnregister(address)
        return error

    monkeypatch.setattr(pinned, "register", twice)
    transfers = _transfers(poison=True)
    with pytest.warns(UserWarning, match="could not be page-locked .* half the rate"):
        transfers.arena.reserve(128 * MiB)
        assert not transfers.arena.pinned
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(again, out) for again, out in _step(transfers, groups=6))
    assert not transfers.arena.pinned


def test_the_arena_locks_exactly_what_it_says_and_gives_it_back():
    arena = HostArena(512 * MiB)
    arena.reserve(100 * MiB + 512)
    block = arena.allocate(100 * MiB)
    assert block.bytes.is_pinned() and arena.capacity == 100 * MiB + 512
    arena.free(block)
    arena.release()
    assert not block.bytes.is_pinned()
