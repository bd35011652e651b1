"""Sizes as expressions of symbols, compared whatever the lengths: no guard is made."""

from collections.abc import Iterable
from math import prod
from typing import Any

import sympy

from rewriter.canonical import fixed


def expression(size: Any) -> sympy.Expr:
    """Of a size; an expression stays what it is."""
    if isinstance(size, sympy.Expr):
        return size
    number = fixed(size)
    return sympy.Integer(number) if number is not None else size.node.expr


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal at any length."""
    left, right = expression(a), expression(b)
    return left == right or sympy.expand(left - right) == 0


def is_one(size: Any) -> bool:
    return fixed(size) == 1


def product(sizes: Iterable[Any]) -> sympy.Expr:
    return prod(map(expression, sizes), start=sympy.Integer(1))
