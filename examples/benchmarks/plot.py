"""Draws what ``end_to_end.py`` measured: time and memory, the systems side by side, for the README.

    pip install -e ".[plots]"
    python examples/benchmarks/plot.py

Reads ``results/end_to_end_*.json`` beside this file and writes ``docs/benchmarks.svg``. A case takes a row:
its bars are a step's median time and its peak memory, eager's and the peers' under the rewriter's.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from models import Case  # noqa: E402
from results import FOLDER, apart, load, name, ours, words  # noqa: E402

TARGET = Path(__file__).parents[2] / "docs/benchmarks.svg"
COLOURS = {
    "rewriter": "#1f5fbf",
    "unsloth": "#e08a2c",
    "liger": "#5f9e6e",
    "inductor": "#8d8fa3",
    "hf": "#c3c4cc",
}
LOOKS = {"font.size": 9, "svg.hashsalt": "rewriter", "figure.facecolor": "white", "axes.edgecolor": "#9a9a9a"}
BAR, SPACE, WIDTH = 0.23, 0.75, 9.5  # inches


def colour(run: dict) -> str:
    return next(c for start, c in COLOURS.items() if run["system"].startswith(start))


def bars(axes: Axes, runs: list[dict], values: list[float | None], form: str) -> None:
    """One bar a run from the top down, with its value at the end; checkpointing systems are hatched."""
    most = max((v for v in values if v is not None), default=1.0) or 1.0
    for place, (run, value) in enumerate(zip(runs, values, strict=True)):
        if value is None:
            continue
        hatch = "////" if run["system"].endswith("_gc") else None
        axes.barh(place, value, color=colour(run), height=0.78, hatch=hatch, edgecolor="white", linewidth=0)
        weight = "bold" if run["system"] == "rewriter" else "normal"
        axes.text(value + 0.012 * most, place, format(value, form), va="center", fontweight=weight)
    axes.set_xlim(0, 1.14 * most)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)


def draw(cases: dict[Case, list[dict]], target: Path) -> None:
    """The picture of all cases, to ``target``."""
    heights = [len(runs) * BAR + SPACE for runs in cases.values()]
    with plt.rc_context(LOOKS):
        figure, grid = plt.subplots(
            len(cases),
            2,
            figsize=(WIDTH, sum(heights)),
            squeeze=False,
            gridspec_kw={"height_ratios": [len(runs) for runs in cases.values()]},
            layout="constrained",
        )
        for (time, memory), (case, runs) in zip(grid, cases.items(), strict=True):
            bars(time, runs, [run["median_ms"] for run in runs], ".0f")
            bars(memory, runs, [run["peak_gib"] for run in runs], ".1f")
            time.set_title(words(case), loc="left", fontweight="bold", fontsize=10)
            labels = [name(r).replace("`", "") + (" †" if apart(r, ours(runs)) else "") for r in runs]
            time.set_yticks(range(len(runs)), labels)
            time.tick_params(axis="y", length=0)
        grid[0][0].annotate("ms a step", (1, 1), xycoords="axes fraction", ha="right", va="bottom")
        grid[0][1].annotate("peak GiB", (1, 1), xycoords="axes fraction", ha="right", va="bottom")
        figure.savefig(target, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    cases = load(arguments.results)
    if not cases:
        raise SystemExit(f"plot: no end_to_end_*.json in {arguments.results}; run end_to_end.py first.")
    draw(cases, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
