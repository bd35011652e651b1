"""What the device moves and computes in a second, measured in a tenth of one."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Bytes a second of a copy, read and written, and operations a second of a large bf16 product."""

    bandwidth: float
    operations: float


def measured_rates(device: torch.device) -> Rates:
    """Of a GPU, with no more than an eighth of the memory that is free."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(1 << 28, free // 16)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    side = 8192 if free > 1 << 32 else 2048
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    copied = _median_seconds(lambda: target.copy_(source))
    multiplied = _median_seconds(lambda: torch.mm(left, right, out=out))
    return Rates(2 * size / copied, 2 * side**3 / multiplied)


def _median_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 2)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[2:]) / 1e3
