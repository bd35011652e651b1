"""A linear layer and its adapter in one product, which has room for both.

    x Wᵀ + u Bᵀ  ->  [x | u] · [W | B]ᵀ                        u = scale · x Aᵀ, (tokens, r)
    dy W + v A   ->  [dy | v] · [W ; A]                        v = scale · dy B
    dy W, dy B   ->  dy · [W | B]

The update as a product of its own, to which the base's adds (``add_product``), writes and reads the whole
result once more: 4 bytes an element in 16 bits, 235 MB of an 8B Llama's gate at 4,096 tokens. Here it is some
more columns of the product, 1.6% of its operations for 64 beside 4,096; what is paid instead is the input
copied beside ``u``, once for all projections of it, unless a norm has left room for ``u`` beside its rows
(``fill_columns_``, ``rewriter.norm_rooms``). So it pays where the result is clearly wider than the
input (gate and up forward, down backward), and where the weight is made anew anyway, as from 4 bits: one that
is there would be copied.

Sums run over both in fp32 and are rounded once, a rounding less than by two products. ``u`` is scaled before
it is rounded, so that its scale adds none. Of a scale above 1 it is B that gets a power of two, exactly, and
``u`` what is left: in fp16 a scaled ``u`` would overflow where the model's own ``x Aᵀ`` does not. (So would
such a B, but weights are not near 65,504.)

Projections of one input share the copy: columns of the others' updates meet zeros beside W. An update that is
no finite number is thereby NaN in all of them, in its own row alone.

The third form saves reading dy once more. Where projections share an input, their products add up to one
``[dx | dy B of each]``, and ``folded`` adds what the adapters have of dx. Rows of dx then have gaps between
them, and who reads it may copy it first, as a layer's backward does with what the next one's hands it; so
narrow results as those of q, k and v, where it would save little, are left
(``examples/benchmarks/extended_products.py`` times these forms).
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
# From some 160 on, they cost a backward what reading the result's gradient for B does.
_MOST_READ = 160
_WIDER_TO_READ = 4


def room(inner: int, ranks: Sequence[int]) -> int:
    """How many columns beside ``inner``: those of ``ranks``, and zeros that keep rows aligned."""
    return -(-(inner + sum(ranks)) // _STEP) * _STEP - inner


def wide_enough(result: int, inner: int) -> bool:
    """Whether a pass over a result of ``result`` columns costs more than to copy an input of ``inner``."""
    return result >= _WIDER * inner


def few_enough(ranks: Sequence[int]) -> bool:
    """Whether columns of ``ranks`` cost each of their projections less than a pass over its result."""
    return sum(ranks) <= _MOST


def pays_to_read_beside(results: Sequence[int], inner: int, ranks: Sequence[int]) -> bool:
    """Whether reading gradients of ``results`` columns once more costs clearly more than what saves it.

    That is columns of ``ranks`` in each product, and at worst a copy of ``inner`` columns that have gaps.
    """
    return sum(results) >= _WIDER_TO_READ * inner and sum(ranks) <= _MOST_READ


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


def _fill_kernel(wide: Tensor, columns: Sequence[Tensor], room: int) -> None:
    zeros, rows = _vacant(columns, room), wide.view(-1, wide.shape[-1])
    *places, vacant = rows[:, -room:].split([*(c.shape[1] for c in columns), zeros], 1)
    for place, column in zip(places, columns, strict=True):
        place.copy_(column)
    if zeros:
        vacant.zero_()


def _fill_fake(wide: Tensor, columns: Sequence[Tensor], room: int) -> None:
    _vacant(columns, room)


def folded(wide: Tensor, rows: Tensor, scale: float) -> Tensor:
    """``dx + scale · v rows`` of ``wide = [dx | v | …]``, in the place of dx; a view of ``wide``.

    Rounded once, with sums in fp32. On any device an op that says what it writes. No gradient.

    Args:
        wide: (tokens, inner + room), whose first columns are overwritten; the others may be read on.
        rows: (r, inner), of the dtype of ``wide``.
    """
    torch.ops.rewriter.fold_columns_(wide, rows, scale)
    return wide.narrow(1, 0, rows.shape[1])


def _fold_kernel(wide: Tensor, rows: Tensor, scale: float) -> None:
    rank, inner = rows.shape
    dx = wide[:, :inner]
    torch.addmm(dx, wide[:, inner : inner + rank], rows, alpha=scale, out=dx)


def _fold_fake(wide: Tensor, rows: Tensor, scale: float) -> None:
    return None


fold_columns_ = define(
    "fold_columns_(Tensor(a!) wide, Tensor rows, float scale) -> ()",
    kernel=_fold_kernel,
    fake=_fold_fake,
    launches=False,
)
# What ``extended`` puts behind x, into the last ``room`` columns of ``wide``, (..., inner + room) and dense.
fill_columns_ = define(
    "fill_columns_(Tensor(a!) wide, Tensor[] columns, int room) -> ()",
    kernel=_fill_kernel,
    fake=_fill_fake,
    launches=False,
)
define("extended(Tensor x, Tensor[] columns, int room) -> Tensor", kernel=_kernel, fake=_fake, launches=False)
