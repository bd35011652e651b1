"""The end of a recording, also of one that failed: the cause is told, and PyTorch knows that it is over.

What a graph may not do, as to wait for the device, makes its recording invalid. Ending it then fails too,
which says no more than that, and by then PyTorch has told neither the allocator nor the generator of random
numbers. Until the process ends, memory that another stream used would not be given out again, the pool not
be given back, and (torch 2.11) every draw be an error. The allocator is told here, the generator by another
recording, of next to nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def ended(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> Iterator[None]:
    """End the recording of ``graph``, which has begun in ``pool``, after what is run within."""
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            _end(graph, pool, device)
        raise
    _end(graph, pool, device)


def _end(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    try:
        graph.capture_end()
    except RuntimeError:
        _tell_allocator(pool, torch.cuda.current_device() if device.index is None else device.index)
        _tell_generator(device)
        raise


def _tell_allocator(pool: Any, index: int) -> None:
    # It knows where something later failed than what makes a recording invalid.
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


def _tell_generator(device: torch.device) -> None:
    written, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    written.zero_()
    graph.capture_end()
