"""A head's weight from host memory, copied to the device while the part before the head's runs.

    x = layer(x, ...)                        head_ahead(weight)
    loss = head(x, weight, labels)    ->     x = layer(x, ...)
                                             loss = head(x, weight, labels)

The head would wait for all of the copy, 19 ms of an 8B Llama at 55 GB/s, which so runs beside a layer of a
long sequence. It takes its room a part earlier: where a plan leaves that much free at that moment, or would
if this part made its weights in every tile, or in shorter ones, and that costs less than the copy; elsewhere
the head waits, as it does without a plan. The planner compares plans by seconds in which the head waits,
which is as long in all of them; those of the plan that it chose are then without what passes beside the part
before.

Not done where everything is kept: a step that fits so is short, and a layer of it hides little of the copy
(of 8 layers of 8B at 4,096 tokens, whose step takes 72 ms, some 3 ms of 19).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import value_of
from rewriter.kernels.host_weight import COMING, host_weight
from rewriter.memory.costs import value_bytes
from rewriter.memory.durations import Rates
from rewriter.memory.in_host import HEAD_COMES
from rewriter.memory.made_once import made_once
from rewriter.memory.plan import Choice, MemoryPlan, seconds
from rewriter.memory.quicker import alike
from rewriter.memory.streams import InOrder, SideStreams, streams_of
from rewriter.regions.names import free_name
from rewriter.regions.program import Program, Region, RegionCall
from rewriter.size_text import size_text

if TYPE_CHECKING:
    from rewriter.memory.planned import PlannedProgram


class HeadAhead:
    """Begins the copy of a weight, for whoever asks for it next.

    Args:
        device: the one that computes.
        streams: its own; one is for the copy.
    """

    def __init__(self, device: torch.device, streams: SideStreams | InOrder):
        self.device, self._streams = device, streams
        self._begun: int | None = None

    def __call__(self, weight: Tensor) -> tuple[()]:
        # Where there is no memory, the head begins the copy, or the step ends.
        with suppress(torch.OutOfMemoryError):
            made = torch.empty_like(weight, device=self.device)
            compute, back = self._streams.compute(), self._streams.back
            # What was computed in this memory comes first.
            back.wait_stream(compute)
            with self._streams.on(back), torch.no_grad():
                made.copy_(weight, non_blocking=True)
            COMING[weight.data_ptr()] = made, functools.partial(self._wait, back.record_event())
            self._begun = weight.data_ptr()
        return ()

    def let_go(self) -> None:
        """Give up what nobody asked for, as of a step that failed."""
        left = None if self._begun is None else COMING.pop(self._begun, None)
        if left is not None:
            left[1]()

    def _wait(self, arrived: Any) -> None:
        self._streams.compute().wait_event(arrived)


@made_once
def head_ahead_on(device: str) -> HeadAhead:
    """The process's own for ``device``."""
    return HeadAhead(torch.device(device), streams_of(torch.device(device)))


@dataclass(frozen=True, eq=False)
class HeadBegun:
    """``region``, which is not compiled: what is called for it, with the weight, begins its copy.

    Attributes:
        taken: bytes of the copy, by the part of the plan in whose forward it begins.
    """

    region: Region
    device: torch.device
    taken: Mapping[int, int]

    @property
    def copier(self) -> HeadAhead:
        return head_ahead_on(str(self.device))

    def within(self, run: Callable) -> Callable:
        """``run``, a program with such calls, behind which no copy is left, however it ends."""
        copier = self.copier

        def program(*inputs: Any) -> Any:
            try:
                return run(*inputs)
            finally:
                copier.let_go()

        return program


@dataclass(frozen=True)
class HeadInHost:
    """A call that reads a weight from host memory at its own moment: its ``place``, and the input."""

    place: int
    weight: Node

    @property
    def nbytes(self) -> int:
        return value_bytes(value_of(self.weight))


def head_in_host(calls: Sequence[RegionCall], is_away: Callable[[Tensor], bool]) -> HeadInHost | None:
    """The first such call of a program's; ``is_away`` says which weights are in host memory."""
    for place, call in enumerate(calls):
        given = dict(zip(call.region.module.graph.find_nodes(op="placeholder"), call.inputs, strict=True))
        for node in call.region.module.graph.find_nodes(op="call_function", target=host_weight):
            weight = given.get(node.args[1])
            if weight is not None and is_away(value_of(weight)):
                return HeadInHost(place, weight)
    return None


def _is_away(weight: Tensor, device: torch.device) -> bool:
    return weight.device.type != device.type


def head_away(program: Program, device: torch.device) -> HeadInHost | None:
    """The first such call of ``program``, which ``device`` computes."""
    return head_in_host(program.calls, lambda weight: _is_away(weight, device))


def begun_ahead(plan: MemoryPlan, head: HeadInHost, rates: Rates) -> MemoryPlan | None:
    """``plan`` where the copy begins with the part before the head's, which may take another form for it.

    The fastest of its forms (``quicker.py``) that leave the copy its room; None where all leave it none, or
    are slower than a head that waits.
    """
    before = head.place - 1
    if before < 0:
        return None
    choices, part = plan.choices, plan.problem.parts[before]
    forms = (form for other in alike(part, choices[before]) for form in (other, *other.quicker))
    plans = (replace(plan, choices=(*choices[:before], form, *choices[head.place :])) for form in forms)
    most = max(plan.limit, plan.peak)
    begun = [
        replace(p, hidden=_hidden(p.choices, head, rates))
        for p in plans
        if p.peak <= most and head.nbytes <= _room(p, before)
    ]
    found = min((*begun, plan), key=lambda p: p.foreseen_seconds)
    return None if found is plan else found


def _hidden(choices: Sequence[Choice], head: HeadInHost, rates: Rates) -> float:
    """Seconds that a step takes less where the head does not wait; it may have to for the part before."""
    copy = min(head.nbytes / rates.to_device, choices[head.place - 1].forward_seconds)
    reader = choices[head.place]
    sooner = replace(reader, forward_seconds=max(reader.forward_seconds - copy, 0.0))
    return seconds(choices) - seconds((*choices[: head.place], sooner, *choices[head.place + 1 :]))


def with_head_waiting(planned: "PlannedProgram", head: HeadInHost) -> "PlannedProgram":
    """``planned``, whose notes say that the head waits."""
    size = size_text(head.nbytes)
    note = f"{HEAD_COMES} {size} come from host memory before the loss, which waits for them"
    return replace(planned, notes=(*planned.notes, note))


def with_head_ahead(planned: "PlannedProgram", head: HeadInHost, device: torch.device) -> "PlannedProgram":
    """``planned``, of a plan by ``begun_ahead``, with the copy begun a call before its reader; and a note."""
    program, before = planned.program, head.place - 1
    note = (
        f"{HEAD_COMES} {size_text(head.nbytes)} come from host memory while the last "
        f"{program.calls[before].region.name} runs, and are let go after the loss"
    )
    region = _beginning(program, head.weight)
    call = RegionCall(region, (head.weight,), ())
    program = replace(program, calls=(*program.calls[:before], call, *program.calls[before:]))
    begun = HeadBegun(region, device, {before: head.nbytes})
    return replace(planned, program=program, notes=(*planned.notes, note), head=begun)


def _room(plan: MemoryPlan, part: int) -> int:
    """What a plan leaves free of its budget in the forward of a part."""
    return plan.limit - plan.moments[part].device


def _beginning(program: Program, weight: Node) -> Region:
    """A region that computes nothing: what is called for it begins the copy."""
    graph = Graph()
    graph.placeholder("weight")
    graph.output(())
    taken = {n.name for n in program.source.graph.nodes} | {region.name for region in program.regions}
    return Region(free_name("head_ahead", taken), GraphModule(torch.nn.Module(), graph), (value_of(weight),))
