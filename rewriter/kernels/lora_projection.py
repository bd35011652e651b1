"""A linear layer with a LoRA adapter: its tensors, its weight as products take it, and sums of products."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .add_product import add_product
from .dequantize import Packed4bit, dequantize_4bit, dequantize_4bit_extended
from .resident_weight import ResidentWeight

# Told apart, so that no compiler merges the two and keeps the 16-bit weight in between.
FORWARD, BACKWARD = 0, 1

# A tensor or None; in the backward also a tensor's dtype, or whether its gradient is wanted. Which of a
# projection's are there follows from the others, which types cannot say.
Slot = Any


class Operands(NamedTuple):
    """A projection's tensors. With a 4-bit weight ``weight`` is the packed data, and the scales follow it.

    With one that was dequantised before, it is what stays of it (``resident_weight``), its room included.
    """

    weight: Slot
    absmax: Slot
    absmax_8bit: Slot
    absmax_code: Slot
    absmax_offset: Slot
    bias: Slot
    dropped: Slot
    a: Slot
    b: Slot


@dataclass(frozen=True, slots=True)
class Projection:
    """What of a projection is no tensor.

    Attributes:
        packing: shape, block size and type of a 4-bit weight.
        resident: (N, K) of one that was dequantised before.
    """

    packing: tuple | None
    scale: float
    compute: torch.dtype
    adapter: torch.dtype
    out: torch.dtype
    resident: tuple[int, int] | None = None

    def weight(self, p: Operands, use: int) -> Tensor:
        """The weight in the product's dtype, (N, K). ``use``: ``FORWARD`` or ``BACKWARD``, here and below."""
        if self.resident is not None:
            n, k = self.resident
            return p.weight if tuple(p.weight.shape) == (n, k) else p.weight[:n, :k]
        if self.packing is None:
            return p.weight.to(self.compute)
        return dequantize_4bit(self.packed(p), self.compute, use)

    def weight_beside(self, p: Operands, vacant: int, start: int, scale: float, use: int) -> Tensor:
        """``[W | 0 | scale · B | 0]``, (N, K + vacant), with B ``start`` columns after W."""
        if self.resident is not None:
            return p.weight
        return dequantize_4bit_extended(self.packed(p), self.compute, p.b, 1, vacant, start, scale, use)

    def weight_above(self, p: Operands, vacant: int, use: int) -> Tensor:
        """``[W ; A ; 0]``, (N + vacant, K)."""
        if self.resident is not None:
            return p.weight
        return dequantize_4bit_extended(self.packed(p), self.compute, p.a, 0, vacant, 0, 1.0, use)

    def packed(self, p: Operands) -> Packed4bit:
        assert self.packing is not None
        shape, blocksize, quant_type = self.packing
        scales = (p.absmax_8bit, p.absmax_code, p.absmax_offset)
        return Packed4bit(p.weight, shape, p.absmax, blocksize, quant_type, *scales)

    @property
    def shares(self) -> tuple[float, float]:
        """The scale as two factors: of ``x Aᵀ``, at most 1, and of B, a power of two.

        So neither is rounded once more, and ``x Aᵀ`` is as far from fp16's limit as in the model's own order.
        """
        if not isinstance(self.scale, (int, float)):
            return 1.0, self.scale  # a symbol: what is asked of it would be a guard
        power = 2.0 ** max(0, ceil(log2(abs(self.scale)))) if self.scale else 1.0
        return self.scale / power, power

    @property
    def may_extend(self) -> bool:
        """Whether the weight is made for it, in the one 16-bit dtype that the adapter and the result have."""
        return (
            (self.packing is not None or self.resident is not None)
            and self.compute == self.adapter == self.out
            and self.compute.itemsize == 2
        )


def tensors_of(weight: Tensor | Packed4bit | ResidentWeight) -> tuple[Slot, Slot, Slot, Slot, Slot]:
    """The weight, or its packed data, and the scales of that, as ``Operands`` begins."""
    if isinstance(weight, ResidentWeight):
        return weight.data, None, None, None, None
    if isinstance(weight, Packed4bit):
        return weight.data, weight.absmax, weight.absmax_8bit, weight.absmax_code, weight.absmax_offset
    return weight, None, None, None, None


def unflatten(tensors: Sequence) -> list[Operands]:
    """Each projection's, of those of all in one row, as autograd's functions take them."""
    width = len(Operands._fields)
    return [Operands(*tensors[i : i + width]) for i in range(0, len(tensors), width)]


def stacked(matrices: list[Tensor], dim: int) -> Tensor:
    """``torch.cat``, but that one alone is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def with_update(
    projection: Projection, left: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, b: Tensor
) -> Tensor:
    """``left weightᵀ + bias + scale · down Bᵀ``, in the projection's ``out``.

    Where all dtypes are one, the update is made first and the base's own product adds to it: it reads that
    while it computes, where the update's short product, added to the base, would wait for every byte. Else
    they are summed in the widest.
    """
    up = b.to(projection.adapter).t()
    if projection.compute == projection.adapter == projection.out:
        update = (
            scaled_product(down, up, projection.scale, left.narrow(1, 0, 1))
            if bias is None
            else torch.addmm(bias, down, up, alpha=projection.scale)
        )
        return add_product(update, left, weight.t())
    wide = torch.promote_types(torch.promote_types(projection.compute, projection.adapter), projection.out)
    base = F.linear(left, weight, bias)
    return (base.to(wide) + (down @ up).to(wide) * projection.scale).to(projection.out)


def accumulate(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + left right``, in no narrower a dtype than ``dtype``, a total's or the product's."""
    if total is None:
        return (left @ right).to(torch.promote_types(left.dtype, dtype))
    if total.dtype == left.dtype:
        return add_product(total, left, right)
    return total + left @ right


def scaled_product(left: Tensor, right: Tensor, scale: float, shape: Tensor) -> Tensor:
    """``scale · left right``, rounded once; of ``shape``, which may broadcast, only the shape counts."""
    return torch.addmm(shape, left, right, beta=0, alpha=scale)
