"""Fake tensors of a stage, in a fake mode of the planner's own, where the length of a tile is a symbol.

One compiled stage then runs tiles of any length, the last and shorter one included. The symbols are not
Dynamo's: a guard on the length of a tile says nothing about the model's inputs. What each stands for is kept,
for the sizes of other batches.
"""

from collections.abc import Sequence, Set
from typing import Any

import torch
from sympy import Symbol
from torch import SymInt, Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true

from rewriter.memory.growth import Growth, SizesAt, whole


class StageFakes:
    """Makes fake tensors like those that a region was outlined with.

    Args:
        longest_tile: the most tokens of a tile.
        rows: of the symbols that the region was outlined with, those that count sequences.

    Attributes:
        mode: the fake mode that they belong to.
        tokens: the length of a tile.
        rows: as given.
    """

    def __init__(self, longest_tile: int, rows: Set[Symbol] = frozenset()):
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.tokens = self._symbol("tokens", longest_tile)
        self.rows = rows
        self._sizes: dict[str, SymInt] = {}
        # What each symbol stands for.
        self._origins: dict[Symbol, SymInt] = {}

    def like(self, value: Any, rows: int | None = None) -> Any:
        """``value``, another mode's fake tensor or size, in this mode, and without history.

        Args:
            rows: the dimension that counts tokens: it gets the length of a tile, and the tensor is dense, its
                dimensions in memory in the order of ``value``'s. None: the strides are ``value``'s.
        """
        if isinstance(value, SymInt):
            return self._size(value)
        if not isinstance(value, Tensor):
            return value
        shape = [self.tokens if d == rows else self._size(s) for d, s in enumerate(value.shape)]
        strides = [self._size(s) for s in value.stride()]
        if rows is not None:
            strides = dense_strides(shape, memory_order(value))
        with self.mode:
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def packed(self, value: Tensor) -> Tensor:
        """``value``, a tensor of this mode, without gaps."""
        strides = dense_strides(value.shape, memory_order(value))
        with self.mode:
            return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)

    def sizes_at(self, tokens: int, growth: Growth) -> SizesAt:
        """Of a batch of that ``growth``, with tiles of ``tokens`` for each sequence of the traced one."""
        outside = SizesAt(growth, self.rows)
        known = {symbol: outside.length(size) for symbol, size in self._origins.items()}
        known[self.tokens.node.expr] = whole(tokens / growth.rows)
        return SizesAt(growth, self.rows, known)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, SymInt):
            return size
        fixed = size.node.maybe_as_int()
        if fixed is not None:
            return fixed
        name = str(size.node.expr)
        if name not in self._sizes:
            made = self._symbol(f"size_{len(self._sizes)}", size.node.hint)
            self._sizes[name], self._origins[made.node.expr] = made, size
        return self._sizes[name]

    def _symbol(self, name: str, hint: int) -> SymInt:
        symbol = self.env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        made = self.env.create_symintnode(symbol, hint=hint)
        assert isinstance(made, SymInt), f"{name} of {hint} was made a constant"
        return made


def memory_order(value: Tensor) -> tuple[int, ...]:
    """Dimensions from the outermost in memory to the innermost; equal strides as they come."""
    return tuple(sorted(range(value.dim()), key=lambda d: -_number(value.stride(d))))


def dense_strides(shape: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Strides of a tensor without gaps whose dimensions lie in memory in ``order``."""
    strides: list[Any] = [1] * len(shape)
    size: Any = 1
    for d in reversed(order):
        strides[d] = size
        size = size * shape[d]
    return strides


def is_dense(value: Tensor) -> bool:
    """Whether its elements lie in memory without gaps, each alone, in whatever order of dimensions."""
    given = zip(value.shape, value.stride(), dense_strides(value.shape, memory_order(value)), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(a == b) for size, a, b in given)


def densely(value: Tensor, order: Sequence[int]) -> Tensor:
    """``value`` with its dimensions in memory in ``order``, without gaps; copied only where it is not so."""
    if not order:
        return value
    back = [0] * len(order)
    for place, d in enumerate(order):
        back[d] = place
    return value.permute(*order).contiguous().permute(*back)


def _number(size: Any) -> int:
    return size.node.hint if isinstance(size, SymInt) else size
