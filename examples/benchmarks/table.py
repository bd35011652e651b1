"""Writes what ``end_to_end.py`` and ``regions.py`` measured into the README, each between two markers.

    python examples/benchmarks/table.py

Reads ``results/end_to_end_*.json`` and ``results/regions.json`` beside this file and prints the tables too.
Ratios are to the rewriter of the same case: above 1 is slower, or larger.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
LABELS = {
    "hf": "eager",
    "inductor": "`torch.compile`",
    "rewriter": "`rewriter`",
    "liger": "Liger-Kernel",
    "liger_compiled": "Liger-Kernel and `torch.compile`",
    "unsloth": "Unsloth",
    "unsloth_gc": "Unsloth, its checkpointing",
}
HEAD = ("layers × rows × tokens", "system", "ms a step", "ratio", "peak GiB", "ratio", "first step s", "loss")


def load(folder: Path) -> list[dict]:
    """The runs in ``folder``, those of one case together, the rewriter's last."""
    runs = [json.loads(path.read_text()) for path in folder.glob("end_to_end_*.json")]
    return sorted(runs, key=lambda r: (shape(r), r["system"] == "rewriter", r["system"]))


def shape(run: dict) -> tuple[int, int, str]:
    """(layers, rows, tokens) of ``8x2x2048``; tokens may be a range."""
    layers, rows, tokens = run["case"].split("x")
    return int(layers), int(rows), tokens


def markdown(runs: Iterable[dict]) -> str:
    """The table, and under it what the runs ran on."""
    runs = list(runs)
    lines = [row(HEAD), row("---" for _ in HEAD)]
    for size, group in groupby(runs, key=shape):
        case = list(group)
        ours = next((r for r in case if r["system"] == "rewriter"), None)
        lines += [row(cells(run, size, ours)) for run in case]
    return "\n".join([*lines, "", *sorted({f"Measured on {setup(run)}." for run in runs})])


def cells(run: dict, size: tuple[int, int, str], ours: dict | None) -> tuple[str, ...]:
    peak = run["peak_gib"]
    return (
        " × ".join(map(str, size)),
        LABELS.get(run["system"], run["system"]),
        f"{run['median_ms']:.1f}",
        ratio(run["median_ms"], ours and ours["median_ms"]),
        "–" if peak is None else f"{peak:.2f}",
        ratio(peak, ours and ours["peak_gib"]),
        f"{run['first_step_s']:.1f}",
        f"{run['losses'][0]:.4f} → {run['losses'][-1]:.4f}",
    )


def ratio(value: float | None, to: float | None) -> str:
    return "–" if value is None or not to else f"{value / to:.2f}"


def setup(run: dict) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in run["versions"].items() if v != "absent")
    return f"{run['device']}; {versions}"


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
    for name, run in result.items():
        if name.startswith("rewriter"):
            lines.append(row((name.removeprefix("rewriter, "), *(f"{run[part]:.1f}" for part in parts))))
    cost = result["overhead"]
    lines += ["", f"A call of a region costs the host {cost['forward_us']:.0f} µs, "]
    lines[-1] += f"{cost['forward_backward_us']:.0f} µs with its backward. Measured on {setup(result)}."
    return "\n".join(lines)


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
    results = HERE / "results"
    runs = load(results)
    if not runs:
        raise SystemExit(f"table: no end_to_end_*.json in {results}; run end_to_end.py first.")
    tables = {"end-to-end": markdown(runs)}
    if (found := results / "regions.json").exists():
        tables["regions"] = regions(json.loads(found.read_text()))
    document = README.read_text()
    for name, table in tables.items():
        print(table)
        document = insert(document, name, table)
    README.write_text(document)


if __name__ == "__main__":
    main()
