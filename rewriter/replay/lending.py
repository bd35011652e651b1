"""Gradients that are lent instead of copied: a recording's own memory, for callers who let go of it in time.

A recording writes its gradients to the same memory at each run, and autograd keeps what it is given as the
gradient of a parameter. Most callers drop gradients after each step; theirs need no copy, which would take
time and, beside what the recordings hold, memory: 0.3 GiB of 84 million adapter weights in fp32. Before any
recording runs again, which may write there, the holders of what was lent are counted. Where there are some,
as where gradients are accumulated, those of parameters are copied after all, and all from then on; while
other holders are left, no recording runs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, UntypedStorage, _foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
from torch._utils import _unflatten_dense_tensors


class Lent:
    """Tensors to be given out again and again, each of a storage that nobody else holds now."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = tuple(tensors)
        storages = [tensor.untyped_storage() for tensor in self.tensors]
        self.holders = {s._cdata: (s, _holders(s._cdata)) for s in storages}


class Lender:
    """Gives out tensors, and knows whether anybody holds one."""

    def __init__(self):
        self._lent: dict[int, tuple[UntypedStorage, int]] = {}
        self._copies = False

    def give(self, lent: Lent) -> Sequence[Tensor]:
        """Tensors of the same memory as those of ``lent``, or copies."""
        if self._copies:
            return _copies(lent.tensors)
        self._lent |= lent.holders
        return [tensor.detach() for tensor in lent.tensors]

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all that was lent may be written; gradients of ``parameters`` in the way become copies."""
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
        if gradient is not None and gradient.untyped_storage()._cdata in self._lent:
            parameter.grad = gradient.clone()

    def _held(self) -> bool:
        self._lent = {key: (s, n) for key, (s, n) in self._lent.items() if _holders(key) > n}
        return bool(self._lent)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, those of one dtype in one piece: some hundred by themselves take as many launches."""
    copies: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        same = [tensors[i] for i in places]
        piece = torch.empty(sum(t.numel() for t in same), dtype=dtype, device=same[0].device)
        views = _unflatten_dense_tensors(piece, same)
        _foreach_copy_(list(views), same)
        copies |= dict(zip(places, views, strict=True))
    return [copies[i] for i in range(len(tensors))]


def _holders(storage: int) -> int:
    return torch._C._storage_Use_Count(storage)
