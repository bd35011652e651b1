"""Host memory is locked beside what its caller does; CUDA's part is played here."""

import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rewriter.memory import pinned, planned
from rewriter.memory.arena import HostArena

MiB = 1 << 20


class Driver:
    """Registers memory when it is let; ``error`` is what it then says."""

    def __init__(self, error: int):
        self.error, self.let = error, threading.Event()
        self.locked: list[int] = []
        self.devices: list[int] = []

    def register(self, address: int, nbytes: int, flags: int) -> int:
        assert self.let.wait(20)
        self.locked += [] if self.error else [address]
        return self.error

    def on(self, device: int):
        self.devices.append(device)
        return nullcontext()

    def unlock(self, address: int, device: int, memory: object) -> None:
        self.devices.append(device)
        self.locked.remove(address)


@pytest.fixture
def driver(monkeypatch, request):
    found = Driver(getattr(request, "param", 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", found.on)
    monkeypatch.setattr(pinned, "register", found.register)
    monkeypatch.setattr(pinned, "_unlock", found.unlock)
    monkeypatch.setattr(pinned, "_forget_error", lambda: None)
    yield found
    found.let.set()


def test_reserving_does_not_wait_for_the_lock_and_the_first_block_does(driver):
    arena, blocks = HostArena(8 * MiB, pin=True), []
    arena.reserve(4 * MiB)
    assert arena.capacity == 4 * MiB and not driver.locked
    asking = threading.Thread(target=lambda: blocks.append(arena.allocate(MiB)))
    asking.start()
    asking.join(0.2)
    assert asking.is_alive() and not blocks
    driver.let.set()
    asking.join(20)
    assert blocks[0].bytes.data_ptr() == driver.locked[0] and arena.pinned
    arena.free(blocks[0])
    arena.release()
    assert not driver.locked


def test_memory_that_nobody_waited_for_is_unlocked_all_the_same(driver):
    slab = pinned.HostSlab(MiB, pin=True)
    gone = threading.Event()
    finalizing = pinned.weakref.finalize(slab, gone.set)
    del slab
    driver.let.set()
    assert gone.wait(20) and not driver.locked and not finalizing.alive


def test_memory_is_locked_and_unlocked_on_the_device_whose_copies_use_it(driver, monkeypatch):
    driver.let.set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planned, "Transfers", lambda arena, device: SimpleNamespace(arena=arena))
    arena = planned.transfers_of.__wrapped__("cuda:1", 8 * MiB).arena
    arena.reserve(MiB)
    arena.release()
    assert driver.devices == [1, 1]
    assert pinned.HostSlab(MiB, pin=True).pinned
    assert driver.devices[2] == 0, "the current one, where none is said"


@pytest.mark.parametrize("driver", [2], indirect=True)
def test_what_cannot_be_locked_is_told_once_by_who_waits_and_not_tried_again(driver):
    driver.let.set()
    arena = HostArena(8 * MiB, pin=True, growth=MiB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arena.reserve(MiB)
    with pytest.warns(UserWarning, match=r"could not be page-locked \(CUDA error 2\)"):
        block = arena.allocate(MiB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arena.allocate(MiB)
        assert not arena.pinned and not arena.pin
    block.bytes.fill_(1)


def test_a_failure_of_the_thread_is_the_callers(driver, monkeypatch):
    def failing(*_):
        raise RuntimeError("no device")

    monkeypatch.setattr(pinned, "register", failing)
    slab = pinned.HostSlab(MiB, pin=True)
    with pytest.raises(RuntimeError, match="no device"):
        _ = slab.bytes
    arena = HostArena(8 * MiB, pin=True)
    arena.reserve(MiB)
    for take in (lambda: arena.allocate(MiB), arena.release):
        with pytest.raises(RuntimeError, match="no device"):
            take()
        assert not any(slab.extents.taken for slab in arena._slabs)
    arena.release()
    assert arena.capacity == 0
