"""Writes what ``end_to_end.py`` measured into the README, as a table between two markers.

    python examples/benchmarks/table.py

Reads ``results/end_to_end_*.json`` beside this file and prints the table too. Ratios are to the rewriter of
the same case: above 1 is slower, or larger.
"""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- end-to-end -->", "<!-- /end-to-end -->"
LABELS = {"hf": "eager", "inductor": "`torch.compile`", "rewriter": "`rewriter`"}
HEAD = ("layers × rows × tokens", "system", "ms a step", "ratio", "peak GiB", "ratio", "first step s", "loss")


def load(folder: Path) -> list[dict]:
    """The runs in ``folder``, those of one case together, the rewriter's last."""
    runs = [json.loads(path.read_text()) for path in folder.glob("end_to_end_*.json")]
    return sorted(runs, key=lambda r: (shape(r), r["system"] == "rewriter", r["system"]))


def shape(run: dict) -> tuple[int, ...]:
    """(layers, rows, tokens) of ``8x2x2048``."""
    return tuple(map(int, run["case"].split("x")))


def markdown(runs: Iterable[dict]) -> str:
    """The table, and under it what the runs ran on."""
    runs = list(runs)
    lines = [row(HEAD), row("---" for _ in HEAD)]
    for size, group in groupby(runs, key=shape):
        case = list(group)
        ours = next((r for r in case if r["system"] == "rewriter"), None)
        lines += [row(cells(run, size, ours)) for run in case]
    return "\n".join([*lines, "", *sorted({f"Measured on {setup(run)}." for run in runs})])


def cells(run: dict, size: tuple[int, ...], ours: dict | None) -> tuple[str, ...]:
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


def insert(document: str, table: str) -> str:
    """``document`` with ``table`` between its two markers.

    Raises:
        ValueError: the markers are missing, or there are several of one.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"table: {README.name} must hold {BEGIN} and {END} once each.")
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    runs = load(HERE / "results")
    if not runs:
        raise SystemExit(f"table: no end_to_end_*.json in {HERE / 'results'}; run end_to_end.py first.")
    table = markdown(runs)
    print(table)
    README.write_text(insert(README.read_text(), table))


if __name__ == "__main__":
    main()
