"""What memory plans foresee against what steps take: budgets times lengths, of a model that is compiled once.

    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True         # as for any small card
    python examples/benchmarks/predictions.py                       # 12 budgets, 8,192 to 32,768 tokens
    python examples/benchmarks/predictions.py --offloading          # and what copies cost, as offloading.py
    python examples/benchmarks/predictions.py --tiny                # a dry run on a CPU

Budgets of a length go from 2% over the least that does to 5% over what keeping everything takes. Of each, the
allocator may take no more than it could on a card of that size; two steps are run, and then timed ones, two
or as many as take 0.8 seconds, whose peak counts. Prints a table, the largest distance of a peak from what
was foreseen, how many passed the budget or ran out of memory, and where a larger budget is slower by more
than steps differ among themselves. Writes ``results/predictions.json`` after every point. See
``replanned.py`` for what is not as in a model of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import offloading
import torch
from context import CONTEXT_GIB, GIB, flushes, memory
from end_to_end import machine, synchronise, timed, versions
from replanned import TINY, Replanned, compiled_once

from rewriter.memory.budgets import allocated_bytes, card_bytes
from rewriter.memory.machine import machine_for

RESULTS = Path(__file__).parent / "results"
# Medians of so few steps differ by this much from one run to the next.
NOISE = 0.01
# Seconds of steps for each point, of at least two: short ones are disturbed more.
_ENOUGH = 0.8
# Of the least, and of what keeping everything takes: the smallest and the largest budget.
ENDS = (1.02, 1.05)


@dataclass(frozen=True)
class Point:
    """One budget and length: GiB and seconds. ``card``: of the device, as ``memory_budget`` is.

    ``allowed_gib``: what the allocator may have given out, tensors and cuBLAS's workspaces.
    Where memory ran out there are no ``seconds``. ``flushed``: how often the allocator found no room in the
    timed steps and gave back what it had cached, which waits for the device.
    """

    card: float
    tokens: int
    foreseen_gib: float
    allowed_gib: float
    peak_gib: float | None
    reserved_gib: float | None
    host_gib: float
    foreseen_s: float
    seconds: tuple[float, ...]
    first_s: float | None
    ways: tuple
    flushed: int | None


def measure(compiled: Replanned, step, tokens: int, usable: int, device: str, steps: int) -> Point:
    """Steps within a budget."""
    card = card_bytes(usable, torch.device(device)) / GIB
    start = time.perf_counter()
    plan = compiled.plan(tokens, usable)
    first, seconds, before = None, (), 0
    with within(card, device), suppress(torch.OutOfMemoryError):
        step(tokens)
        synchronise(device)
        first = time.perf_counter() - start
        step(tokens)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = flushes(device)
        seconds = tuple(until(_ENOUGH, lambda: timed(step, tokens, device)[0], steps))
    return Point(
        card,
        tokens,
        plan.peak / GIB,
        allocated_bytes(usable, torch.device(device)) / GIB,
        memory("max_memory_allocated"),
        memory("max_memory_reserved"),
        plan.hosted / GIB,
        plan.foreseen_seconds,
        seconds,
        first,
        tuple((kind, way, count) for (kind, way), count in plan.counts.items()),
        flushes(device) - before if device == "cuda" else None,
    )


def until(seconds: float, run: Callable[[], float], least: int) -> Iterator[float]:
    """What ``run`` takes, ``least`` times or more, until it has taken so much in all."""
    taken, times = 0.0, 0
    while times < least or taken < seconds:
        taken, times = taken + (took := run()), times + 1
        yield took


@contextmanager
def within(card: float, device: str) -> Iterator[None]:
    """The allocator takes no more than it could on that card."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min((card - CONTEXT_GIB) * GIB / total, 1.0))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def slower(points: list[Point]) -> list[str]:
    """Neighbouring budgets of which the larger one takes longer, beyond noise."""
    found = []
    for tokens in sorted({p.tokens for p in points}):
        row = sorted((p for p in points if p.tokens == tokens and p.seconds), key=lambda p: p.card)
        for small, large in pairwise(row):
            best, other = min(small.seconds), min(large.seconds)
            spread = max(statistics.median(p.seconds) / min(p.seconds) - 1 for p in (small, large))
            if other > best * (1 + max(NOISE, spread)):
                found.append(
                    f"{tokens:,} tokens: {large.card:.2f} GiB {other:.3f} s, {small.card:.2f} {best:.3f}"
                )
    return found


def line(point: Point) -> str:
    if not point.seconds:
        return f"{point.card:6.2f} {point.tokens:8,} {point.foreseen_gib:8.2f}  out of memory"
    first, seconds = point.first_s or 0, min(point.seconds)
    peak = "" if point.peak_gib is None else (
        f"{point.peak_gib:8.2f} {percent(point.peak_gib, point.foreseen_gib)} "
        f"{'over' if point.peak_gib > point.allowed_gib else ''}"
    )  # fmt: skip
    return (
        f"{point.card:6.2f} {point.tokens:8,} {point.foreseen_gib:8.2f} {peak:>20} {point.host_gib:6.2f} "
        f"{point.foreseen_s:8.3f} {seconds:8.3f} {percent(seconds, point.foreseen_s)} {first:7.1f} "
        f"{point.flushed or 0:8d}"
    )


def percent(measured: float, foreseen: float) -> str:
    return f"{100 * (measured / foreseen - 1):+6.1f}%"


HEADER = "  card   tokens foreseen    measured, GiB         host foreseen measured, s  first step  flushes"


def verdict(points: list[Point]) -> dict:
    """The largest distance of a peak, points that passed their budget, and where a larger one is slower."""
    ran = [p for p in points if p.seconds]
    peaks = [(p.peak_gib, p.foreseen_gib, p.allowed_gib) for p in ran if p.peak_gib is not None]
    return {
        "points": len(points),
        "out_of_memory": len(points) - len(ran),
        "furthest_peak": max((abs(peak / foreseen - 1) for peak, foreseen, _ in peaks), default=None),
        "over_budget": sum(peak > allowed for peak, _, allowed in peaks),
        "slower": slower(points),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="8192,16384,32768", help="with commas between")
    parser.add_argument("--budgets", type=int, default=12, help="of each length")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--offloading", action="store_true", help="of the first and the last length, after")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = sorted(map(int, arguments.tokens.split(",")))
    if arguments.tiny:
        lengths, arguments.layers, arguments.budgets, arguments.steps = [TINY.tokens[1]], TINY.layers, 1, 1
    compiled, step = compiled_once(arguments.layers, lengths, device, arguments.tiny)
    print(HEADER, flush=True)
    points: list[Point] = []
    arguments.results.mkdir(parents=True, exist_ok=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in lengths:
            least, everything = compiled.range_of(tokens)
            low, high = least * ENDS[0], everything * ENDS[1]
            for i in range(arguments.budgets):
                usable = int(low + (high - low) * i / max(arguments.budgets - 1, 1))
                points.append(measure(compiled, step, tokens, usable, device, arguments.steps))
                print(line(points[-1]), flush=True)
                told = {
                    **machine(device),
                    "versions": versions(),
                    "rates": asdict(machine_for(torch.device(device))),
                    "layers": arguments.layers,
                    "seconds": time.perf_counter() - start,
                    "verdict": verdict(points),
                    "points": [asdict(p) for p in points],
                }
                (arguments.results / "predictions.json").write_text(json.dumps(told, indent=1) + "\n")
        if arguments.offloading:
            ends = sorted({lengths[0], lengths[-1]})
            often = (1, 1) if arguments.tiny else (offloading.TURNS, offloading.STEPS)
            rows = offloading.compare(compiled, step, ends, offloading.SHARE, device, *often)
            offloading.write(arguments.results, device, arguments.layers, rows)
    print(json.dumps(verdict(points), indent=1))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
