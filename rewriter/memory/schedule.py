"""The order of a layer's work: what runs, what leaves the device and what comes back, as plain steps.

A layer runs in stages. What the backward reads is *kept* on the device, *offloaded* to host memory, or
*recomputed* by running again the stage that made it; a value's ``fate`` says which. From the fates follow two
lists of steps, one for the forward and one for the backward, in which every value is let go after its last
use. The same lists are run (``layer.py``) and costed (``choices.py``).

Pure: stages and values are names, nothing here knows a tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fate = Literal["keep", "offload", "recompute"]


@dataclass(frozen=True)
class StageValues:
    """The values that a stage reads and gives, by name, without weights and what all layers share.

    Attributes:
        reads: made by an earlier stage, or the layer's own inputs.
        gives: results, and what its forward saves for its backward beside them.
        backward_reads: of both, what its backward reads.
        gradients: of ``reads``, those that get a gradient.
    """

    name: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    backward_reads: tuple[str, ...]
    gradients: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Wiring:
    """The values that pass between a layer's stages, by name.

    Attributes:
        takes: of each stage, all its inputs in order, weights included.
        gives: of each stage, all its results in order, and after them what it saves beside them.
        reads_back: of each stage, what its backward takes before the gradients.
        inputs, outputs: the layer's, in order.
        differentiable: of the outputs, those that have a gradient.
    """

    takes: tuple[tuple[str, ...], ...]
    gives: tuple[tuple[str, ...], ...]
    reads_back: tuple[tuple[str, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    differentiable: frozenset[str]


@dataclass(frozen=True)
class Step:
    """``run`` or ``backward`` of a stage, by its place; ``offload``, ``reload`` or ``free`` of a value."""

    kind: Literal["run", "backward", "offload", "reload", "free"]
    stage: int = -1
    value: str = ""


@dataclass(frozen=True)
class Schedule:
    """The steps of both directions, and what is left between them: on the device, and in host memory."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    kept: tuple[str, ...]
    offloaded: tuple[str, ...]


def schedule(
    stages: Sequence[StageValues], inputs: Sequence[str], outputs: Iterable[str], fates: Mapping[str, Fate]
) -> Schedule:
    """Steps of a layer whose values have ``fates``; a value without one is kept if it must be.

    A stage of which one value is recomputed runs again, and neither keeps nor offloads the others.

    Args:
        inputs: the values that the layer is given and that nobody reads after it.
        outputs: what it returns, alive while it runs.

    Raises:
        ValueError: an input is to be recomputed, which only the layer before could.
    """
    for value in inputs:
        if fates.get(value) == "recompute":
            raise ValueError(
                f"{value} is an input of the layer: keep or offload it, it cannot be recomputed here"
            )
    maker = {value: i for i, stage in enumerate(stages) for value in stage.gives}
    needed = _needed(stages, maker, fates)
    again = {maker[v] for v in needed if fates.get(v) == "recompute"}
    # A stage that runs again makes all of its values.
    waits = [v for v in (*inputs, *maker) if v in needed and maker.get(v) not in again]
    kept = tuple(v for v in waits if fates.get(v) != "offload")
    offloaded = tuple(v for v in waits if fates.get(v) == "offload")
    forward: list[Step] = [Step("offload", value=v) for v in inputs if v in offloaded]
    for index, stage in enumerate(stages):
        forward.append(Step("run", index))
        forward += [Step("offload", value=v) for v in stage.gives if v in offloaded]
    stays = {*kept, *outputs}
    return Schedule(
        tuple(_letting_go(forward, stages, [*inputs], stays)),
        tuple(_letting_go(_backward(stages, maker, kept, offloaded), stages, [*kept], set())),
        kept,
        offloaded,
    )


def _needed(stages: Sequence[StageValues], maker: Mapping[str, int], fates: Mapping[str, Fate]) -> set[str]:
    """What the backward reads, and what recomputing some of it reads in turn."""
    found: set[str] = set()
    waiting = [v for stage in stages for v in stage.backward_reads]
    while waiting:
        value = waiting.pop()
        if value in found:
            continue
        found.add(value)
        if fates.get(value) == "recompute":
            waiting += stages[maker[value]].reads
    return found


def _backward(
    stages: Sequence[StageValues], maker: Mapping[str, int], kept: Iterable[str], offloaded: Iterable[str]
) -> list[Step]:
    steps: list[Step] = []
    here, hosted = set(kept), set(offloaded)

    def bring(value: str) -> None:
        if value in here:
            return
        if value in hosted:
            steps.append(Step("reload", value=value))
            here.add(value)
            return
        stage = stages[maker[value]]
        for read in stage.reads:
            bring(read)
        steps.append(Step("run", maker[value]))
        here.update(stage.gives)

    for index in reversed(range(len(stages))):
        for value in stages[index].backward_reads:
            bring(value)
        steps.append(Step("backward", index))
    return steps


def _letting_go(
    steps: Sequence[Step], stages: Sequence[StageValues], here: Sequence[str], stays: set[str]
) -> list[Step]:
    """``steps`` with a ``free`` after the last use of each value that does not stay."""
    last: dict[str, int] = dict.fromkeys(here, -1)
    for place, step in enumerate(steps):
        for value in _touched(step, stages):
            last[value] = place
    dying: dict[int, list[str]] = {}
    for value, place in last.items():
        if value not in stays:
            dying.setdefault(place, []).append(value)
    result = [Step("free", value=v) for v in dying.get(-1, [])]
    for place, step in enumerate(steps):
        result.append(step)
        result += [Step("free", value=v) for v in dying.get(place, [])]
    return result


def _touched(step: Step, stages: Sequence[StageValues]) -> tuple[str, ...]:
    if step.kind == "run":
        return (*stages[step.stage].reads, *stages[step.stage].gives)
    if step.kind == "backward":
        return stages[step.stage].backward_reads
    return (step.value,)
