"""The graphs of a stage, before they are compiled: enough to know what it costs.

A row-wise stage runs in tiles of the sequence. Its backward computes again what it reads of its forward, or
reads what that saved: the results of its products, from which the rest is computed again. A whole stage runs
once, and saves what its backward reads; where the two cannot be parted, it computes again too.
"""

from collections.abc import Container, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from sympy import Symbol
from torch import SymInt, Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from rewriter.gate_gradients import join_gate_gradients
from rewriter.memory.before_tiles import Parted, parted
from rewriter.memory.fakes import StageFakes, memory_order
from rewriter.memory.in_place import add_in_place_again
from rewriter.memory.joint import (
    Inseparable,
    Saved,
    Signature,
    backward_graph,
    forward_graph,
    partitioned_graphs,
    signature_of,
)
from rewriter.memory.long_attention import HeadsAtOnce, attend_by_groups, heads_at_once
from rewriter.memory.randomness import draws
from rewriter.memory.stages import Stage
from rewriter.norm_rooms import leave_rooms


class Unstaged(Exception):
    """Why a layer cannot be run in stages: a reason for the report, not a failure."""


@dataclass(frozen=True)
class Rows:
    """Where a tensor counts tokens: ``dim`` has ``times`` as many as there are, a batch of rows flattened."""

    dim: int
    times: int = 1

    def narrowed(self, value: Tensor, start: int, length: int) -> Tensor:
        """The tile of ``length`` tokens from ``start``; of a flattened batch, tile after tile."""
        return value.narrow(self.dim, start * self.times, length * self.times)

    def tokens(self, value: Tensor) -> int:
        return value.shape[self.dim] // self.times


def _once(dim: int | None) -> Rows | None:
    return None if dim is None else Rows(dim)


@dataclass(frozen=True, eq=False)
class StageGraphs:
    """One stage traced.

    Attributes:
        stage: what was traced.
        fakes: the mode and the symbols of the tensors in the graphs.
        signature: what it takes and gives.
        forward, backward: without autograd; ``backward`` is None where no input needs a gradient.
        saved: what ``backward`` reads beside gradients; None where it reads the stage's inputs alone.
        orders: memory order of each input, to which it is brought; None where it is no tensor.
    """

    stage: Stage
    fakes: StageFakes
    signature: Signature
    forward: GraphModule
    backward: GraphModule | None
    saved: Saved | None

    @cached_property
    def forward_rows(self) -> tuple[Rows | None, ...]:
        """Of each result, and of what is saved beside them: where it counts tokens."""
        extras = self.results[len(self.signature.results) :]
        return (*map(_once, self.stage.rows_out), *map(self._rows, extras))

    @cached_property
    def read_rows(self) -> tuple[Rows | None, ...]:
        """The same of what ``backward`` reads beside gradients."""
        if self.saved is None:
            return tuple(map(_once, self.stage.rows_in))
        inputs = (_once(self.stage.rows_in[i]) for i in self.saved.inputs)
        results = (_once(self.stage.rows_out[i]) for i in self.saved.results)
        return (*inputs, *results, *self.forward_rows[len(self.signature.results) :])

    @cached_property
    def forward_parted(self) -> Parted | None:
        """``forward`` with what its tiles read alike apart; None of a whole stage, or without any."""
        if not self.stage.row_wise:
            return None
        return parted(self.forward, [dim is not None for dim in self.stage.rows_in])

    @cached_property
    def backward_parted(self) -> Parted | None:
        """The same of ``backward``."""
        if not self.stage.row_wise or self.backward is None:
            return None
        tangents = [True] * len(self.signature.tangents)
        return parted(self.backward, [*(rows is not None for rows in self.read_rows), *tangents])

    @cached_property
    def backward_with_heads_at_once(self) -> HeadsAtOnce | None:
        """``backward`` with its attention in one, where it goes by groups of heads."""
        return None if self.backward is None else heads_at_once(self.backward)

    @property
    def saves_tiles(self) -> bool:
        """Whether each thing that a row-wise stage saves is a tile of something, or has no tokens."""
        if not self.stage.row_wise:
            return True
        tokens = self.fakes.tokens.node.expr
        extras = [x for x in self.results[len(self.signature.results) :] if self._rows(x) is None]
        sizes = [s for x in extras if isinstance(x, Tensor) for s in x.shape if isinstance(s, SymInt)]
        return all(tokens not in s.node.expr.free_symbols for s in sizes)

    def _rows(self, value: Any) -> Rows | None:
        if not self.stage.row_wise or not isinstance(value, Tensor):
            return None
        tokens = self.fakes.tokens.node.expr
        for dim, size in enumerate(value.shape):
            times = size.node.expr / tokens if isinstance(size, SymInt) else None
            if times is not None and times.is_Integer:
                return Rows(dim, int(times))
        return None

    @cached_property
    def orders(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(memory_order(x) if isinstance(x, Tensor) else None for x in self.signature.inputs)

    @cached_property
    def result_orders(self) -> tuple[tuple[int, ...], ...]:
        """The same of each result, and of what is saved beside them; nothing of what is no tensor."""
        return tuple(memory_order(x) if isinstance(x, Tensor) else () for x in self.results)

    @cached_property
    def draws(self) -> bool:
        """Whether a run draws random numbers."""
        return bool(draws(self.forward))

    @property
    def draws_again(self) -> bool:
        """Whether the backward draws what the forward did, or nothing where it reads what was saved."""
        if self.backward is None:
            return True
        return draws(self.backward) == (draws(self.forward) if self.saved is None else [])

    def forward_inputs(self) -> list[Any]:
        """Fake inputs of ``forward``."""
        return list(self.signature.inputs)

    def backward_inputs(self) -> list[Any]:
        """Fake inputs of ``backward``."""
        tangents = self.signature.tangents
        if self.saved is None:
            return [*self.signature.inputs, *tangents]
        inputs = [self.signature.inputs[i] for i in self.saved.inputs]
        results = [self.signature.results[i] for i in self.saved.results]
        extras = self.results[len(self.signature.results) :]
        # A part of a product of several is packed before it is saved.
        extras = [self.fakes.packed(x) if isinstance(x, Tensor) else x for x in extras]
        return [*inputs, *results, *extras, *tangents]

    @property
    def results(self) -> Sequence[Any]:
        """Fake results, and after them fakes of what is saved of the inside."""
        (output,) = self.forward.graph.find_nodes(op="output")
        return [n.meta["val"] if hasattr(n, "meta") else n for n in output.args[0]]


def stage_graphs(
    stage: Stage,
    inputs: Sequence[Any],
    needs: Sequence[bool],
    longest_tile: int,
    *,
    saving: bool = False,
    silent: Container[str] = (),
    rows: Set[Symbol] = frozenset(),
) -> StageGraphs:
    """Trace ``stage``.

    Args:
        inputs: another mode's fake tensors and sizes, one an input of the stage.
        needs: of each, whether its gradient is wanted.
        saving: a row-wise stage saves the results of its products, too.
        silent: names of results that get no gradient, though they could have one.
        rows: of the symbols of ``inputs``, those that count sequences.

    Raises:
        Unstaged: it draws random numbers, and its backward would draw others.
    """
    fakes = StageFakes(longest_tile, rows)
    module = stage.module
    with tracing(TracingContext(fakes.mode)), torch.no_grad():
        values = [fakes.like(x, dim) for x, dim in zip(inputs, stage.rows_in, strict=True)]
        with fakes.mode:
            signature = signature_of(module, values, needs)
            flags = zip(stage.outputs, signature.differentiable, strict=True)
            signature = replace(
                signature, differentiable=tuple(has and n.name not in silent for n, has in flags)
            )
            graphs = _traced(module, signature, saving or not stage.row_wise)
    made = StageGraphs(stage, fakes, signature, *graphs)
    if saving and stage.row_wise and not (made.saves_tiles and made.draws_again):
        return stage_graphs(stage, inputs, needs, longest_tile, silent=silent, rows=rows)
    if not made.draws_again:
        raise Unstaged("its backward would draw other random numbers than its forward")
    return made


def _traced(
    module: GraphModule, signature: Signature, saving: bool
) -> tuple[GraphModule, GraphModule | None, Saved | None]:
    if not any(signature.needs) or not any(signature.differentiable):
        return _with_rooms(forward_graph(module, signature)), None, None
    if saving:
        try:
            forward, backward, saved = partitioned_graphs(module, signature)
        except Inseparable:
            pass
        else:
            attend_by_groups(backward)
            join_gate_gradients(backward.graph, functional=False)
            for graph in (forward, backward):
                add_in_place_again(graph)
            return _with_rooms(forward), _with_rooms(backward), saved
    backward = backward_graph(module, signature)
    join_gate_gradients(backward.graph, functional=False)
    return _with_rooms(forward_graph(module, signature)), _with_rooms(backward), None


def _with_rooms(graph: GraphModule) -> GraphModule:
    """Here, as gates are joined, and not when Inductor compiles: what a stage costs is read off its graph."""
    leave_rooms(graph.graph, functional=False)
    graph.recompile()
    return graph
