"""Writes what ``end_to_end.py`` and ``regions.py`` measured into the README, each between two markers.

    python examples/benchmarks/table.py

Reads ``end_to_end_*.json``, ``regions.json`` and ``regions_overhead.json`` from ``results`` beside this file
and prints the tables too. Ratios are to the rewriter of the same case: above 1 is slower, or larger. First
steps stand where they were measured, one process at a time.
"""

import json
from collections.abc import Iterable
from itertools import compress
from pathlib import Path

from models import Case
from results import FOLDER, apart, load, name, ours, setup, words

README = Path(__file__).parents[2] / "README.md"
FIRST = "first step s"
HEAD = ("case", "system", "ms a step", "ratio", "peak GiB", "ratio", FIRST, "off eager's loss")
DAGGER = "†"


def markdown(cases: dict[Case, list[dict]]) -> str:
    """The table, and under it what the runs ran on."""
    first = any(run["first_step_s"] is not None for runs in cases.values() for run in runs)
    shown = [first or title != FIRST for title in HEAD]
    lines = [row(compress(HEAD, shown)), row("---" for _ in range(sum(shown)))]
    for case, runs in cases.items():
        base = ours(runs)
        found = (cells(run, base, words(case) if run is runs[0] else "") for run in runs)
        lines += [row(compress(values, shown)) for values in found]
    if any(apart(run, ours(runs)) for runs in cases.values() for run in runs):
        lines += [
            "",
            f"{DAGGER} measured in another run than the rewriter's row of that case, on another host.",
        ]
    return "\n".join([*lines, "", *machines(run for runs in cases.values() for run in runs)])


def machines(runs: Iterable[dict]) -> list[str]:
    """A sentence for each device, with every version that ran there."""
    found: dict[str, set[str]] = {}
    for run in runs:
        versions = {f"{package} {v}" for package, v in run["versions"].items() if v != "absent"}
        found.setdefault(run["device"], set()).update(versions)
    return [f"Measured on {device}; {', '.join(sorted(versions))}." for device, versions in found.items()]


def cells(run: dict, base: dict | None, case: str) -> tuple[str, ...]:
    peak = run["peak_gib"]
    eager = run.get("eager")
    return (
        case,
        name(run) + (f" {DAGGER}" if apart(run, base) else ""),
        f"{run['median_ms']:.1f}",
        ratio(run["median_ms"], base and base["median_ms"]),
        "–" if peak is None else f"{peak:.2f}",
        ratio(peak, base and base["peak_gib"]),
        "–" if run["first_step_s"] is None else f"{run['first_step_s']:.1f}",
        "–" if eager is None else f"{eager['largest']:.4f}",
    )


def ratio(value: float | None, to: float | None) -> str:
    return "–" if value is None or not to else f"{value / to:.2f}"


def row(columns: Iterable[str]) -> str:
    return f"| {' | '.join(columns)} |"


def regions(result: dict) -> str:
    """Seconds of first steps by depth, and where they went."""
    parts = ("first_step_s", "dynamo", "matching", "aot", "inductor", "rest")
    names = (
        "layers, caches",
        "first step",
        "Dynamo",
        "matching",
        "AOTAutograd",
        "Inductor",
        "kernels and run",
    )
    lines = [row(names), row("---" for _ in names)]
    for title, run in result.items():
        if isinstance(run, dict) and "first_step_s" in run:
            name = title.removeprefix("rewriter, ").replace("inductor", "plain torch.compile")
            lines.append(row((name, *(f"{run[part]:.1f}" for part in parts))))
    return "\n".join([*lines, "", f"Measured on {setup(result)}."])


def overhead(result: dict) -> str:
    """What a call of a region costs."""
    cost = result["overhead"]
    parts = f"{cost['forward_us']:.0f} µs forward and {cost['backward_us']:.0f} µs backward"
    more = f"A layer's call takes {parts} of the host's time more than its part of a flat graph"
    return f"{more}; {cost['calls']} layers under adapters. Measured on {setup(result)}."


def insert(document: str, name: str, table: str) -> str:
    """``document`` with ``table`` between the two markers of ``name``.

    Raises:
        ValueError: the markers are missing, or there are several of one.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"table: {README.name} must hold {begin} and {end} once each.")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    cases = load(FOLDER)
    if not cases:
        raise SystemExit(f"table: no end_to_end_*.json in {FOLDER}; run end_to_end.py first.")
    tables = {"end-to-end": markdown(cases)}
    for place, text in (("regions", regions), ("regions_overhead", overhead)):
        if (found := FOLDER / f"{place}.json").exists():
            tables[place] = text(json.loads(found.read_text()))
    document = README.read_text()
    for place, table in tables.items():
        print(table)
        document = insert(document, place, table)
    README.write_text(document)


if __name__ == "__main__":
    main()
