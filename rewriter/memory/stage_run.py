"""Runs one compiled stage, forward and backward, whole or in tiles of the sequence.

In tiles, a row-wise stage needs memory for its inside for ``tile`` tokens instead of for all: gate, up and
their gradients of an MLP of 14336 channels are 3.5 GiB of bf16 at 32,768 tokens. Results are the same
numbers: tokens do not meet in such a stage. Gradients of weights are sums over tiles; they are taken in fp32,
and rounded once at the end. What the stage saves for its own backward can leave the device tile by tile and
come back so (``Tiles``): then it is never there as a whole.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rewriter.memory.before_tiles import begun
from rewriter.memory.fakes import dense_strides, densely, memory_order
from rewriter.memory.operations import int_hint
from rewriter.memory.stage_graphs import Rows, StageGraphs


class Tiles:
    """A value that is elsewhere in tiles, each of which ``bring`` has back, first to last."""

    def __init__(self, tickets: Sequence[Any], bring: Callable[[Any], Tensor]):
        self._tickets, self._bring = iter(tickets), bring

    def next(self) -> Tensor:
        """The next tile, each once."""
        return self._bring(next(self._tickets))


def tile_length(tokens: int, most: int) -> int:
    """Of tiles that are at most ``most`` tokens long and as few as that allows: nearly equal ones.

    Weights are read once a tile, and often dequantised: a short last one would cost as much as a long one.
    """
    count = -(-tokens // most)
    return min(most, -(-tokens // count // _ALIGNED) * _ALIGNED)


# Rows of a product's tile on a GPU.
_ALIGNED = 128


@dataclass(frozen=True, eq=False)
class StageRun:
    """A stage whose graphs are compiled.

    Attributes:
        forward: inputs to results, and what is saved of the inside.
        backward: inputs (or what is saved) and gradients of results to those of inputs, if some are needed.
    """

    graphs: StageGraphs
    forward: Callable
    backward: Callable | None

    def run(
        self,
        inputs: Sequence[Any],
        tile: int | None,
        sinks: Mapping[int, Callable[[Tensor], Any]] | None = None,
    ) -> list[Any]:
        """The results and, of a whole stage, what its backward reads beside them.

        Args:
            tile: tokens a tile, at most; None or enough for all: one run.
            sinks: by the place of a result, who takes its tiles; None is returned in its place.
        """
        values, sinks = self._laid_out(inputs), sinks or {}
        tokens = _tokens(values, self._rows_in)
        tile = self._at_most(tile, _widths(values, self._rows_in), self._widths_in)
        if tokens is None or tokens <= tile:
            results = self._packed(self.forward(*values))
            for i, sink in sinks.items():
                sink(results[i])
                results[i] = None
            return results
        tile = tile_length(tokens, tile)
        wholes: list[Any] = []
        forward = begun(self.forward, values)
        for start in range(0, tokens, tile):
            length = min(tile, tokens - start)
            # No tile's results are held while the next one runs.
            self._place(
                self._packed(forward(*_sliced(values, self._rows_in, start, length))),
                wholes,
                (start, length, tokens),
                sinks,
            )
        return wholes

    def _place(
        self,
        results: Sequence[Any],
        wholes: list[Any],
        where: tuple[int, int, int],
        sinks: Mapping[int, Callable[[Tensor], Any]],
    ) -> None:
        """A tile's ``results`` into ``wholes``, which the first makes; ``where``: start, length, of all."""
        start, length, tokens = where
        for i, (result, rows) in enumerate(zip(results, self.graphs.forward_rows, strict=True)):
            if start == 0:
                order = self.graphs.result_orders[i]
                wholes.append(
                    None if i in sinks else result if rows is None else _room(result, rows, tokens, order)
                )
            if i in sinks:
                sinks[i](result)
            elif rows is not None:
                rows.narrowed(wholes[i], start, length).copy_(result)

    def run_backward(
        self,
        read: Sequence[Any],
        tangents: Sequence[Tensor],
        tile: int | None,
        into: Sequence[Tensor | None],
        ours: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of the inputs that need one, in their order.

        Args:
            read: the inputs, or of a stage that saves, what it saved; ``Tiles`` of what is elsewhere.
            tangents: gradients of the differentiable results.
            into: for each gradient a tensor to add it to, in place; None to make one.
            ours: of each tangent, whether nobody else reads it: a gradient of its shape may take its memory,
                tile by tile.
        """
        assert self.backward is not None
        tangents = self._tangents(tangents)
        values = self._read(read)
        rows = [r for r, has in zip(self._rows_out, self.graphs.signature.differentiable, strict=True) if has]
        tokens = _tokens([*values, *tangents], [*self.graphs.read_rows, *rows])
        tile = self._at_most(tile, _widths(tangents, rows), self._widths_out)
        if tokens is None or tokens <= tile:
            values = [x.next() if isinstance(x, Tiles) else x for x in values]
            return _add(self.backward(*values, *tangents), tangents, into)
        spare = [(t, r) for t, own, r in zip(tangents, ours, rows, strict=True) if own]
        return self._tiled_backward(values, tangents, tile_length(tokens, tile), tokens, into, spare)

    def _tiled_backward(
        self,
        values: Sequence[Any],
        tangents: Sequence[Tensor],
        tile: int,
        tokens: int,
        into: Sequence[Tensor | None],
        spare: list[tuple[Tensor, Rows | None]],
    ) -> list[Tensor | None]:
        assert self.backward is not None
        signature, backward = self.graphs.signature, begun(self.backward, values)
        rows_of_tangents = [r for r, has in zip(self._rows_out, signature.differentiable, strict=True) if has]
        rows_of_gradients = [r for r, need in zip(self._rows_in, signature.needs, strict=True) if need]
        orders = [o for o, need in zip(self.graphs.orders, signature.needs, strict=True) if need]
        wholes = zip(into, rows_of_gradients, strict=True)
        totals = [_widened(t) if t is not None and rows is None else t for t, rows in wholes]
        for start in range(0, tokens, tile):
            length = min(tile, tokens - start)
            gradients = backward(
                *_sliced(values, self.graphs.read_rows, start, length),
                *_sliced(tangents, rows_of_tangents, start, length),
            )
            for i, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                rows, order, total = rows_of_gradients[i], orders[i], totals[i]
                if rows is None or order is None:
                    # A compiled graph may hand out one tensor for two equal gradients.
                    totals[i] = _widened(gradient).clone() if total is None else total.add_(gradient)
                    continue
                if total is None:
                    total = totals[i] = _take(spare, gradient, rows, tokens, order)
                place = rows.narrowed(total, start, length)
                place.copy_(gradient) if into[i] is None else place.add_(gradient)
            # Not held while the next tile runs.
            del gradients, gradient
        return totals

    def _at_most(self, tile: int | None, widths: Sequence[float], planned: Sequence[float]) -> int:
        """No tile is longer than what the kernels were compiled to index, nor larger than it was planned.

        Of more sequences than were planned for, tiles of the same size are shorter.
        """
        longest = int_hint(self.graphs.fakes.tokens)
        most = longest if tile is None else min(tile, longest)
        wider = max((now / then for now, then in zip(widths, planned, strict=True) if then), default=1.0)
        return max(int(most / wider), 1) if wider > 1 else most

    @cached_property
    def _widths_in(self) -> list[float]:
        return _widths(self.graphs.signature.inputs, self._rows_in)

    @cached_property
    def _widths_out(self) -> list[float]:
        signature = self.graphs.signature
        has = zip(self._rows_out, signature.differentiable, strict=True)
        return _widths(signature.tangents, [rows for rows, given in has if given])

    def _laid_out(self, inputs: Sequence[Any]) -> list[Any]:
        rows = self.graphs.stage.rows_in
        return [
            densely(x, order) if row is not None and order is not None else x
            for x, row, order in zip(inputs, rows, self.graphs.orders, strict=True)
        ]

    def _read(self, read: Sequence[Any]) -> list[Any]:
        """What the backward reads beside gradients, the stage's inputs in their memory order."""
        saved = self.graphs.saved
        if saved is None:
            return self._laid_out(read)
        orders = [self.graphs.orders[i] if self._rows_in[i] is not None else None for i in saved.inputs]
        count = len(orders)
        inputs = [x if o is None else densely(x, o) for x, o in zip(read[:count], orders, strict=True)]
        return [*inputs, *read[count:]]

    def _tangents(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        return [
            densely(given, memory_order(like))
            for given, like in zip(tangents, self.graphs.signature.tangents, strict=True)
        ]

    def _packed(self, results: Sequence[Any]) -> list[Any]:
        """What is saved beside the results, without gaps: it may be a part of something larger."""
        count = len(self.graphs.signature.results)
        extras = (densely(x, memory_order(x)) if isinstance(x, Tensor) else x for x in results[count:])
        return [*results[:count], *extras]

    @property
    def _rows_out(self) -> Sequence[Rows | None]:
        return self.graphs.forward_rows[: len(self.graphs.stage.rows_out)]

    @property
    def _rows_in(self) -> list[Rows | None]:
        return [None if dim is None else Rows(dim) for dim in self.graphs.stage.rows_in]


def _tokens(values: Sequence[Any], rows: Sequence[Rows | None]) -> int | None:
    whole = zip(values, rows, strict=True)
    return next((r.tokens(x) for x, r in whole if r is not None and not isinstance(x, Tiles)), None)


def _widths(values: Sequence[Any], rows: Sequence[Rows | None]) -> list[float]:
    """Elements for each token of the values that have tokens; of fake ones, those that tracing expected."""
    whole = [(x, r) for x, r in zip(values, rows, strict=True) if r is not None and isinstance(x, Tensor)]
    return [int_hint(x.numel()) / max(int_hint(x.shape[r.dim]), 1) for x, r in whole]


def _sliced(values: Sequence[Any], rows: Sequence[Rows | None], start: int, length: int) -> list[Any]:
    """A tile of each value that has tokens, without gaps; of one that is elsewhere, the next."""

    def cut(x: Any, row: Rows) -> Any:
        return x.next() if isinstance(x, Tiles) else densely(row.narrowed(x, start, length), memory_order(x))

    return [x if row is None else cut(x, row) for x, row in zip(values, rows, strict=True)]


def _add(
    gradients: Sequence[Tensor | None], tangents: Sequence[Tensor], into: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Each gradient, added to where one is there already, in memory that no other of them lies in."""
    taken = {t.untyped_storage().data_ptr() for t in tangents}
    found: list[Tensor | None] = []
    for gradient, total in zip(gradients, into, strict=True):
        if gradient is None:
            found.append(total)
            continue
        if total is not None:
            found.append(total.add_(gradient))
            continue
        place = gradient.untyped_storage().data_ptr()
        found.append(gradient.clone() if place in taken else gradient)
        taken.add(place)
    return found


def _room(like: Tensor, rows: Rows, tokens: int, order: Sequence[int]) -> Tensor:
    shape = [tokens * rows.times if d == rows.dim else size for d, size in enumerate(like.shape)]
    return like.new_empty_strided(shape, dense_strides(shape, order))


def _take(
    spare: list[tuple[Tensor, Rows | None]], like: Tensor, rows: Rows, tokens: int, order: Sequence[int]
) -> Tensor:
    """One of ``spare`` that looks as the whole of ``like`` does, tile for tile, else room of its own."""
    shape = [tokens * rows.times if d == rows.dim else size for d, size in enumerate(like.shape)]
    strides = dense_strides(shape, order)
    for index, (given, counted) in enumerate(spare):
        same = list(given.shape) == shape and list(given.stride()) == strides and given.dtype == like.dtype
        if same and counted == rows:
            return spare.pop(index)[0]
    return _room(like, rows, tokens, order)


def _widened(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
