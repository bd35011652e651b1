"""The memory that recordings run in: blocks that longer ones can use too, and tensors that borrow it.

A CUDA graph keeps the pool it was captured into, and what was free at the end of one capture is where the
next puts its tensors. A tensor that lives on after its capture takes that room from all others; a result or a
gradient is read before any recording runs again, and need not. ``borrowed`` makes a tensor of the same memory
that the allocator does not count, and that keeps the graph, and so the pool, for as long as it is there.

The pool should lie in few blocks: of blocks as small as the tensors of one length, a longer one could use
none. ``Segments.lacking`` says what to add before a capture. Large tensors that a forward keeps would fill a
block to the end, had it no transients. The largest of these, a layer's weight or a loss' logits, needs its
place in one piece when all else is there, the backward's as well, and the allocator's best fit leaves about
as much in pieces. Where a transient finds no place it makes a block of its own. How much room saves how many
of them depends on every tensor's size, by no rule. So the first recording is made with more and more room
(``ROOMS``), each time in a pool of its own, and the smallest stays. A device computes nothing while it is
recorded.

All of this is for PyTorch's own allocator. Of another (``backend:cudaMallocAsync``) no block is known: none
is made, nothing is borrowed, and gradients are copied.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of how many of the largest transients a block has room, beside what is kept.
ROOMS = (1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5)
_WORTH = 2**25  # bytes of a pool that are worth one more recording, at least


class _Loan:
    """Memory, by ``__cuda_array_interface__``: a tensor made of it keeps it alive, and it ``keeper``."""

    def __init__(self, address: int, size: int, keeper: Any):
        self.keeper = keeper
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def borrowed(tensor: Tensor, keeper: Any) -> Tensor:
    """A tensor of the same memory that is no owner of it, but keeps ``keeper`` alive.

    Its storage is as large as itself. For tensors that are not empty and of no negative stride.
    """
    loan = _Loan(tensor.data_ptr(), extent(tensor), keeper)
    with torch.no_grad():
        memory = torch.as_tensor(loan, device=tensor.device)
        return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


@dataclass(frozen=True)
class Segments:
    """What the allocator has for a pool, as ``torch.cuda.memory_snapshot`` tells it."""

    found: Sequence[dict]

    @classmethod
    def of(cls, pool: Sequence[int], device: torch.device) -> "Segments":
        """Those of ``pool``; none where the allocator is not PyTorch's own, of which nothing is known."""
        if torch.cuda.get_allocator_backend() != "native":
            return cls(())
        segments = torch.cuda.memory_snapshot(pool, include_traces=False)
        own = (s for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))
        return cls(_of_device(own, device))

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory, of which there has to be some, is the pool's."""
        start = tensor.data_ptr()
        end = start + extent(tensor)
        return any(s["address"] <= start and end <= s["address"] + s["total_size"] for s in self.found)

    @property
    def large(self) -> int:
        """Bytes for tensors of more than 1 MiB."""
        return sum(s["total_size"] for s in self.found if s["segment_type"] == "large")

    def lacking(self, size: int) -> list[int]:
        """What to allocate, all at once, so that tensors of more than 1 MiB may take ``size`` bytes.

        The last is what the pool lacks of them. Before it come the free blocks that are as large: one of
        them would be taken instead of a new one.
        """
        large = [s for s in self.found if s["segment_type"] == "large"]
        lack = size - self.large
        if lack <= 0:
            return []
        return [*sorted(free for s in large for free in _free(s) if free >= lack), lack]


@dataclass(frozen=True)
class Needs:
    """Bytes of a forward.

    Attributes:
        kept: what it leaves.
        large: of that, tensors of more than 1 MiB.
        transient: its largest transient, about.
    """

    kept: int
    large: int
    transient: int

    def size(self, room: float) -> int:
        """Of a block for the large tensors, with room for ``room`` transients."""
        return self.large + int(room * self.transient)


@dataclass(frozen=True)
class Reading:
    """What the allocator has at one moment, to be compared with an earlier one.

    Attributes:
        allocated: bytes of all tensors.
        large: bytes of those of more than 1 MiB; 0 where the allocator is not PyTorch's own.
        free: of each segment, by address, the largest block that is free.
    """

    allocated: int
    large: int
    free: dict[int, int]

    @classmethod
    def now(cls, device: torch.device) -> "Reading":
        allocated = torch.cuda.memory_allocated(device)
        if torch.cuda.get_allocator_backend() != "native":
            # Of its blocks nothing is known: none is made for the large ones beforehand.
            return cls(allocated, 0, {})
        large = torch.cuda.memory_stats(device)["allocated_bytes.large_pool.current"]
        # A snapshot is of all devices, and on another one a thread may be running a step of its own.
        found = _of_device(torch.cuda.memory_snapshot(include_traces=False), device)
        return cls(allocated, large, {s["address"]: max(_free(s), default=0) for s in found})

    def needs_since(self, before: "Reading") -> Needs:
        """What the forward needs that ran since ``before``, when nothing free was kept.

        What is free now in a segment that was not there held a transient, or what is left of one's place.
        """
        new = (free for address, free in self.free.items() if address not in before.free)
        return Needs(self.allocated - before.allocated, self.large - before.large, max(new, default=0))


def smallest(needs: Needs, pool_of: Callable[[int], int]) -> int:
    """Of the sizes of a block that ``ROOMS`` are, the one that the smallest pool came of.

    Larger ones are tried while more than one block was made beside it: the last seldom goes. And while the
    device has memory for them: one that was made can be made again.

    Args:
        pool_of: records with a block of a size, and tells how large the pool became: that size, or more.

    Raises:
        torch.OutOfMemoryError: there is no room for the first.
    """
    found: dict[int, int] = {}
    for size in dict.fromkeys(map(needs.size, ROOMS)):
        if found and min(found.values()) - size < max(_WORTH, int(1.2 * needs.transient)):
            break
        try:
            found[size] = pool_of(size)
        except torch.OutOfMemoryError:
            if not found:
                raise
            break
    return min(found, key=found.__getitem__)


def _of_device(segments: Iterable[dict], device: torch.device) -> list[dict]:
    index = torch.cuda.current_device() if device.index is None else device.index
    return [s for s in segments if s["device"] == index]


def _free(segment: dict) -> list[int]:
    return [b["size"] for b in segment["blocks"] if b["state"] == "inactive"]


def apart(tensors: Mapping[int, Tensor]) -> set[int]:
    """The keys of tensors that share no memory: of two that overlap, the first by address stays."""
    found, end = set(), 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() >= end:
            found.add(key)
            end = tensor.data_ptr() + extent(tensor)
    return found
