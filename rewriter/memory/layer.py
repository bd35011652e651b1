"""A layer that runs by a schedule: one autograd function around its stages.

What its backward reads is kept, sent to host memory or computed again, as ``schedule.py`` lists it. Gradients
are those of the layer run as one: stages are cut where values are made, and nothing is approximated.

A kept activation is given up as soon as the backward has read it, so that there is one backward a forward:
``retain_graph=True`` and second derivatives are refused.

A backward that fails gives back what its forward sent to host memory, though somebody keeps the exception and
with it the frames. (Where a region that runs as without a plan fails in the backward, nobody here is told:
that memory comes back once the exception and the step's results are gone.)
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.memory.groups import Group
from rewriter.memory.randomness import device_of, random_state, replaying
from rewriter.memory.schedule import Schedule, Wiring
from rewriter.memory.stage_run import StageRun, Tiles
from rewriter.memory.transfer import Transfers


@dataclass(frozen=True, eq=False)
class LayerStages:
    """What a layer consists of, however it is scheduled: compiled stages, and what passes between them."""

    runs: tuple[StageRun, ...]
    wiring: Wiring

    def run(
        self,
        index: int,
        here: dict[str, Any],
        tile: int | None,
        sinks: Mapping[str, Callable[[Tensor], Any]] | None = None,
    ) -> None:
        """Run stage ``index`` on the values that are ``here``, and put its results there, or in ``sinks``."""
        inputs = [here[name] for name in self.wiring.takes[index]]
        gives, sinks = self.wiring.gives[index], sinks or {}
        with self.drawing(index, inputs, here):
            taken = {i: sinks[name] for i, name in enumerate(gives) if name in sinks}
            results = self.runs[index].run(inputs, tile, taken)
        here.update(zip(gives, results, strict=True))

    def drawing(self, index: int, values: Sequence[Any], here: dict[str, Any]) -> AbstractContextManager:
        """Random numbers for stage ``index``: new ones the first time, noted ``here``, then the same."""
        if not self.runs[index].graphs.draws:
            return nullcontext()
        name, device = _state_of(index), device_of(values)
        if name in here:
            return replaying(here[name], device)
        here[name] = random_state(device)
        return nullcontext()


@dataclass(frozen=True, eq=False)
class ScheduledLayer:
    """A layer under one choice; called as the region that it stands for.

    Attributes:
        stages: compiled, shared by all choices of a class.
        schedule: what happens to each value.
        tile: tokens a tile; None for the whole sequence at once.
        shared: names of inputs that live anyway: weights, and what all layers read.
        transfers: to host memory and back.
        owns_gradient: whether nobody else reads the gradients that the layer is given.
        in_tiles: of what is offloaded, what leaves and returns tile by tile.
        window: bytes that are set aside for copies under way, as ``Transfers.group`` says.
        ahead: names of the weights that come from host memory while the layer before runs.
    """

    stages: LayerStages
    schedule: Schedule
    tile: int | None
    shared: frozenset[str]
    transfers: Callable[[], Transfers]
    owns_gradient: bool
    in_tiles: frozenset[str] = frozenset()
    window: int = 0
    ahead: tuple[str, ...] = ()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return _Layer.apply(self, *inputs)
        return self.forward(inputs, transfers=None)[0]

    def forward(
        self, inputs: Sequence[Any], transfers: Transfers | None
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The results; what is left on the device; tickets of what is not. Without ``transfers``: nothing."""
        here = dict(zip(self.stages.wiring.inputs, inputs, strict=True))
        tickets: dict[str, Any] = {}
        sinks: dict[str, Callable[[Tensor], Any]] = {}
        for name in self.in_tiles:
            tickets[name] = []
            sinks[name] = functools.partial(_send, transfers, tickets[name])
        with self._weights(here, returns=transfers is not None):
            for step in self.schedule.forward:
                if step.kind == "run":
                    self.stages.run(step.stage, here, self.tile, sinks)
                elif step.kind == "offload" and transfers is not None and step.value not in sinks:
                    tickets[step.value] = transfers.offload(here[step.value])
                elif step.kind == "free":
                    del here[step.value]
        results = tuple(here[name] for name in self.stages.wiring.outputs)
        states = [n for n in map(_state_of, range(len(self.stages.runs))) if n in here]
        kept = {name: here[name] for name in (*self.schedule.kept, *states)} if transfers is not None else {}
        # Autograd makes the results the layer's own: what the layer keeps of them must not hold the layer.
        kept |= {name: here[name].detach() for name in self.stages.wiring.outputs if name in kept}
        return results, kept, tickets

    def backward(
        self,
        here: dict[str, Any],
        tickets: dict[str, Any],
        gradients: dict[str, Tensor],
        transfers: Transfers,
        group: Group,
    ) -> dict[str, Tensor | None]:
        """Gradients of the layer's inputs by name; ``here``, ``tickets`` and ``gradients`` are used up."""
        given = set(gradients)
        # One bus brings all, in the order of need: the weights of the layer below stand between.
        transfers.begin_own(group)
        lent = _sharing(gradients) if self.owns_gradient else given
        with self._weights(here, backward=True):
            transfers.begin_backward(group)
            for step in self.schedule.backward:
                if step.kind == "run":
                    self.stages.run(step.stage, here, self.tile)
                elif step.kind == "reload":
                    ticket = tickets.pop(step.value)
                    whole = step.value not in self.in_tiles
                    here[step.value] = transfers.reload(ticket) if whole else Tiles(ticket, transfers.reload)
                elif step.kind == "backward":
                    self._backward_of(step.stage, here, gradients, given, lent)
                elif step.kind == "free":
                    del here[step.value]
        return {name: gradients.get(name) for name in self.stages.wiring.inputs}

    def _weights(
        self, here: dict[str, Any], *, backward: bool = False, returns: bool = False
    ) -> AbstractContextManager:
        if not self.ahead:
            return nullcontext()
        return self.transfers().weights.on_device(here, self.ahead, backward=backward, returns=returns)

    def in_order_of_need(self, tickets: Mapping[str, Any]) -> list[Any]:
        """``tickets`` as the backward comes to them: those of tiles, tile after tile."""
        order: list[Any] = []
        tiled: list[Any] = []
        for step in self.schedule.backward:
            if step.kind == "reload" and step.value in self.in_tiles:
                tiled.append(tickets[step.value])
            elif step.kind == "reload":
                order.append(tickets[step.value])
            elif step.kind == "backward" and tiled:
                order += [ticket for tile in zip(*tiled, strict=True) for ticket in tile]
                tiled = []
        return order

    def _backward_of(
        self,
        index: int,
        here: dict[str, Any],
        gradients: dict[str, Tensor],
        given: set[str],
        lent: set[str],
    ) -> None:
        run, takes = self.stages.runs[index], self.stages.wiring.takes[index]
        signature = run.graphs.signature
        if run.backward is None:
            return
        roots = [
            n
            for n, has in zip(self.stages.wiring.gives[index], signature.differentiable, strict=False)
            if has
        ]
        leaves = [n for n, need in zip(takes, signature.needs, strict=True) if need]
        for name in given.intersection(leaves):
            # It is added to, and others may read it.
            gradients[name] = gradients[name].clone()
        given.difference_update(leaves)
        lent.difference_update(leaves)
        read = [here[name] for name in self.stages.wiring.reads_back[index]]
        tangents = [gradients.pop(name) for name in roots]
        ours = [name not in lent for name in roots]
        with self.stages.drawing(index, tangents, here):
            found = run.run_backward(read, tangents, self.tile, [gradients.get(n) for n in leaves], ours)
        gradients.update((n, g) for n, g in zip(leaves, found, strict=True) if g is not None)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: ScheduledLayer, *inputs: Any) -> tuple[Any, ...]:
        transfers = layer.transfers()
        with transfers.group(layer.window) as ctx.group:
            results, kept, ctx.tickets = layer.forward(inputs, transfers)
            ctx.group.will_need(layer.in_order_of_need(ctx.tickets))
        names = layer.stages.wiring.inputs
        shared = [x if n in layer.shared else None for n, x in zip(names, inputs, strict=True)]
        ctx.numbers = {
            n: x for n, x in zip(names, shared, strict=True) if x is not None and not isinstance(x, Tensor)
        }
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in shared))
        ctx.layer, ctx.kept = layer, kept
        flags = [name in layer.stages.wiring.differentiable for name in layer.stages.wiring.outputs]
        ctx.mark_non_differentiable(
            *(r for r, has in zip(results, flags, strict=True) if not has and isinstance(r, Tensor))
        )
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        return results

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        layer: ScheduledLayer = ctx.layer
        if torch.is_grad_enabled():
            raise RuntimeError(
                "rewriter: create_graph=True through a layer that runs in stages; second derivatives need a "
                "run without memory_budget"
            )
        if ctx.kept is None:
            raise RuntimeError(
                "rewriter: a second backward through a layer whose activations were given up in the first; "
                "retain_graph=True needs a run without memory_budget"
            )
        here, ctx.kept = ctx.kept, None
        names, transfers = layer.stages.wiring.inputs, layer.transfers()
        try:
            here |= {n: x for n, x in zip(names, ctx.saved_tensors, strict=True) if x is not None}
            here |= ctx.numbers
            results = zip(layer.stages.wiring.outputs, above, strict=True)
            gradients = {n: g for n, g in results if n in layer.stages.wiring.differentiable}
            found = layer.backward(here, ctx.tickets, gradients, transfers, ctx.group)
            wanted = zip(names, ctx.needs_input_grad[1:], ctx.dtypes, strict=True)
            return None, *(_as(found[name], dtype) if need else None for name, need, dtype in wanted)
        except BaseException:
            # No backward comes to the layers below again, whose tickets the exception's frames may keep.
            transfers.forget(ctx.group.forward)
            raise


def _send(transfers: Transfers | None, tickets: list[Any], tile: Tensor) -> None:
    if transfers is not None:
        tickets.append(transfers.offload(tile, tile=True))


def _state_of(index: int) -> str:
    """The name of the generator's state before stage ``index``, among the values of a layer."""
    return f"random state of stage {index + 1}"


def _sharing(gradients: dict[str, Tensor]) -> set[str]:
    """The names of those that lie in one piece of memory: a sum hands the same gradient to both its terms."""
    places = {name: g.untyped_storage().data_ptr() for name, g in gradients.items()}
    counts = Counter(places.values())
    return {name for name, place in places.items() if counts[place] > 1}


def _as(gradient: Tensor | None, dtype: Any) -> Tensor | None:
    return gradient if gradient is None else gradient.to(dtype)
