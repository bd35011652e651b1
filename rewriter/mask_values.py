"""What an integer tensor holds, as far as the graph proves it, for the masks that are made of positions.

It is one of ``Constant``, ``Position`` (the coordinate along an axis, plus a constant), ``Quotient`` (that,
divided) and ``Lookup`` (a (batch, tokens) table read at a position); anything else is unknown. Axes are
counted from the end.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from rewriter.canonical import Call, canonical, dtype_of, value_of
from rewriter.checkpoint import Checkpoints
from rewriter.pattern import same

BATCH = -4
INDEX_DTYPES = (torch.int64, torch.int32)
_FILLED = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}


@dataclass(frozen=True)
class Constant:
    """The same number everywhere."""

    value: Any


@dataclass(frozen=True)
class Position:
    """The coordinate along ``axis``, plus ``shift``; never of an axis of size 1, where it is constant."""

    axis: int
    shift: int


@dataclass(frozen=True)
class Quotient:
    """The coordinate along ``axis``, divided by ``divisor`` and rounded down."""

    axis: int
    divisor: int


@dataclass(frozen=True)
class Lookup:
    """``source[batch, coordinate along axis]``, of a mask of four dimensions."""

    source: Node
    axis: int


Value = Constant | Position | Quotient | Lookup | None


@dataclass
class Values:
    """Reads the values of a module; those met once are remembered."""

    checkpoints: Checkpoints
    _known: dict[Node, Value] = field(default_factory=dict)

    def is_written(self, node: Node) -> bool:
        """Whether anything writes into the memory of ``node``."""
        return self.checkpoints.effects[node.graph].is_written(node)

    def of(self, node: Any) -> Value:
        """What a value or a number holds; None where it is not proven."""
        if not isinstance(node, Node):
            return Constant(node) if isinstance(node, (int, float)) else None
        origin = self.checkpoints.origin(node)
        if self.is_written(node) or self.is_written(origin):
            return None
        if origin not in self._known:
            call = canonical(origin)
            known = None if call is None else self._computed(origin, call)
            if isinstance(known, Position) and str(shape_of(origin)[known.axis]) == "1":
                known = Constant(known.shift)
            self._known[origin] = known
        return self._known[origin]

    def _computed(self, node: Node, call: Call) -> Value:
        match call.name, call.args:
            case (("alias" | "to_device" | "clone" | "detach" | "expand"), (source, *_)):
                return self.of(source)
            case "cast", (source, dtype):
                return _cast(self.of(source), dtype)
            case "arange", args:
                return _arange(node, args)
            case (("tensor" | "scalar_tensor"), (int() | float() as number, *_)):
                return Constant(number)
            case name, _ if name in _FILLED:
                return Constant(_FILLED[name])
            case (("full" | "full_like" | "new_full"), (_, int() | float() as number, *_)):
                return Constant(number)
            case (("add" | "sub" | "floordiv" | "eq" | "ne"), (left, right)):
                return _arithmetic(call.name, self.of(left), self.of(right))
            case "cumsum", (source, *_):
                total = self.of(source)
                return total if total == Constant(0) else None
            case "diff", (source, 1, dim, prepend, None):
                return self._difference(source, dim, prepend)
            case "getitem", (Node() as source, index) if _has_tensor(index):
                return self._looked_up(source, index)
            case (("getitem" | "unsqueeze" | "view" | "reshape"), (Node() as source, *_)):
                return self._viewed(node, call, self.of(source))
        return None

    def _viewed(self, node: Node, call: Call, source: Value) -> Value:
        if isinstance(source, Constant) or not isinstance(source, Position):
            return source if isinstance(source, Constant) else None
        axis = moved_axes(node, call).get(source.axis)
        return None if axis is None else Position(axis, source.shift)

    def _difference(self, source: Any, dim: int, prepend: Any) -> Value:
        """``torch.diff`` of positions along their axis, continued backwards by ``prepend``: 1 everywhere."""
        known, first = self.of(source), self.of(prepend)
        if not isinstance(known, Position) or not isinstance(first, Constant):
            return None
        along = dim if dim < 0 else dim - len(shape_of(source))
        return Constant(1) if along == known.axis and first.value == known.shift - 1 else None

    def _looked_up(self, source: Node, index: Any) -> Value:
        table = self.of(source)
        if isinstance(table, Constant):
            return table
        if not isinstance(index, tuple) or len(index) != 2 or len(shape_of(source)) != 2:
            return None
        row, column = map(self.of, index)
        if not isinstance(column, Position) or column.shift != 0:
            return None
        if isinstance(table, Position) and table.axis == -1:
            return Position(column.axis, table.shift)
        rows, tokens = shape_of(source)
        every_row = row == Position(BATCH, 0) and same(shape_of(index[0])[BATCH], rows)
        only_row = row == Constant(0) and str(rows) == "1"
        if not (every_row or only_row) or not same(shape_of(index[1])[column.axis], tokens):
            return None
        return Lookup(self.checkpoints.origin(source), column.axis)


def shape_of(node: Node) -> tuple:
    return tuple(getattr(value_of(node), "shape", ()))


def _has_tensor(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(value_of(p), torch.Tensor) for p in parts)


def _cast(source: Value, dtype: Any) -> Value:
    if dtype == torch.bool:
        return Constant(bool(source.value)) if isinstance(source, Constant) else None
    return source if dtype in INDEX_DTYPES and isinstance(source, (Constant, Position)) else None


def _arange(node: Node, args: tuple) -> Value:
    numbers = [a for a in args if not isinstance(a, tuple)]
    named = {a[0] for a in args if isinstance(a, tuple)}
    if dtype_of(node) not in INDEX_DTYPES or named & {"start", "end", "step"}:
        return None
    start = numbers[0] if len(numbers) > 1 else 0
    step = numbers[2] if len(numbers) > 2 else 1
    return Position(-1, start) if isinstance(start, int) and step == 1 else None


def _arithmetic(name: str, left: Value, right: Value) -> Value:
    match left, right:
        case Constant(a), Constant(b):
            if name in ("eq", "ne"):
                return Constant((a == b) == (name == "eq"))
            return Constant({"add": a + b, "sub": a - b}[name]) if name in ("add", "sub") else None
        case Position(), Constant(int() as b):
            if name == "floordiv":
                return Quotient(left.axis, b) if left.shift == 0 and b > 0 else None
            shift = {"add": b, "sub": -b}.get(name)
            return None if shift is None else Position(left.axis, left.shift + shift)
        case Constant(int()), Position() if name == "add":
            return _arithmetic(name, right, left)
    return None


def moved_axes(node: Node, call: Call) -> dict[int, int]:
    """Where a view puts the axes of its source, all counted from the end.

    An axis that it cuts off at the end has an entry; one that it drops, starts later or merges has none.
    """
    source, *rest = call.args
    before, after = len(shape_of(source)), len(shape_of(node))
    if call.name == "getitem":
        return _indexed_axes(rest[0] if isinstance(rest[0], tuple) else (rest[0],), before, after)
    if call.name == "unsqueeze":
        dim = rest[0] % after
        return {a - before: a + (a >= dim) - after for a in range(before)}
    # A view keeps the order of its elements: axes of size above 1 stay what they are where their sizes do.
    old = [(a - before, s) for a, s in enumerate(shape_of(source)) if str(s) != "1"]
    new = [(a - after, s) for a, s in enumerate(shape_of(node)) if str(s) != "1"]
    if len(old) != len(new) or not all(same(a[1], b[1]) for a, b in zip(old, new, strict=True)):
        return {}
    return {a[0]: b[0] for a, b in zip(old, new, strict=True)}


def _indexed_axes(index: tuple, before: int, after: int) -> dict[int, int]:
    taken = sum(entry is not None and entry is not Ellipsis for entry in index)
    if Ellipsis in [e for e in index if e is Ellipsis]:
        at = next(i for i, e in enumerate(index) if e is Ellipsis)
        index = (*index[:at], *[slice(None)] * (before - taken), *index[at + 1 :])
    else:
        index = (*index, *[slice(None)] * (before - taken))
    axes: dict[int, int] = {}
    old = new = 0
    for entry in index:
        if entry is None:
            new += 1
        elif isinstance(entry, slice):
            from_start = entry.start is None or isinstance(entry.start, int) and entry.start == 0
            if from_start and entry.step is None:
                axes[old - before] = new - after
            old, new = old + 1, new + 1
        elif isinstance(entry, int):
            old += 1
        else:
            return {}
    return axes
