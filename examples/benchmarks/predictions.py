"""What memory plans foresee against what steps take: budgets times lengths, in one process.

    python examples/benchmarks/predictions.py --cards 8,10,12,16,24,48 --tokens 8192,16384,32768
    python examples/benchmarks/predictions.py --resident --cards 12 --tokens 8192,32768

Each point compiles the model anew under a card of that many GiB, as ``context.py`` does, runs a first step
and ``--steps`` timed ones. With ``--resident`` the same plans run with nothing capped and what they would
offload kept on the device: what the copies cost. Prints a table and at which points a larger card is slower
by more than the steps differ among themselves; writes ``results/predictions.json`` after every point.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from context import CONTEXT_GIB, GIB, memory, timed
from end_to_end import machine, training_step, versions
from models import Case, model_of

import rewriter
from rewriter.memory import planned
from rewriter.memory.choices import StagedChoice
from rewriter.memory.plan import Infeasible

RESULTS = Path(__file__).parent / "results"
# Medians of so few steps differ by this much from one run to the next.
NOISE = 0.01


@dataclass(frozen=True)
class Point:
    """One budget and length: GiB and seconds; ``least_gib`` is what would do where no plan is found."""

    card: float
    tokens: int
    foreseen_gib: float = 0.0
    allowed_gib: float = 0.0
    peak_gib: float | None = None
    reserved_gib: float | None = None
    host_gib: float = 0.0
    foreseen_s: float = 0.0
    seconds: tuple[float, ...] = ()
    first_s: float = 0.0
    ways: tuple = ()
    least_gib: float | None = None


def measure(
    model: torch.nn.Module, case: Case, card: float, device: str, steps: int, capped: bool, lowering: str
) -> Point:
    """Compile, and run steps, within a card."""
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    gc.collect()
    model.compile(backend="rewriter", options={"memory_budget": int(card * GIB), "lowering": lowering})
    empty = Point(card, case.tokens[1])
    step = training_step(model, case, device, steps)
    with within(card, device) if capped else nullcontext():
        try:
            first, _ = timed(step, 0, device)
        except Exception as error:
            if (infeasible := cause(error)) is None:
                raise
            return replace(empty, least_gib=(infeasible.least_device or 0) / GIB)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = tuple(timed(step, i, device)[0] for i in range(1, 1 + steps))
    plan = rewriter.report().memory
    assert plan is not None, "the graph was not planned"
    return Point(
        card,
        case.tokens[1],
        plan.peak / GIB,
        plan.device_budget / GIB,
        memory("max_memory_allocated"),
        memory("max_memory_reserved"),
        plan.hosted / GIB,
        plan.seconds,
        seconds,
        first,
        plan.ways,
    )


@contextmanager
def within(card: float, device: str) -> Iterator[None]:
    """The allocator takes no more than it could on that card."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((card - CONTEXT_GIB) * GIB / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def cause(error: BaseException | None) -> Infeasible | None:
    while error is not None and not isinstance(error, Infeasible):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


@contextmanager
def kept_instead() -> Iterator[None]:
    """Plans as they are made, but what they offload stays on the device."""
    apply = planned._apply

    def resident(program, ways, found):
        choices = [
            twin(ways[call.region], choice.name)
            for call, choice in zip(program.calls, found.choices, strict=True)
        ]
        return apply(program, ways, replace(found, choices=tuple(choices)))

    with patch.object(planned, "_apply", resident):
        yield


def twin(ways: list[StagedChoice], name: str):
    """The way that runs as the one of that name, in the same tiles, and offloads nothing."""
    way = next(way for way in ways if way.choice.name == name)
    if way.schedule is None or not way.schedule.offloaded:
        return way.choice
    kept = {*way.schedule.kept, *way.schedule.offloaded}
    for other in ways:
        plan = other.schedule
        if plan is None or plan.offloaded or other.layer is not way.layer or other.tile != way.tile:
            continue
        if set(plan.kept) == kept:
            return other.choice
    raise LookupError(f"no way keeps what {name!r} offloads")


def slower(points: list[Point]) -> list[str]:
    """Neighbouring cards of which the larger one takes longer, beyond noise."""
    found = []
    for tokens in sorted({p.tokens for p in points}):
        row = sorted((p for p in points if p.tokens == tokens and p.seconds), key=lambda p: p.card)
        for small, large in pairwise(row):
            best, other = min(small.seconds), min(large.seconds)
            spread = max((max(p.seconds) - min(p.seconds)) / min(p.seconds) for p in (small, large))
            if other > best * (1 + max(NOISE, spread)):
                found.append(
                    f"{tokens:,} tokens: {large.card:g} GiB takes {other:.3f} s, {small.card:g} {best:.3f}"
                )
    return found


def line(point: Point) -> str:
    place = f"{point.card:6g} {point.tokens:8,}"
    if not point.seconds:
        return f"{place}  no plan: {point.least_gib:.2f} GiB would do"
    seconds = min(point.seconds)
    peak = "" if point.peak_gib is None else (
        f"{point.peak_gib:8.2f} {percent(point.peak_gib, point.foreseen_gib)} "
        f"{'over' if point.peak_gib > point.allowed_gib else ''}"
    )  # fmt: skip
    return (
        f"{place} {point.foreseen_gib:8.2f} {peak:>20} {point.host_gib:6.2f} {point.foreseen_s:8.3f} "
        f"{seconds:8.3f} {percent(seconds, point.foreseen_s)} {point.first_s:7.1f}"
    )


def percent(measured: float, foreseen: float) -> str:
    return f"{100 * (measured / foreseen - 1):+6.1f}%"


HEADER = "  card   tokens foreseen    measured, GiB         host foreseen measured, s      first step, s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", default="8,10,12,16,24,48", help="GiB, with commas between")
    parser.add_argument("--tokens", default="8192,16384,32768", help="with commas between")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--resident", action="store_true", help="keep what the plans would offload")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [Case(arguments.layers, 1, (int(n), int(n))) for n in arguments.tokens.split(",")]
    model = model_of(cases[0], device, arguments.tiny)
    rewriter.prepare(model)
    points: list[Point] = []
    name = "predictions_resident.json" if arguments.resident else "predictions.json"
    arguments.results.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    lowering = "eager" if arguments.tiny else "inductor"
    for case in cases:
        for card in sorted(map(float, arguments.cards.split(","))):
            with kept_instead() if arguments.resident else nullcontext():
                capped = not arguments.resident
                points.append(measure(model, case, card, device, arguments.steps, capped, lowering))
            print(line(points[-1]), flush=True)
            told = {**machine(device), "versions": versions(), "points": [asdict(p) for p in points]}
            (arguments.results / name).write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(slower(points)) or "a larger card is never slower")


if __name__ == "__main__":
    main()
