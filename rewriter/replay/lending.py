"""Gradients that are lent instead of copied: a recording's own memory, for callers who let go of it in time.

A recording writes its gradients to the same memory at each run, and autograd keeps what it is given as the
gradient of a parameter. Most callers drop gradients after each step; theirs need no copy, which would take
time and, beside what the recordings hold, memory: 0.3 GiB of 84 million adapter weights in fp32. Before any
recording runs again, which may write there, the holders of what was lent are counted. Where there are some,
as where gradients are accumulated, all are copied from then on, and those that a parameter alone has become
copies after all. While anyone else holds one, be it the very tensor that a parameter has, no recording runs:
what is held is then added to in place, as ever, and its holder sees it.

Who drops a gradient that another stream still reads has to say so, here as with any tensor: by having the
stream of the steps wait, or by ``record_stream``, which is heard (``side_streams``). The next recording waits
for the streams that were named.
"""

import functools
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, _foreach_copy_, nn  # pyright: ignore[reportPrivateImportUsage]
from torch._utils import _unflatten_dense_tensors


class _Place:
    """A storage, and how many hold it when it is not lent: tensors, and Python, which can hold it itself."""

    def __init__(self, tensor: Tensor):
        # Counted itself, it has to be there for as long as holders are asked for.
        self._tensor = tensor
        self._storage = tensor.untyped_storage()
        self._at_rest = self._count()

    def holders(self) -> int:
        return self._count() - self._at_rest

    def _count(self) -> int:
        return torch._C._storage_Use_Count(self._storage._cdata) + sys.getrefcount(self._storage)


class Lent:
    """Tensors to be given out again and again, each of a storage that nobody else holds now."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = tuple(tensors)
        self.places = {_storage_of(tensor): _Place(tensor) for tensor in self.tensors}


class Lender:
    """Gives out tensors, and knows whether anybody holds one."""

    def __init__(self):
        self._lent: dict[int, _Place] = {}
        self._streams: set[torch.Stream] = set()
        self._copies = False

    def give(self, lent: Lent) -> Sequence[Tensor]:
        """Tensors of the same memory as those of ``lent``, or copies."""
        if self._copies:
            return _copies(lent.tensors)
        self._lent |= lent.places
        return [tensor.detach() for tensor in lent.tensors]

    def used_on(self, tensor: Tensor, stream: torch.Stream) -> None:
        """To be told that ``stream`` uses a tensor, which may be one that was lent."""
        if self._lent and _storage_of(tensor) in self._lent:
            self._streams.add(stream)

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all that was lent may be written, once ``take_streams`` are done.

        Gradients in the way that the ``parameters`` alone hold become copies, unless others are held.
        """
        self._lent = {key: place for key, place in self._lent.items() if place.holders()}
        if not self._lent:
            return True
        self._copies = True
        owners = {_storage_of(p.grad): p for p in parameters if p.grad is not None}
        if not all(key in owners and self._is_its_own(key, owners[key]) for key in self._lent):
            return False
        for key in self._lent:
            _own(owners[key])
        self._lent.clear()
        return True

    def take_streams(self) -> set[torch.Stream]:
        """Streams that used what was lent since they were last asked for."""
        streams = set()
        # One by one: another thread may say at any time that a stream of its own uses what it was lent.
        while self._streams:
            streams.add(self._streams.pop())
        return streams

    def forget(self) -> None:
        """To be called when no recording is left: who holds what was lent may keep it.

        What streams were said to use is still read: they are told by ``take_streams`` as ever.
        """
        self._lent.clear()

    def _is_its_own(self, key: int, parameter: Tensor) -> bool:
        return self._lent[key].holders() == 1 and _gradient_holders(parameter) == _holders_alone()


def _own(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.clone()


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _gradient_holders(parameter: Tensor) -> int:
    assert parameter.grad is not None
    held_in_c = parameter.grad._use_count()  # pyright: ignore[reportAttributeAccessIssue]
    return sys.getrefcount(parameter.grad) + held_in_c


@functools.cache
def _holders_alone() -> int:
    """``_gradient_holders`` where there is none but the parameter; what is counted differs by release."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    return _gradient_holders(parameter)


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
