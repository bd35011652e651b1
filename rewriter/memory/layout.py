"""How a tensor lies in its memory, so that its bytes can be moved in one piece and put back as they lay.

The piece is everything from the first element to the last. For a permuted tensor that is each element once,
for an expanded one each element that exists once, and for a slice the gaps as well: a compiled backward
asserts the strides that it was compiled for, so that they are kept at that price.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Shape, strides and dtype; ``nbytes`` from the first element to the last."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int

    @staticmethod
    def of(tensor: torch.Tensor) -> "Layout":
        """Raises ValueError for a tensor whose bytes are not its values: sparse, or lazily conjugated."""
        if tensor.layout != torch.strided:
            raise ValueError(
                f"offload: a tensor of layout {tensor.layout} has no strides; give its parts instead."
            )
        if tensor.is_conj() or tensor.is_neg():
            raise ValueError(
                "offload: the tensor is lazily conjugated or negated: give it resolved, by resolve_conj()."
            )
        return Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, _span(tensor) * tensor.itemsize)

    def empty(self, device: torch.device) -> torch.Tensor:
        """A tensor of this layout, its values undefined."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of ``tensor``, from its first element to its last, as a flat tensor of bytes."""
    return tensor.detach().as_strided((_span(tensor),), (1,)).view(torch.uint8)


def _span(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
