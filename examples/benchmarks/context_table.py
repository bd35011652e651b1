"""Writes what ``context.py`` measured into the README, between two markers.

    python examples/benchmarks/context_table.py

Reads ``results/context_*.json`` beside this file and prints the table too. What was foreseen stands beside
what was measured: the plan's peak, made before the first step. Under it, what a token takes: how much the
peaks of three cards' longest rows grow from one to the next.
"""

import json
from statistics import linear_regression

from models import SHAPES, Case
from peers import SYSTEMS
from results import FOLDER, layers
from table import README, insert, machines, row

HEAD = (
    "card, GiB", "case", "system", "s a step", "tokens/s",
    "peak GiB", "foreseen", "reserved", "host GiB",
)  # fmt: skip

# Cards that 8B's longest rows fill while host memory has room: layers run alike on all of them.
ALIKE = (12, 16, 24)
FIRST = "\\* The only step, with its compilation."


def markdown(runs: list[dict]) -> str:
    lines = [row(HEAD), row("---" for _ in HEAD)]
    lines += [row(cells(run)) for run in sorted(runs, key=place)]
    first = [] if all(run["seconds"] for run in runs) else [FIRST, ""]
    return "\n".join([*lines, "", *first, *a_token(runs), *machines(runs)])


def a_token(runs: list[dict]) -> list[str]:
    """A sentence on the slope of peak and host memory over tokens; none where a card has no row."""
    own = [run for run in runs if run["plan"] and of_8b(Case.parse(run["case"]))]
    longest = [
        max((run for run in own if run["card_gib"] == card), key=lambda run: run["tokens"], default=None)
        for card in ALIKE
    ]
    rows = [run for run in longest if run]
    if len(rows) < len(ALIKE):
        return []
    tokens = [run["tokens"] for run in rows]
    hidden = 2 * SHAPES["8b"][0] / 2**30
    device, host = (
        linear_regression(tokens, gib).slope / hidden
        for gib in ([run["peak_gib"] for run in rows], [run["plan"]["host_gib"] for run in rows])
    )
    lengths = f"{', '.join(f'{n:,}' for n in tokens[:-1])} and {tokens[-1]:,}"
    takes = f"{device:.1f} hidden states of bf16 on the device, and {host:.1f} in host memory"
    return [
        f"By the slope over {lengths} tokens, a token takes {takes}.",
        "",
    ]


def of_8b(case: Case) -> bool:
    """Whether it is one row of tokens of all of the model."""
    return (case.shape, case.layers, case.rows) == ("8b", 32, 1)


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
