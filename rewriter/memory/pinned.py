"""Page-locked host memory of an exact size, which the device's copy engines, and its kernels, read and write
without the CPU.

PyTorch's pinned allocator rounds sizes up to powers of two and never gives them back, so memory is mapped and
registered with CUDA here. Registering is slow where the kernel must first find and clear the pages, one by
one: huge pages are asked for, and PyTorch's threads touch the pages before CUDA locks them. A hundred GiB
still take long, so that a thread of its own does it: who reads or writes the memory waits, and nobody else.

Refuses nothing: where memory cannot be locked, it is ordinary memory, and a warning says what that costs.
"""

import mmap
import threading
import warnings
import weakref
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch

from rewriter.size_text import size_text

# From the driver's header: locked for every CUDA context of the process, not the current one's alone; and an
# address that kernels can read.
_PORTABLE, _MAPPED = 1, 2
_PAGE = 4096
# Bytes after which a thread that touches pages looks whether the process is ending.
_PIECE = 4 << 30


class HostSlab:
    """``nbytes`` of host memory, which a thread locks while the caller goes on.

    ``device``: the one whose copies use it; without one, the current.
    """

    def __init__(self, nbytes: int, *, pin: bool, device: torch.device | None = None):
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked data loader must not copy locked pages
            # A kernel that knows neither works as well, slower.
            with suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._error: Future[int] | None = None
        self._pinned: bool | None = None if pin else False
        if pin:
            self._error = Future()
            # Locking makes the context of a thread's device, which begins as the first one; and unlocking
            # waits for one device's copies, which the caller's current device may know nothing of.
            index = None if device is None else device.index
            index = torch.cuda.current_device() if index is None else index
            threading.Thread(target=self._lock, args=(memory, index, self._error)).start()

    @property
    def bytes(self) -> torch.Tensor:
        """The memory, once it is locked: touching its pages writes to them."""
        _ = self.pinned
        return self._bytes

    @property
    def pinned(self) -> bool:
        """Whether it is page-locked, once that is known."""
        if self._pinned is None:
            assert self._error is not None
            error = self._error.result()
            self._pinned = not error
            if error:
                _warn(self._bytes.numel(), error)
        return self._pinned

    def close(self) -> None:
        """Unlock the memory; its pages go back with the last tensor over it."""
        if self.pinned:
            self._pinned = False
            self._unlocking()

    def _lock(self, memory: mmap.mmap, device: int, told: "Future[int]") -> None:
        try:
            with torch.cuda.device(device):
                error = _lock(self._bytes)
            if not error:
                # The mapping is an argument so that it outlives its registration.
                self._unlocking = weakref.finalize(self, _unlock, self._bytes.data_ptr(), device, memory)
                # CUDA may be gone by then, and the process's end frees everything.
                self._unlocking.atexit = False
            told.set_result(error)
        except BaseException as failed:
            told.set_exception(failed)


def _lock(memory: torch.Tensor) -> int:
    """An error's number, 0 for none."""
    for piece in memory.split(_PIECE):
        if not threading.main_thread().is_alive():
            return -1
        piece[::_PAGE].zero_()
    error = register(memory.data_ptr(), memory.numel(), _PORTABLE | _MAPPED)
    if error:
        _forget_error()
    return error


def _warn(nbytes: int, error: int) -> None:
    warnings.warn(
        f"{size_text(nbytes)} of host memory could not be page-locked (CUDA error {error}): it "
        "is used unlocked, so copies run at about half the rate and nothing runs beside them. Raise the "
        "limit of locked memory (ulimit -l, or the container's), or give a smaller host_budget.",
        stacklevel=3,
    )


def register(address: int, nbytes: int, flags: int) -> int:
    """CUDA's registration of host memory: an error's number, 0 for none."""
    return int(_runtime().cudaHostRegister(address, nbytes, flags))


def _unlock(address: int, device: int, _memory: mmap.mmap) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()


def _forget_error() -> None:
    # CUDA keeps a failed call's error until somebody asks for it, and PyTorch asks after each launch of a
    # kernel: without this one, the model's next kernel would be blamed.
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return
