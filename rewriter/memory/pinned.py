"""Page-locked host memory of an exact size, which the device's copy engines, and its kernels, read and write
without the CPU.

PyTorch's pinned allocator rounds sizes up to powers of two and never gives them back, so memory is mapped and
registered with CUDA here. Registering is slow where the kernel must first find and clear the pages, one by
one: huge pages are asked for, and PyTorch's threads touch the pages before CUDA locks them.

Refuses nothing: where memory cannot be locked, it is ordinary memory, and a warning says what that costs.
"""

import mmap
import warnings
import weakref
from contextlib import suppress
from typing import Any

import torch

# From the driver's header: locked for every CUDA context of the process, not the current one's alone; and an
# address that kernels can read.
_PORTABLE, _MAPPED = 1, 2
_PAGE = 4096


class HostSlab:
    """``nbytes`` of host memory as a tensor of bytes; ``pinned`` says whether it is page-locked."""

    def __init__(self, nbytes: int, *, pin: bool):
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a forked data loader must not copy locked pages
            # A kernel that knows neither works as well, slower.
            with suppress(AttributeError, OSError):
                memory.madvise(getattr(mmap, advice))
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self.pinned = pin and _lock(self.bytes)
        if self.pinned:
            # The mapping is an argument so that it outlives its registration.
            self._unlocking = weakref.finalize(self, _unlock, self.bytes.data_ptr(), memory)
            self._unlocking.atexit = False  # CUDA may be gone by then, and the process's end frees everything

    def close(self) -> None:
        """Unlock the memory; its pages go back with the last tensor over it."""
        if self.pinned:
            self.pinned = False
            self._unlocking()


def _lock(memory: torch.Tensor) -> bool:
    torch.cuda.init()
    memory[::_PAGE].zero_()
    error = register(memory.data_ptr(), memory.numel(), _PORTABLE | _MAPPED)
    if not error:
        return True
    _forget_error()
    warnings.warn(
        f"{memory.numel() / 2**30:.2f} GiB of host memory could not be page-locked (CUDA error {error}): it "
        "is used unlocked, so copies run at about half the rate and nothing runs beside them. Raise the "
        "limit of locked memory (ulimit -l, or the container's), or give a smaller host_budget.",
        stacklevel=2,
    )
    return False


def register(address: int, nbytes: int, flags: int) -> int:
    """CUDA's registration of host memory: an error's number, 0 for none."""
    return int(_runtime().cudaHostRegister(address, nbytes, flags))


def _unlock(address: int, _memory: mmap.mmap) -> None:
    torch.cuda.synchronize()  # a copy may be under way
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
