"""Sums a trace into the lines of a profile."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from rewriter.memory.machine import Machine
from rewriter.profile import Row
from rewriter.profiling.kinds import label_of, label_of_call
from rewriter.profiling.trace import Call, Trace
from rewriter.profiling.work import operations, traffic


@dataclass
class _Line:
    """One line being summed: microseconds, and the calls whose work it is."""

    time: float = 0.0
    owners: dict[Call, None] = field(default_factory=dict)
    without: int = 0  # kernels that no call is known for

    def row(self, kind: str, name: str, steps: int, work: dict[Call, float], machine: Machine | None) -> Row:
        moved = [traffic(call) for call in self.owners]
        computed = [work.get(call) for call in self.owners]
        bound = None if machine is None else _bound_ms(moved, computed, machine)
        calls = len(self.owners) + self.without
        per = [_mean(moved, steps), _mean(computed, steps), None if bound is None else bound / steps]
        return Row(kind, name, calls / steps, self.time / 1e3 / steps, *per)


def _mean(values: list, steps: int) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / steps if known and len(known) == len(values) else None


def _bound_ms(moved: list, computed: list, machine: Machine) -> float | None:
    total = 0.0
    for size, count in zip(moved, computed, strict=True):
        if size is None and count is None:
            return None
        total += max((size or 0) / machine.bandwidth, (count or 0) / machine.matrix_flops)
    return 1e3 * total if moved else None


def device_rows(trace: Trace, steps: int, machine: Machine | None) -> tuple[Row, ...]:
    """By what the device's kernels are for."""
    lines: defaultdict[tuple[str, str], _Line] = defaultdict(_Line)
    for kernel in trace.kernels:
        label = label_of(kernel)
        line = lines[label.kind, label.name]
        line.time += kernel.end - kernel.start
        if label.owner is None:
            line.without += 1
        else:
            line.owners[label.owner] = None
    return _sorted(lines, trace.calls, steps, machine)


def host_rows(calls: Iterable[Call], steps: int) -> tuple[Row, ...]:
    """By what the host's calls are for, each without those within it."""
    calls = list(calls)
    lines: defaultdict[tuple[str, str], _Line] = defaultdict(_Line)
    for call in calls:
        label = label_of_call(call)
        line = lines[label.kind, label.name]
        line.time += call.alone
        line.owners[label.owner or call] = None
    return _sorted(lines, calls, steps, None)


def _sorted(lines: dict, calls: Iterable[Call], steps: int, machine: Machine | None) -> tuple[Row, ...]:
    work: defaultdict[Call, float] = defaultdict(float)
    for call in calls:
        if (count := operations(call)) is not None:
            work[label_of_call(call).owner or call] += count
    rows = (line.row(kind, name, steps, work, machine) for (kind, name), line in lines.items())
    return tuple(sorted(rows, key=lambda row: -row.ms))
