"""Gradients that are lent instead of copied: a recording's own buffer, for callers who let go of it in time.

A recording writes its gradients to the same memory at each run, and autograd keeps what it is given as the
gradient of a parameter. Most callers drop gradients after each step; theirs need no copy, which would take
time and, beside what the recordings hold, memory: 0.3 GiB of 84 million adapter weights in fp32. Before the
buffer may be written again its holders are counted. Where there are some, as where gradients are accumulated,
those of parameters are copied after all, and all from then on; while other holders are left, no recording
runs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


class Lender:
    """Gives out views of buffers, and knows whether anybody holds one."""

    def __init__(self):
        self._lent: dict[int, tuple[Tensor, int]] = {}
        self._copies = False

    def give(self, buffer: Tensor, shapes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views of ``buffer`` in the shapes of ``shapes``, or of a copy."""
        if self._copies:
            return _unflatten_dense_tensors(buffer.clone(), shapes)
        self._lent[buffer.data_ptr()] = buffer, _holders(buffer)
        return _unflatten_dense_tensors(buffer, shapes)

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all buffers may be written; ``parameters`` whose gradients stand in the way get copies."""
        if not self._held():
            return True
        self._copies = True
        for parameter in parameters:
            self._return(parameter)
        return not self._held()

    def forget(self) -> None:
        """To be called when no recording is left: who holds what was lent may keep it."""
        self._lent.clear()

    def _return(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and gradient.untyped_storage().data_ptr() in self._lent:
            parameter.grad = gradient.clone()

    def _held(self) -> bool:
        self._lent = {k: (buffer, n) for k, (buffer, n) in self._lent.items() if _holders(buffer) > n}
        return bool(self._lent)


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
