"""Takes a dense attention mask apart into the terms that it was made of, and proves each.

A model writes its mask as an expression over positions, ``(k <= q) & (k > q - window) & (seg[q] == seg[k])``,
broadcast to (batch, 1, queries, keys). Here that expression is read back, node by node, with the axes of the
mask counted from its end: the keys are axis -1, the queries -2, the batch -4. A term is proven when it
compares values that ``mask_values`` knows; one unknown term and the mask stays what it was.

Documents packed into one row are told apart by jumps of ``position_ids``. Where these are proven to come from
``arange``, there are no jumps, and the term holds everywhere; where they are an input, it is kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from rewriter.canonical import Call, canonical, dtype_of
from rewriter.checkpoint import Checkpoints
from rewriter.mask_values import (
    INDEX_DTYPES,
    Constant,
    Lookup,
    Position,
    Quotient,
    Values,
    moved_axes,
    shape_of,
)
from rewriter.pattern import same, source_line

KEYS, QUERIES = -1, -2


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
_COMPARISONS = frozenset({"le", "lt", "ge", "gt"})


class MaskReader:
    """Reads the masks of a module."""

    def __init__(self, checkpoints: Checkpoints):
        self.values = Values(checkpoints)

    def read(self, mask: Node) -> MaskTerms:
        """The terms of ``mask``: boolean, or additive with 0 where it is allowed.

        Raises:
            Unproven: for the first term that is not proven to be one of ``MaskTerms``.
        """
        terms = _Terms()
        self._collect(mask, terms)
        return terms.proven(mask)

    def _collect(self, node: Node, terms: _Terms) -> None:
        known = self.values.of(node)
        node = self.values.checkpoints.origin(node)
        if isinstance(known, Constant) and known.value == 1 and dtype_of(node) == torch.bool:
            return
        if isinstance(known, Lookup) and known.axis == KEYS and dtype_of(known.source) == torch.bool:
            terms.only("key_mask", known.source, node)
            return
        call = None if self.values.is_written(node) else canonical(node)
        inner = () if call is None else self._conjuncts(node, call)
        for part in inner:
            self._collect(part, terms)
        if inner or call is not None and self._compare(node, call, terms):
            return
        if not _is_row(node) or dtype_of(node) != torch.bool:
            what = "is an input" if node.op == "placeholder" else f"is {call.name if call else node.op}"
            what = "is written in place" if self.values.is_written(node) else what
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
                axes = moved_axes(node, call)
                old, new = shape_of(source), shape_of(node)
                kept = all(axes.get(a) == a and same(old[a], new[a]) for a in (KEYS, QUERIES))
                return (source,) if kept else ()
        return ()

    def _is_additive(self, node: Node, kept: Any, masked: Any) -> bool:
        dtype, zero, low = dtype_of(node), self.values.of(kept), self.values.of(masked)
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
        left, right = map(self.values.of, call.args)
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
        a, b = self.values.of(left), self.values.of(right)
        match a, b:
            case Quotient(), Quotient() if {a.axis, b.axis} == {KEYS, QUERIES} and a.divisor == b.divisor:
                terms.only("chunk", a.divisor, node)
                return True
            case Lookup(), Lookup() if {a.axis, b.axis} == {KEYS, QUERIES} and a.source is b.source:
                if dtype_of(a.source) not in INDEX_DTYPES:
                    return False
                terms.only("segments", a.source, node)
                return True
        if not isinstance(left, Node) or not isinstance(right, Node):
            return False
        query, key = (left, right) if _is_row(right) else (right, left)
        if not _is_row(key) or str(shape_of(query)[KEYS:]) != "(1,)" or dtype_of(key) not in INDEX_DTYPES:
            return False
        if not self._mirrored(query, key):
            return False
        terms.only("segments", self.values.checkpoints.origin(key), node)
        return True

    def _mirrored(self, query: Any, key: Any) -> bool:
        """Whether ``query`` is to the queries' positions what ``key`` is to the keys'."""
        if not isinstance(query, Node) or not isinstance(key, Node):
            if isinstance(query, (tuple, list)) and isinstance(key, (tuple, list)):
                return len(query) == len(key) and all(map(self._mirrored, query, key))
            return same(query, key)
        a, b = self.values.of(query), self.values.of(key)
        if isinstance(a, Position) and isinstance(b, Position) and (a.axis, b.axis) == (QUERIES, KEYS):
            return a.shift == b.shift and same(shape_of(query)[QUERIES], shape_of(key)[KEYS])
        query, key = self.values.checkpoints.origin(query), self.values.checkpoints.origin(key)
        if query is key:
            return True
        if self.values.is_written(query) or self.values.is_written(key):
            return False
        first, second = canonical(query), canonical(key)
        if first is None or second is None or first.name != second.name or first.name not in _POINTWISE:
            return False
        return self._mirrored(first.args, second.args)


def _is_row(node: Node) -> bool:
    """Whether ``node`` is of shape (batch or 1, 1, 1, keys)."""
    shape = shape_of(node)
    return len(shape) == 4 and str(shape[1]) == str(shape[2]) == "1"
