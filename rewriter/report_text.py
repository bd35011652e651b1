"""A graph's record as lines and tables for people: regions, memory plan, rewrites and what was left."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rewriter.report import GraphRecord, ProgramRecord


def graph_text(graph: "GraphRecord") -> Iterator[Text | Table]:
    """What ``rich`` prints of a graph, a line or a table after the other."""
    yield Text(
        f"graph {graph.name}: {graph.nodes_before} operations, {graph.nodes_after} after rewriting", "bold"
    )
    if graph.program is not None:
        yield _regions(graph.program)
    if graph.memory is not None:
        yield Text("  " + str(graph.memory).replace("\n", "\n  "))
    for note in graph.notes:
        yield Text(f"  {note}")
    if graph.graph_break:
        yield Text(f"  Dynamo ended this graph early: {graph.graph_break}")
    matches = Table("pass", "rewrite", "times", "where", box=None, padding=(0, 2), header_style="dim")
    for record in graph.passes:
        for m in record.matches:
            matches.add_row(record.name, m.rewrite, str(m.count), _short(m.place))
    if matches.row_count:
        yield matches
    for record in graph.passes:
        if record.error:
            yield Text(f"  {record.name}: left out, it failed: {record.error}", "red")
    misses = [(record, m) for record in graph.passes for m in record.misses]
    if misses:
        yield Text("  not rewritten:")
    for record, m in misses:
        place = _short(m.model_line) or "unknown line"
        times = f" (×{m.count})" if m.count > 1 else ""
        yield Text(
            f"    {record.name} at {place}{times}: {m.reason}  [{m.rewrite}, {_short(m.pattern_line)}]"
        )


def _regions(program: "ProgramRecord") -> Table:
    table = Table(
        "compiled once", "operations", "weights", "MiB", box=None, padding=(0, 2), header_style="dim"
    )
    for region in program.regions:
        times = f" × {region.times}" if region.times > 1 else ""
        size = f"{region.weight_bytes / 2**20:.1f}"
        table.add_row(region.name + times, str(region.operations), str(region.weights), size)
    return table


def _short(place: str) -> str:
    return place.rpartition("/")[2]
