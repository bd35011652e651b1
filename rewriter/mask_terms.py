"""Takes a dense attention mask apart into the terms that it was made of, and proves each.

A model writes its mask as an expression over positions, ``(k <= q) & (k > q - window) & (seg[q] == seg[k])``,
broadcast to (batch, 1, queries, keys). Here that expression is read back, node by node, with the axes of the
mask counted from its end: the keys are axis -1, the queries -2, the batch -4. What an integer tensor holds
is one of ``Constant``, ``Position`` (the coordinate along an axis, plus a constant), ``Quotient`` (that,
divided) and ``Lookup`` (a (batch, tokens) table read at a position); anything else is unknown. A term is
proven when it compares known values; one unknown term and the mask stays what it was.

Documents packed into one row are told apart by jumps of ``position_ids``. Where these are proven to come from
``arange``, there are no jumps, and the term holds everywhere; where they are an input, it is kept.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from rewriter.canonical import Call, canonical, dtype_of, value_of
from rewriter.checkpoint import Checkpoints
from rewriter.pattern import same, source_line

KEYS, QUERIES, BATCH = -1, -2, -4


class Unproven(Exception):
    """A term of a mask that is not one of those that kernels know; says which, and where it was written."""

    def __init__(self, node: Node, reason: str):
        place = source_line(node).rpartition("/")[2]
        super().__init__(f"the mask's term `{node.name}`{f' at {place}' if place else ''} {reason}")
        self.node = node


@dataclass(frozen=True)
class MaskTerms:
    """What a mask allows: the keys that all of the terms allow. Names as in ``kernels.attention.attention``.

    ``segments`` and ``key_mask`` are values of shape (batch or 1, tokens), or (batch or 1, 1, 1, tokens).
    """

    causal: bool = False
    window: int = 0
    chunk: int = 0
    segments: Node | None = None
    key_mask: Node | None = None


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


_Value = Constant | Position | Quotient | Lookup | None


@dataclass
class _Terms:
    """Terms met so far; ``low <= key - query <= high``."""

    low: int | None = None
    high: int | None = None
    chunk: int = 0
    segments: Node | None = None
    key_mask: Node | None = None

    def at_least(self, low: int) -> None:
        self.low = low if self.low is None else max(self.low, low)

    def at_most(self, high: int) -> None:
        self.high = high if self.high is None else min(self.high, high)

    def only(self, name: str, value: Any, node: Node) -> None:
        """Set a term of which a kernel takes one."""
        if getattr(self, name) not in (0, None, value):
            raise Unproven(node, f"is a second one of the kind `{name}`")
        setattr(self, name, value)

    def proven(self, mask: Node) -> MaskTerms:
        if self.high not in (None, 0):
            raise Unproven(mask, f"shows a query the keys up to {self.high:+} positions from it; causal is 0")
        if self.low is not None and self.high is None:
            raise Unproven(mask, "is a window without being causal")
        if self.low is not None and self.low > 0:
            raise Unproven(mask, "allows no key")
        window = 0 if self.low is None else 1 - self.low
        return MaskTerms(self.high == 0, window, self.chunk, self.segments, self.key_mask)


# Elementwise operations, through which equality of a function of the query and one of the key is followed.
_POINTWISE = frozenset({"add", "sub", "mul", "floordiv", "remainder", "neg", "cast", "getitem", "where"})
_FILLED = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_COMPARISONS = frozenset({"le", "lt", "ge", "gt"})
_INDEX_DTYPES = (torch.int64, torch.int32)


@dataclass
class MaskReader:
    """Reads the masks of a module; values met once are remembered."""

    checkpoints: Checkpoints
    _values: dict[Node, _Value] = field(default_factory=dict)

    def read(self, mask: Node) -> MaskTerms:
        """The terms of ``mask``: boolean, or additive with 0 where it is allowed.

        Raises:
            Unproven: for the first term that is not proven to be one of ``MaskTerms``.
        """
        terms = _Terms()
        self._collect(mask, terms)
        return terms.proven(mask)

    def _collect(self, node: Node, terms: _Terms) -> None:
        known = self._value(node)
        node = self.checkpoints.origin(node)
        if isinstance(known, Constant) and known.value == 1 and dtype_of(node) == torch.bool:
            return
        if isinstance(known, Lookup) and known.axis == KEYS and dtype_of(known.source) == torch.bool:
            terms.only("key_mask", known.source, node)
            return
        call = None if self._is_written(node) else canonical(node)
        inner = () if call is None else self._conjuncts(node, call)
        for part in inner:
            self._collect(part, terms)
        if inner or call is not None and self._compare(node, call, terms):
            return
        if not _is_row(node) or dtype_of(node) != torch.bool:
            what = "is an input" if node.op == "placeholder" else f"is {call.name if call else node.op}"
            what = "is written in place" if self._is_written(node) else what
            raise Unproven(node, f"{what}; not proven to be causal, a window, chunks, documents or padding")
        # Whatever it holds: it does not depend on the query, so it is a padding mask.
        terms.only("key_mask", node, node)

    def _conjuncts(self, node: Node, call: Call) -> tuple[Node, ...]:
        """The masks whose conjunction ``node`` is, with its last two axes; none if it is a term itself."""
        match call.name, call.args:
            case "and_", (Node() as a, Node() as b):
                return (a, b) if dtype_of(a) == dtype_of(b) == torch.bool else ()
            case (("alias" | "to_device" | "expand" | "clone" | "detach"), (Node() as source, *_)):
                return (source,)
            case "where", (Node() as condition, kept, masked):
                return (condition,) if self._is_additive(node, kept, masked) else ()
            case (("getitem" | "unsqueeze" | "view" | "reshape"), (Node() as source, *_)):
                axes = _moved_axes(node, call)
                old, new = _shape(source), _shape(node)
                kept = all(axes.get(a) == a and same(old[a], new[a]) for a in (KEYS, QUERIES))
                return (source,) if kept else ()
        return ()

    def _is_additive(self, node: Node, kept: Any, masked: Any) -> bool:
        dtype, zero, low = dtype_of(node), self._value(kept), self._value(masked)
        if dtype is None or not dtype.is_floating_point:
            return False
        if not isinstance(zero, Constant) or not isinstance(low, Constant):
            return False
        return zero.value == 0 and low.value <= torch.finfo(dtype).min

    def _compare(self, node: Node, call: Call, terms: _Terms) -> bool:
        """Add the term that a comparison is; whether it is one that is known."""
        if call.name == "eq" and len(call.args) == 2:
            return self._equal(node, *call.args, terms)
        if call.name not in _COMPARISONS or len(call.args) != 2:
            return False
        left, right = map(self._value, call.args)
        if call.name in ("ge", "gt"):
            left, right = right, left
        strict = int(call.name in ("lt", "gt"))
        if isinstance(left, Constant) and isinstance(right, Position):
            return left.value <= right.shift - strict
        if not isinstance(left, Position) or not isinstance(right, Position):
            return False
        slack = right.shift - left.shift - strict
        if (left.axis, right.axis) == (KEYS, QUERIES):
            terms.at_most(slack)
        elif (left.axis, right.axis) == (QUERIES, KEYS):
            terms.at_least(-slack)
        else:
            return False
        return True

    def _equal(self, node: Node, left: Any, right: Any, terms: _Terms) -> bool:
        a, b = self._value(left), self._value(right)
        match a, b:
            case Quotient(), Quotient() if {a.axis, b.axis} == {KEYS, QUERIES} and a.divisor == b.divisor:
                terms.only("chunk", a.divisor, node)
                return True
            case Lookup(), Lookup() if {a.axis, b.axis} == {KEYS, QUERIES} and a.source is b.source:
                if dtype_of(a.source) not in _INDEX_DTYPES:
                    return False
                terms.only("segments", a.source, node)
                return True
        if not isinstance(left, Node) or not isinstance(right, Node):
            return False
        query, key = (left, right) if _is_row(right) else (right, left)
        if not _is_row(key) or str(_shape(query)[KEYS:]) != "(1,)" or dtype_of(key) not in _INDEX_DTYPES:
            return False
        if not self._mirrored(query, key):
            return False
        terms.only("segments", self.checkpoints.origin(key), node)
        return True

    def _mirrored(self, query: Any, key: Any) -> bool:
        """Whether ``query`` is to the queries' positions what ``key`` is to the keys'."""
        if not isinstance(query, Node) or not isinstance(key, Node):
            if isinstance(query, (tuple, list)) and isinstance(key, (tuple, list)):
                return len(query) == len(key) and all(map(self._mirrored, query, key))
            return same(query, key)
        a, b = self._value(query), self._value(key)
        if isinstance(a, Position) and isinstance(b, Position) and (a.axis, b.axis) == (QUERIES, KEYS):
            return a.shift == b.shift and same(_shape(query)[QUERIES], _shape(key)[KEYS])
        query, key = self.checkpoints.origin(query), self.checkpoints.origin(key)
        if query is key:
            return True
        if self._is_written(query) or self._is_written(key):
            return False
        first, second = canonical(query), canonical(key)
        if first is None or second is None or first.name != second.name or first.name not in _POINTWISE:
            return False
        return self._mirrored(first.args, second.args)

    def _is_written(self, node: Node) -> bool:
        return self.checkpoints.effects[node.graph].is_written(node)

    def _value(self, node: Any) -> _Value:
        if not isinstance(node, Node):
            return Constant(node) if isinstance(node, (int, float)) else None
        origin = self.checkpoints.origin(node)
        if self._is_written(node) or self._is_written(origin):
            return None
        if origin not in self._values:
            call = canonical(origin)
            known = None if call is None else self._computed(origin, call)
            if isinstance(known, Position) and str(_shape(origin)[known.axis]) == "1":
                known = Constant(known.shift)
            self._values[origin] = known
        return self._values[origin]

    def _computed(self, node: Node, call: Call) -> _Value:
        match call.name, call.args:
            case (("alias" | "to_device" | "clone" | "detach" | "expand"), (source, *_)):
                return self._value(source)
            case "cast", (source, dtype):
                return _cast(self._value(source), dtype)
            case "arange", args:
                return _arange(node, args)
            case (("tensor" | "scalar_tensor"), (int() | float() as number, *_)):
                return Constant(number)
            case name, _ if name in _FILLED:
                return Constant(_FILLED[name])
            case (("full" | "full_like" | "new_full"), (_, int() | float() as number, *_)):
                return Constant(number)
            case (("add" | "sub" | "floordiv" | "eq" | "ne"), (left, right)):
                return _arithmetic(call.name, self._value(left), self._value(right))
            case "cumsum", (source, *_):
                total = self._value(source)
                return total if total == Constant(0) else None
            case "diff", (source, 1, dim, prepend, None):
                return self._difference(source, dim, prepend)
            case "getitem", (Node() as source, index) if _has_tensor(index):
                return self._looked_up(source, index)
            case (("getitem" | "unsqueeze" | "view" | "reshape"), (Node() as source, *_)):
                return self._viewed(node, call, self._value(source))
        return None

    def _viewed(self, node: Node, call: Call, source: _Value) -> _Value:
        if isinstance(source, Constant) or not isinstance(source, Position):
            return source if isinstance(source, Constant) else None
        axis = _moved_axes(node, call).get(source.axis)
        return None if axis is None else Position(axis, source.shift)

    def _difference(self, source: Any, dim: int, prepend: Any) -> _Value:
        """``torch.diff`` of positions along their axis, continued backwards by ``prepend``: 1 everywhere."""
        known, first = self._value(source), self._value(prepend)
        if not isinstance(known, Position) or not isinstance(first, Constant):
            return None
        along = dim if dim < 0 else dim - len(_shape(source))
        return Constant(1) if along == known.axis and first.value == known.shift - 1 else None

    def _looked_up(self, source: Node, index: Any) -> _Value:
        table = self._value(source)
        if isinstance(table, Constant):
            return table
        if not isinstance(index, tuple) or len(index) != 2 or len(_shape(source)) != 2:
            return None
        row, column = map(self._value, index)
        if not isinstance(column, Position) or column.shift != 0:
            return None
        if isinstance(table, Position) and table.axis == -1:
            return Position(column.axis, table.shift)
        rows, tokens = _shape(source)
        every_row = row == Position(BATCH, 0) and same(_shape(index[0])[BATCH], rows)
        only_row = row == Constant(0) and str(rows) == "1"
        if not (every_row or only_row) or not same(_shape(index[1])[column.axis], tokens):
            return None
        return Lookup(self.checkpoints.origin(source), column.axis)


def _shape(node: Node) -> tuple:
    return tuple(getattr(value_of(node), "shape", ()))


def _is_row(node: Node) -> bool:
    """Whether ``node`` is of shape (batch or 1, 1, 1, keys)."""
    shape = _shape(node)
    return len(shape) == 4 and str(shape[1]) == str(shape[2]) == "1"


def _has_tensor(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(value_of(p), torch.Tensor) for p in parts)


def _cast(source: _Value, dtype: Any) -> _Value:
    if dtype == torch.bool:
        return Constant(bool(source.value)) if isinstance(source, Constant) else None
    return source if dtype in _INDEX_DTYPES and isinstance(source, (Constant, Position)) else None


def _arange(node: Node, args: tuple) -> _Value:
    numbers = [a for a in args if not isinstance(a, tuple)]
    named = {a[0] for a in args if isinstance(a, tuple)}
    if dtype_of(node) not in _INDEX_DTYPES or named & {"start", "end", "step"}:
        return None
    start = numbers[0] if len(numbers) > 1 else 0
    step = numbers[2] if len(numbers) > 2 else 1
    return Position(-1, start) if isinstance(start, int) and step == 1 else None


def _arithmetic(name: str, left: _Value, right: _Value) -> _Value:
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


def _moved_axes(node: Node, call: Call) -> dict[int, int]:
    """Where a view puts the axes of its source, all counted from the end.

    An axis that it cuts off at the end has an entry; one that it drops, starts later or merges has none.
    """
    source, *rest = call.args
    before, after = len(_shape(source)), len(_shape(node))
    if call.name == "getitem":
        return _indexed_axes(rest[0] if isinstance(rest[0], tuple) else (rest[0],), before, after)
    if call.name == "unsqueeze":
        dim = rest[0] % after
        return {a - before: a + (a >= dim) - after for a in range(before)}
    # A view keeps the order of its elements: axes of size above 1 stay what they are where their sizes do.
    old = [(a - before, s) for a, s in enumerate(_shape(source)) if str(s) != "1"]
    new = [(a - after, s) for a, s in enumerate(_shape(node)) if str(s) != "1"]
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
