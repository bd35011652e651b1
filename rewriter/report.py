"""What was rewritten and why the rest was not: plain records, readable text, JSON.

Records hold strings and numbers alone, so that a report keeps no graph and no tensor alive.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.text import Text

from rewriter.report_text import graph_text
from rewriter.seconds_text import seconds_text
from rewriter.size_text import size_text


@dataclass(frozen=True)
class MatchRecord:
    """A rewrite applied at one line of the model's source, ``count`` times."""

    rewrite: str
    place: str
    count: int


@dataclass(frozen=True)
class MissRecord:
    """An operation that a pass looks for and did not rewrite, and how near one of its patterns came."""

    rewrite: str
    pattern_line: str
    model_line: str
    reason: str
    count: int = 1


@dataclass(frozen=True)
class PassRecord:
    """One pass over one graph; ``error`` says why it was left out, where it failed."""

    name: str
    matches: tuple[MatchRecord, ...]
    misses: tuple[MissRecord, ...]
    seconds: float
    error: str | None = None

    @property
    def count(self) -> int:
        return sum(m.count for m in self.matches)


@dataclass(frozen=True)
class RegionRecord:
    """A part of a program that was compiled once, and called ``times`` times.

    ``weights`` and ``weight_bytes`` count the model's tensors that one call reads, ``graph`` is its code.
    ``steps`` says, of a layer under a memory plan, in which order its stages run, and what is offloaded and
    reloaded between them, forward and backward.
    """

    name: str
    times: int
    operations: int
    weights: int
    weight_bytes: int
    graph: str
    steps: str = ""


@dataclass(frozen=True)
class ProgramRecord:
    """A graph as calls of regions: ``code`` is readable Python, ``regions`` are in order of first call."""

    code: str
    regions: tuple[RegionRecord, ...]

    def __str__(self) -> str:
        return self.code

    def __getitem__(self, name: str) -> RegionRecord:
        """The region of that name."""
        for region in self.regions:
            if region.name == name:
                return region
        known = ", ".join(region.name for region in self.regions)
        raise KeyError(f"no region {name!r} in this program; there are {known}")


# Part of a step's time that a plan may be slower than the best before it is told.
_TOLD = 0.001


@dataclass(frozen=True)
class MemoryRecord:
    """The memory plan of a graph: bytes, and seconds of forward and backward as they were predicted.

    Attributes:
        peak, where: the most that the device holds, and when; ``static`` of it all the time.
        device_budget, host_budget: what the plan had to stay within; of the host, this process's part.
        hosted: what is offloaded to host memory.
        ways: kind of layer, how it runs, and how many run so.
        slack: seconds by which another plan might at most be faster.
        timeline: (moment, device bytes, host bytes) over a step.
        chart, picture: the timeline as text of 100 columns, and as SVG.
    """

    peak: int
    where: str
    static: int
    device_budget: int
    hosted: int
    host_budget: int
    seconds: float
    ways: tuple[tuple[str, str, int], ...]
    timeline: tuple[tuple[str, int, int], ...]
    chart: str
    picture: str
    slack: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"memory: {size_text(self.peak)} of {size_text(self.device_budget)} on the device, at the "
            f"{self.where}; {size_text(self.static)} of it all the time; "
            f"{size_text(self.hosted)} in host memory; {seconds_text(self.seconds)} forward and backward"
        ]
        lines += [f"  {kind} × {count}: {way}" for kind, way, count in self.ways]
        if self.slack > _TOLD * self.seconds:
            lines.append(f"  not proven the fastest: another may be {self.slack / self.seconds:.1%} faster")
        return "\n".join(lines)


@dataclass
class GraphRecord:
    """One graph that Dynamo handed over: its passes, its size before and after, and why Dynamo ended it."""

    name: str
    passes: list[PassRecord] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    graph_break: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    program: ProgramRecord | None = None
    memory: MemoryRecord | None = None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


@dataclass
class Report:
    """The graphs compiled, in order."""

    graphs: list[GraphRecord] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Pass name to rewrites, summed over the graphs."""
        totals: Counter[str] = Counter()
        for graph in self.graphs:
            for record in graph.passes:
                totals[record.name] += record.count
        return dict(totals)

    @property
    def program(self) -> ProgramRecord | None:
        """The program of the largest graph that was outlined: ``print(report().program)``."""
        found = [g for g in self.graphs if g.program is not None]
        return max(found, key=lambda g: g.nodes_before).program if found else None

    @property
    def memory(self) -> MemoryRecord | None:
        """The memory plan of the largest graph that has one: ``print(report().memory.chart)``."""
        found = [g for g in self.graphs if g.memory is not None]
        return max(found, key=lambda g: g.nodes_before).memory if found else None

    def to_dict(self) -> dict:
        """For JSON."""
        return {"counts": self.counts(), "graphs": [asdict(g) for g in self.graphs]}

    def __str__(self) -> str:
        console = Console(width=110, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(self)
        return console.export_text().rstrip()

    def __rich_console__(self, console: Console, options: object) -> Iterator:
        if not self.graphs:
            yield Text(_nothing(self))
        for graph in self.graphs:
            yield from graph_text(graph)


def _nothing(empty: Report) -> str:
    if empty is not report() and report().graphs:
        return (
            "rewriter: no graph was compiled in this block. Those that were compiled before are in "
            "rewriter.report(); torch.compiler.reset() before the block has them compiled anew."
        )
    return "rewriter: no graph has been compiled yet. Call the compiled model once."


def count_places(sites: Iterable[tuple[str, str]]) -> tuple[MatchRecord, ...]:
    """One record for each rewrite and line, in the order of the graph."""
    return tuple(MatchRecord(name, place, n) for (name, place), n in Counter(sites).items())


def count_misses(misses: Iterable[MissRecord]) -> tuple[MissRecord, ...]:
    """Equal misses of several layers as one record with a count."""
    keyed = Counter((m.rewrite, m.pattern_line, m.model_line, _without_numbers(m.reason)) for m in misses)
    return tuple(MissRecord(*key, count=n) for key, n in keyed.items())


def _without_numbers(reason: str) -> str:
    """Node names as Dynamo numbers them differ from layer to layer; the reason does not."""
    words = []
    for word in reason.split("`"):
        head, _, tail = word.rpartition("_")
        words.append(head if head and tail.isdigit() and " " not in word else word)
    return "`".join(words)


# The reports that graphs are added to: the process's own, and those of the `inspect` blocks being run.
_listeners: list[Report] = [Report()]


def record_graph(graph: GraphRecord) -> None:
    """Add a compiled graph to every open report."""
    for listener in _listeners:
        listener.graphs.append(graph)


def report() -> Report:
    """What was compiled in this process since its start or the last ``torch._dynamo.reset()``."""
    return _listeners[0]


def forget() -> None:
    """Begin the process's report anew."""
    _listeners[0] = Report()


def inspect() -> "Inspection":
    """Collect the graphs compiled inside the block: ``with inspect() as report: step(batch)``."""
    return Inspection()


class Inspection:
    """A block's own report."""

    def __enter__(self) -> Report:
        self._collected = Report()
        _listeners.append(self._collected)
        return self._collected

    def __exit__(self, *_: object) -> None:
        # By identity: two empty reports are equal.
        _listeners[:] = [listener for listener in _listeners if listener is not self._collected]

    def __repr__(self) -> str:
        return (
            "rewriter.inspect() is a block's: with rewriter.inspect() as report: step(batch); print(report)"
        )
