"""Where a training step's time goes: by op, with its bound and the share of it that is reached.

    print(rewriter.profile(lambda: train(batch)))

The step's own time is measured first, without a profiler, several steps in a row. ``torch.profiler`` then
says what the device did in them. The bound of an op is the longer of its bytes at the bandwidth of a large
copy and its operations at the rate of a large bf16 product, both as measured on the device. Where there is no
GPU, the table is of the host's own calls, each without those within it, and has no bounds.
"""

import io
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rewriter.memory.machine import Machine
    from rewriter.profiling.trace import Trace

_IDLE = 0.05  # less than this share of a step is not worth a word
_FOLDED = 0.01  # lines below this share become one for their kind


@dataclass(frozen=True)
class Row:
    """One op, for one step.

    Attributes:
        kind: what it is a part of: product, attention, rewriter, Inductor's kernels, optimizer, copy, other.
        calls: how often it ran; ``ms``: how long in all.
        bytes, operations: the fewest that it needs, where its shapes tell.
        bound_ms: the least time for them on this device.
    """

    kind: str
    name: str
    calls: float
    ms: float
    bytes: float | None = None
    operations: float | None = None
    bound_ms: float | None = None

    @property
    def reached(self) -> float | None:
        """The bound's share of the time: 1 is as fast as can be."""
        return self.bound_ms / self.ms if self.bound_ms is not None and self.ms else None


@dataclass(frozen=True)
class Profile:
    """A step's time. ``str`` and ``print`` give the table, ``to_dict`` is for JSON.

    Attributes:
        wall_ms: one step, unprofiled, in a row of several.
        busy_ms: how long of it the device was at work; of the host's calls, all of it.
        launches: kernels and copies that a step puts on the device.
        recorded: those of them that CUDA graphs launch, of which no shapes are known.
        waits: op and milliseconds a step that the device stood still before it, as profiled, longest first.
        bandwidth, rate: bytes and operations a second that bounds are made of; None on the host.
    """

    device: str
    on_gpu: bool
    wall_ms: float
    busy_ms: float
    launches: float
    rows: tuple[Row, ...]
    waits: tuple[tuple[str, float], ...] = ()
    bandwidth: float | None = None
    rate: float | None = None
    recorded: float = 0

    @property
    def idle(self) -> float:
        """The share of a step in which the device did nothing."""
        return max(0.0, 1 - self.busy_ms / self.wall_ms) if self.wall_ms else 0.0

    @property
    def verdict(self) -> str:
        """What the step waits for, in words."""
        if not self.on_gpu:
            total = sum(row.ms for row in self.rows)
            return f"No GPU was used: these are the host's own calls, {total:.2f} ms of them when profiled."
        return f"{self._waiting()} {self._unknown()}".rstrip()

    def _waiting(self) -> str:
        if self.idle > _IDLE:
            text = f"The GPU stands still for {self.idle:.0%} of a step: it waits for the host"
            if own := self.launches - self.recorded:
                text += f", which needs {1e3 * self.wall_ms / own:.0f} µs for each of {own:.0f} launches"
            if self.waits:
                text += f". Longest before {self.waits[0][0]}"
            return text + ". Larger batches, or fewer launches."
        still = (
            f"The GPU stands still for {self.idle:.0%} of a step"
            if self.idle >= 0.005
            else "The GPU is never idle"
        )
        text = f"{still}: a step takes what its kernels take."
        lost = [row for row in self.rows if row.bound_ms is not None]
        if not lost:
            return text
        worst = max(lost, key=lambda row: row.ms - (row.bound_ms or 0.0))
        over = worst.ms - (worst.bound_ms or 0.0)
        return f"{text} Farthest from its bound is {worst.name}, {over:.2f} ms above it."

    def _unknown(self) -> str:
        """What has no bounds, and how to have them."""
        if not self.recorded:
            return ""
        return (
            f"{self.recorded:.0f} launches are those of CUDA graphs, which tell no shapes: for bounds, "
            'compile with options={"cuda_graphs": False}.'
        )

    def by_kind(self) -> dict[str, float]:
        """Milliseconds a step of each kind, the longest first."""
        totals: defaultdict[str, float] = defaultdict(float)
        for row in self.rows:
            totals[row.kind] += row.ms
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict:
        """For JSON."""
        rows = [{**asdict(row), "reached": row.reached} for row in self.rows]
        return {**asdict(self), "rows": rows, "idle": self.idle, "verdict": self.verdict}

    def __str__(self) -> str:
        console = Console(width=110, file=io.StringIO(), record=True)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.export_text().splitlines())

    def __rich_console__(self, console: Console, options: object) -> Iterator:
        head = f"{self.device}: {self.wall_ms:.2f} ms a step"
        if self.on_gpu:
            head += f", GPU busy {self.busy_ms:.2f}, {self.launches:.0f} launches"
        yield Text(head, "bold")
        if self.bandwidth and self.rate:
            yield Text(f"bounds: {self.bandwidth / 1e12:.2f} TB/s, {self.rate / 1e12:.0f} TFLOP/s", "dim")
        yield self._table()
        yield Text(self.verdict)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("op", max_width=44, no_wrap=True)
        table.add_column("kind", no_wrap=True)
        # The host's calls have no bounds.
        names = ("calls", "ms", "share", "bytes", "FLOP", *(("bound ms", "reached") if self.rate else ()))
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        total = sum(row.ms for row in self.rows) or 1.0
        for kind, ms in self.by_kind().items():
            shown, folded = _fold([row for row in self.rows if row.kind == kind], total)
            for row in [*shown, *folded]:
                table.add_row(*_cells(row, total)[: len(table.columns)])
            if len(shown) + len(folded) > 1:
                table.add_row("", kind, "", f"{ms:.2f}", f"{ms / total:.1%}", style="dim")
        return table


def _fold(rows: list[Row], total: float) -> tuple[list[Row], list[Row]]:
    """The lines worth showing, and one for all others."""
    rows = sorted(rows, key=lambda row: -row.ms)
    shown = [row for row in rows if row.ms >= _FOLDED * total]
    rest = rows[len(shown) :]
    if len(rest) < 2:
        return rows, []
    calls, ms = sum(row.calls for row in rest), sum(row.ms for row in rest)
    return shown, [Row(rest[0].kind, f"{len(rest)} others", calls, ms)]


def _cells(row: Row, total: float) -> tuple[str, ...]:
    return (
        row.name,
        row.kind,
        f"{row.calls:.0f}",
        f"{row.ms:.2f}",
        f"{row.ms / total:.1%}",
        _amount(row.bytes),
        _amount(row.operations),
        "" if row.bound_ms is None else f"{row.bound_ms:.2f}",
        "" if row.reached is None else f"{row.reached:.0%}",
    )


def _amount(value: float | None) -> str:
    """With a letter for thousands: 3.2G."""
    if value is None:
        return ""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def profile(step: Callable[[], object], *, steps: int = 3, warmup: int = 2) -> Profile:
    """Profile ``step``, a function without arguments that trains once.

    Args:
        steps: how many are timed, then profiled; all figures are for one.
        warmup: how many run first, for compilation and caches.

    Raises:
        TypeError: ``step`` is no function.
        ValueError: ``steps`` is no whole number above 0, or ``warmup`` none from 0 on.
    """
    import torch

    from rewriter.memory.machine import machine_for
    from rewriter.profiling.trace import read

    if not callable(step):
        raise TypeError(
            f"profile: step is of type {type(step).__name__}; give the function that takes a step, not its "
            "result: profile(lambda: train(batch))."
        )
    for name, count, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"profile: {name} is {count!r}; give a whole number from {least} on.")
    for _ in range(warmup):
        step()
    wall = _seconds(step, steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch.profiler.profile(record_shapes=True) as recorded:
            _seconds(step, steps)
        recorded.export_chrome_trace(str(path))
        trace = read(json.loads(path.read_text()))
    device = torch.cuda.get_device_name() if trace.kernels else "CPU"
    machine = machine_for("cuda") if trace.kernels else None
    return summarise(trace, device=device, seconds=wall, steps=steps, machine=machine)


def _seconds(step: Callable[[], object], steps: int) -> float:
    """Of one step, in a row of ``steps``."""
    import torch

    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise()
    return (time.perf_counter() - start) / steps


def summarise(
    trace: "Trace", *, device: str, seconds: float, steps: int, machine: "Machine | None"
) -> Profile:
    """The profile of a trace of ``steps`` steps, each of which took ``seconds`` without a profiler."""
    from rewriter.profiling.kinds import label_of
    from rewriter.profiling.rows import device_rows, host_rows
    from rewriter.profiling.trace import busy

    wall = 1e3 * seconds
    if not trace.kernels:
        return Profile(device, False, wall, wall, 0, host_rows(trace.calls, steps))
    at_work, pauses = busy(trace.kernels)
    waits: defaultdict[str, float] = defaultdict(float)
    for length, kernel in pauses:
        waits[label_of(kernel).name] += length / 1e3 / steps
    return Profile(
        device,
        True,
        wall,
        at_work / 1e3 / steps,
        len(trace.kernels) / steps,
        device_rows(trace, steps, machine),
        tuple(sorted(waits.items(), key=lambda item: -item[1])[:5]),
        machine and machine.bandwidth,
        machine and machine.matrix_flops,
        sum(kernel.recorded for kernel in trace.kernels) / steps,
    )
