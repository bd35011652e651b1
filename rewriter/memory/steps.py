"""A layer under a plan as text: what runs, what leaves the device and what comes back, in order.

It is the schedule that runs (``layer.py``), written as code with the names of the region's own graph. What a
stage saves for its own backward has one name, with their number; what is let go is left out.

    def forward(hidden, weights):
        offload(hidden)
        query, key, value = stage_1(hidden)  # in tiles of 8,192 tokens
        attention, saved_2[1] = causal_attention(query, key, value)
        ...

    def backward(gradients):
        ...
        hidden = reload()
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from rewriter.memory.choices import StagedChoice
from rewriter.memory.layer_graphs import LayerGraphs
from rewriter.memory.schedule import Step

_SAVED = re.compile(r"(saved_\d+)_\d+")


def steps_of(way: StagedChoice) -> str:
    """The forward and the backward of a layer that runs so; nothing where it runs as without a plan."""
    layer, plan = way.layer, way.schedule
    if layer is None or plan is None:
        return ""
    lines = [
        f"def forward({', '.join([*layer.own_inputs, 'weights'])}):",
        *_lines(way, layer, plan.forward),
        f"    return {', '.join(layer.wiring.outputs)}",
        "",
        "def backward(gradients):",
        *_lines(way, layer, plan.backward),
        "    return gradients",
    ]
    return "\n".join(lines)


def _lines(way: StagedChoice, layer: LayerGraphs, steps: Sequence[Step]) -> Iterator[str]:
    stages, titles = layer.values(), layer.titles
    shown = [step for step in steps if step.kind != "free"]

    def moved_like(step: Step) -> tuple:
        return step.kind, step.stage, step.value in way.in_tiles

    for (kind, index, by_tile), group in itertools.groupby(shown, moved_like):
        values, note = _names(step.value for step in group), "  # tile by tile" if by_tile else ""
        if kind == "offload":
            yield f"    offload({values}){note}"
            continue
        if kind == "reload":
            yield f"    {values} = reload(){note}"
            continue
        stage, title, row_wise = stages[index], titles[index], layer.graphs[index].stage.row_wise
        note, once = "", (kind, index) in way.once
        if way.tile and row_wise:
            note = f"  # in tiles of {way.tile:,} tokens" + (", weights made once" if once else "")
        elif once:
            note = "  # all heads at once"
        if kind == "run":
            yield f"    {_names(stage.gives)} = {title}({_names(stage.reads)}){note}"
        else:
            yield f"    gradients = {title}.backward({_names((*stage.backward_reads, 'gradients'))}){note}"


def _names(values: Iterable[str]) -> str:
    """With commas; of those that one stage saved, how many."""
    names: list[str] = []
    for name, group in itertools.groupby(values, lambda n: m[1] if (m := _SAVED.fullmatch(n)) else n):
        count = len(list(group))
        names.append(f"{name}[{count}]" if name.startswith("saved_") else name)
    return ", ".join(names)
