"""A device to its ``Machine``: each rate is the median of a few runs, two seconds in all.

Products and attention are of random numbers, since those of zeros run faster, and a GPU runs for a quarter of
a second before it is timed: a cold one is faster than one that its power limits.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rewriter.memory.budgets import free_bytes
from rewriter.memory.machine import Machine, device_name

_GIB = 2**30


@dataclass(frozen=True)
class _Sizes:
    """What is measured: a square product, a copy, a transfer, and attention (heads, length, width).

    Attention is long, since there it counts, and what it takes beside products is a small part of its time.
    """

    matrix: int
    copied: int
    moved: int
    attention: tuple[int, int, int]


_ON_GPU = _Sizes(8192, _GIB, 2**28, (8, 32768, 128))
# At most 0.3 GiB at a time; launches are a small part of what is measured.
_ON_FULL_GPU = _Sizes(6144, 2**27, 2**26, (2, 32768, 128))
_AMPLE = 4 * _GIB
_ON_CPU = _Sizes(512, 2**26, 2**26, (4, 512, 64))


def measure(device: str | torch.device) -> Machine:
    """Measure a device in about two seconds: medians of a few runs.

    It takes up to 2 GiB of a GPU that has 4 free, up to 0.3 of any other, and gives it back.

    Raises:
        torch.OutOfMemoryError: the device has less.
    """
    device = torch.device(device)
    if device.type != "cuda":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _measured(device, _ON_CPU, total, _timed_on_cpu)
    free = free_bytes(device)
    assert free is not None
    free -= torch.cuda.memory_allocated(device)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        return _measured(device, _ON_GPU if free >= _AMPLE else _ON_FULL_GPU, total, _timed_on_gpu(device))
    finally:
        torch.cuda.empty_cache()


def _measured(device: torch.device, sizes: _Sizes, total: int, timed: "Timed") -> Machine:
    attention_forward, attention_backward = _attention_rates(device, sizes, timed)
    to_host, to_device = _transfer_rates(device, sizes, timed)
    return Machine(
        name=device_name(device),
        device_bytes=total,
        matrix_flops=_product_rate(device, sizes, timed),
        attention_forward_flops=attention_forward,
        attention_backward_flops=attention_backward,
        bandwidth=_copy_rate(device, sizes, timed),
        to_host=to_host,
        to_device=to_device,
        launch_seconds=_launch_seconds(device, timed),
    )


# Of running before a GPU is timed.
_WARM_SECONDS = 0.25

Timed = Callable[[Callable[[], object]], float]


def _product_rate(device: torch.device, sizes: _Sizes, timed: Timed) -> float:
    n = sizes.matrix
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16, generator=_own_randomness(device))
    return 2 * n**3 / timed(lambda: a @ b)


def _copy_rate(device: torch.device, sizes: _Sizes, timed: Timed) -> float:
    source = torch.zeros(sizes.copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * sizes.copied / timed(lambda: target.copy_(source))


def _transfer_rates(device: torch.device, sizes: _Sizes, timed: Timed) -> tuple[float, float]:
    here = torch.zeros(sizes.moved, device=device, dtype=torch.uint8)
    host = torch.zeros(sizes.moved, dtype=torch.uint8, pin_memory=device.type == "cuda")
    out = timed(lambda: host.copy_(here, non_blocking=True))
    back = timed(lambda: here.copy_(host, non_blocking=True))
    return sizes.moved / out, sizes.moved / back


def _attention_rates(device: torch.device, sizes: _Sizes, timed: Timed) -> tuple[float, float]:
    heads, length, width = sizes.attention
    shape = (4, 1, heads, length, width)
    random = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=_own_randomness(device))
    q, k, v = (values.requires_grad_() for values in random[:3])
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.enable_grad():
        out = attention(q, k, v, is_causal=True)
        forward = timed(lambda: attention(q, k, v, is_causal=True))
    backward = timed(lambda: torch.autograd.grad(out, (q, k, v), random[3], retain_graph=True))
    flops = 4 * heads * length**2 * width / 2
    return flops / forward, 2.5 * flops / backward


def _own_randomness(device: torch.device) -> torch.Generator:
    """Random numbers, since products of zeros run faster, without touching the user's."""
    return torch.Generator(device).manual_seed(0)


def _launch_seconds(device: torch.device, timed: Timed) -> float:
    one = torch.zeros(1, device=device)

    def many():
        for _ in range(100):
            one.add_(1.0)

    return timed(many) / 100


def _timed_on_cpu(run: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(5))


def _timed_on_gpu(device: torch.device) -> Timed:
    def once(run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def timed(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            # A cold card is faster for some tens of milliseconds: then its power limits it.
            end = time.perf_counter() + _WARM_SECONDS
            while time.perf_counter() < end:
                once(run)
            return statistics.median(once(run) for _ in range(5))

    stream = torch.cuda.current_stream(device)
    return timed
