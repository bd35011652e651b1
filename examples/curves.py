"""What a run leaves behind, and the table that sets several runs side by side."""

from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Curve:
    """The loss of each step, the seconds it took, and the processor's seconds, those of all threads."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def typical_seconds(self) -> float:
        return typical(self.seconds)


def typical(seconds: list[float]) -> float:
    """The median over the steps but the first, which compiles; of all steps where there is but one."""
    later = sorted(seconds[1:] or seconds)
    return later[len(later) // 2]


def comparison(runs: list[tuple[str, Curve]]) -> Table:
    """The steps that all runs have; after each loss, its difference from the first run's."""
    names, curves = zip(*runs, strict=True)
    table = Table(title="The first steps, from the same weights and batches")
    for column in ("step", *(f"{name} loss" for name in names), *(f"{name} s" for name in names)):
        table.add_column(column, justify="right")
    for step in range(min(len(curve.losses) for curve in curves)):
        first, *others = (curve.losses[step] for curve in curves)
        losses = [f"{first:.4f}", *(f"{loss:.4f} ({loss - first:+.0e})" for loss in others)]
        table.add_row(str(step + 1), *losses, *(f"{curve.seconds[step]:.2f}" for curve in curves))
    medians = (f"{curve.typical_seconds():.2f}" for curve in curves)
    table.add_row("typical", *[""] * len(runs), *medians, style="bold")
    table.caption = f"In brackets: less {names[0]}'s. Step 1 compiles. Typical: the median of all others."
    return table
