"""Whether tensors are the ones that were looked at, where they lay then, and not written since.

Asked at every step of some thousand tensors, so that it does no more than compare lists. They are not kept
alive, and a tensor that comes to lie in the memory of one that is gone is another. Writes are seen by
PyTorch's counter; those past it, as through ``.data``, are not.
"""

import weakref
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor


class Seen:
    """How ``tensors`` were."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._refs = [weakref.ref(x) for x in tensors]
        self._addresses, self._versions = addresses(tensors), versions(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are those, as they were."""
        return (
            all(map(is_, (ref() for ref in self._refs), tensors))
            and self._addresses == addresses(tensors)
            and self._versions == versions(tensors)
        )

    def are_there(self) -> bool:
        """Whether all of them still lie where they did."""
        tensors = [x for ref in self._refs if (x := ref()) is not None]
        return len(tensors) == len(self._refs) and self._addresses == addresses(tensors)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    # Subclasses, as those of 4-bit weights, would be asked first, a microsecond or two each.
    with torch._C.DisableTorchFunctionSubclass():
        return [x.data_ptr() for x in tensors]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written; -1 where nobody counts."""
    with torch._C.DisableTorchFunctionSubclass():
        return [-1 if x.is_inference() else x._version for x in tensors]
