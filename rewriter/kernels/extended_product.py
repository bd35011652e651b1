"""A linear layer and its adapter in one product, whose inner dimension has room for both.

    x Wᵀ + u Bᵀ  ->  [x | u] · [W | B]ᵀ                        u = scale · x Aᵀ, (tokens, r)
    dy W + v A   ->  [dy | v] · [W ; A]                        v = scale · dy B

Adding the update by a product of its own (``add_product``) reads and writes the whole result once more: 4
bytes an element in 16 bits, 235 MB of an 8B Llama's gate at 4,096 tokens. Here it is some more columns of the
product, 1.6% of its operations for 64 beside 4,096; what is paid instead is the input copied beside ``u``,
once for all projections of it. So it pays where the result is clearly wider than the input (gate and up
forward, down backward), and where the weight is made anew anyway, as from 4 bits: one that is there would be
copied.

Sums run over both in fp32 and are rounded once, a rounding less than by two products. ``u`` is scaled before
it is rounded, so that its scale adds none, and B never is.

Projections of one input share the copy: columns of the others' updates meet zeros beside W. An update that is
no finite number is thereby NaN in all of them, in its own row alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import define

# Elements: 128 bytes in 16 bits, what cuBLAS' kernels step along the inner dimension.
_STEP = 64
# How much wider a result is than the input whose copy it pays for.
_WIDER = 2
# From some 320 on, columns that a projection multiplies by zero cost what the pass does that is saved (700
# TFLOP/s, 4.3 TB/s).
_MOST = 256


def room(inner: int, ranks: Sequence[int]) -> int:
    """How many columns beside ``inner``: those of ``ranks``, and zeros that keep rows aligned."""
    return -(-(inner + sum(ranks)) // _STEP) * _STEP - inner


def wide_enough(result: int, inner: int) -> bool:
    """Whether a pass over a result of ``result`` columns costs more than to copy an input of ``inner``."""
    return result >= _WIDER * inner


def few_enough(ranks: Sequence[int]) -> bool:
    """Whether columns of ``ranks`` cost each of their projections less than a pass over its result."""
    return sum(ranks) <= _MOST


def extended(x: Tensor, columns: Sequence[Tensor], room: int) -> Tensor:
    """``[x | columns | 0]``, (tokens, inner + room), of the dtype of ``x``; never a view, nor viewed.

    An op, since a compiler would compute ``columns`` in the result, where being saved for the backward they
    would keep all of it. For forwards and backwards of autograd functions: it has no gradient.

    Args:
        x: (tokens, inner).
        columns: each (tokens, r).
        room: at least the sum of the ``r``.

    Raises:
        ValueError: the columns are more than the room.
    """
    return torch.ops.rewriter.extended(x, columns, room)


def _kernel(x: Tensor, columns: Sequence[Tensor], room: int) -> Tensor:
    zeros = _vacant(columns, room)
    return torch.cat((x, *columns, *((x.new_zeros((x.shape[0], zeros)),) if zeros else ())), 1)


def _fake(x: Tensor, columns: Sequence[Tensor], room: int) -> Tensor:
    _vacant(columns, room)
    return x.new_empty((x.shape[0], x.shape[1] + room))


def _vacant(columns: Sequence[Tensor], room: int) -> int:
    given = sum(c.shape[1] for c in columns)
    if given > room:
        raise ValueError(f"extended: {given} columns do not fit a room of {room}.")
    return room - given


define("extended(Tensor x, Tensor[] columns, int room) -> Tensor", kernel=_kernel, fake=_fake)
