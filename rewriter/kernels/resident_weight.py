"""A frozen 4-bit weight that was dequantised once: what ``lora_linears`` takes in a packed one's place.

Every use of a packed weight reads 0.5 bytes a weight and writes 2, forward and backward: of 32 layers of 8B,
35 GB of a step whatever its length. One that stays is written once. It is what the uses of the packed one
would make, with their room for an adapter where ``lora_extended`` gives them one, so that products read the
same operands and give the same bits; whoever keeps it writes the adapter's matrix in before each forward.
A weight that its forward and its backward want with different rooms is refused: it would be there twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .dequantize import Packed4bit, dequantize_4bit, dequantize_4bit_extended


class ResidentWeight(NamedTuple):
    """``data``: (N, K) of the product's dtype, or with the room of its form; ``shape``: (N, K)."""

    data: Tensor
    shape: tuple[int, int]


class Form(NamedTuple):
    """What stays of a weight: ``[W | 0 | scale · B | 0]``, or where ``dim`` is 0 ``[W ; 0 ; scale · A ; 0]``.

    Attributes:
        dtype: of the product.
        room: columns or rows beside the weight; 0 for none.
        start: how many of them are before the matrix.
        rank: how many of them are the matrix's.
        scale: times the matrix; a power of two from 1 on.
    """

    dtype: torch.dtype
    dim: int = 0
    room: int = 0
    start: int = 0
    rank: int = 0
    scale: float = 1.0

    def shape(self, weight: tuple[int, int]) -> tuple[int, int]:
        """Of the whole, the weight being (N, K)."""
        n, k = weight
        return (n, k + self.room) if self.dim else (n + self.room, k)

    def made(self, packed: Packed4bit, matrix: Tensor | None) -> Tensor:
        """The whole, from the packed weight and the adapter's matrix where there is a room."""
        if matrix is None:
            return dequantize_4bit(packed, self.dtype)
        return dequantize_4bit_extended(
            packed, self.dtype, matrix, self.dim, self.room, self.start, self.scale
        )

    def place(self, whole: Tensor) -> Tensor:
        """Where the matrix is in ``whole``: a view."""
        return whole.narrow(self.dim, whole.shape[self.dim] - self.room + self.start, self.rank)
