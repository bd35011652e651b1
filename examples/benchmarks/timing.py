"""Median times of a call on buffers that no cache holds.

A kernel is given another copy of its operands at each call; together the copies are larger than twice the
L2, so that each call reads memory, as it does in a training step. Between CUDA events, in one stream.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """What the bounds come from: measured in the same run.

    Attributes:
        bandwidth: bytes a second of a clone, read and written.
        rate: operations a second of a large bf16 product.
    """

    device: torch.device
    bandwidth: float
    rate: float


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def copies(
    make: Callable[[], Sequence[Tensor]], device: torch.device, least: int = 2
) -> list[Sequence[Tensor]]:
    """Sets of operands that together pass twice the L2."""
    first = make()
    size = sum(t.nbytes for t in first)
    count = max(least, -(-2 * l2_bytes(device) // max(1, size)))
    return [first, *(make() for _ in range(count - 1))]


def median_seconds(calls: Sequence[Call], device: torch.device, repeats: int = 30) -> float:
    """The median time of one call, in turn over ``calls``; the first round warms up and compiles.

    Each call is queued behind a wait of the device, so that the host's time to launch it does not count.
    """
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        times = []
        for i in range(3):
            began = time.perf_counter()
            calls[i % len(calls)]()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    torch.cuda.synchronize()
    events = []
    for i in range(repeats):
        if i % 10 == 0:
            torch.cuda._sleep(60_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i % len(calls)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def measure_machine(device: torch.device, tiny: bool) -> Machine:
    rows = 64 if tiny else 8192
    tensors = [t for (t,) in copies(lambda: (torch.randn(rows, 4096, device=device).bfloat16(),), device)]
    clone = median_seconds([lambda t=t: t.clone() for t in tensors], device)
    size = 128 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_seconds([lambda: a @ b], device, repeats=10)
    return Machine(device, 2 * tensors[0].nbytes / clone, 2 * size**3 / product)
