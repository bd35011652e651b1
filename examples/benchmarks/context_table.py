"""Writes what ``context.py`` measured into the README, between two markers.

    python examples/benchmarks/context_table.py

Reads ``results/context_*.json`` beside this file and prints the table too. What was foreseen stands beside
what was measured: the plan's peak, made before the first step.
"""

import json

from models import Case
from peers import SYSTEMS
from results import FOLDER, layers
from table import README, insert, machines, row

HEAD = (
    "card, GiB", "case", "system", "s a step", "tokens/s",
    "peak GiB", "foreseen", "reserved", "host GiB",
)  # fmt: skip

FIRST = "\\* The only step, with its compilation."


def markdown(runs: list[dict]) -> str:
    lines = [row(HEAD), row("---" for _ in HEAD)]
    lines += [row(cells(run)) for run in sorted(runs, key=place)]
    first = [] if all(run["seconds"] for run in runs) else [FIRST, ""]
    return "\n".join([*lines, "", *first, *machines(runs)])


def place(run: dict) -> tuple:
    case = Case.parse(run["case"])
    return (
        case.shape != "8b",
        -case.layers,
        run["card_gib"] or float("inf"),
        case.tokens,
        run["system"] != "rewriter",
    )


def cells(run: dict) -> tuple[str, ...]:
    case, plan = Case.parse(run["case"]), run["plan"]
    return (
        f"{run['card_gib']:g}" if run["card_gib"] else "–",
        f"{layers(case)}, {case.rows} × {case.tokens[1]:,}",
        SYSTEMS[run["system"]],
        f"{min(run['seconds']):.2f}" if run["seconds"] else f"{run['first_step_s']:.0f} *",
        f"{run['tokens_per_s']:,.0f}",
        f"{run['peak_gib']:.2f}",
        f"{plan['peak_gib']:.2f}" if plan else "–",
        f"{run['reserved_gib']:.2f}",
        f"{plan['host_gib']:.1f}" if plan else "–",
    )


def main() -> None:
    runs = [json.loads(path.read_text()) for path in FOLDER.glob("context_*.json")]
    text = markdown(runs)
    print(text)
    README.write_text(insert(README.read_text(), "contexts", text))


if __name__ == "__main__":
    main()
