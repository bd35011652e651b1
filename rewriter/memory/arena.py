"""One page-locked slab of host memory, sub-allocated: where offloaded activations wait for the backward.

Locking host memory takes longer than writing it once, so it is done once, for the plan's bytes, while the
plan's stages are compiled: the first block waits for it, and the others are handed out in microseconds. They
are 512-byte aligned and not rounded to powers of two. Where more is needed than was reserved, the arena grows
by another slab, up to its limit.

The arena orders nothing: whoever frees a block whose copy is under way must see to it that the next user's
copy comes later (``transfer.py`` does). Not for several threads at once. Refuses, naming the way out: more
than the limit, a block freed twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rewriter.memory.extents import Extents, aligned
from rewriter.memory.host_share import host_share
from rewriter.memory.pinned import HostSlab
from rewriter.size_text import size_text

_GROWTH = 2 << 30


class HostMemoryError(MemoryError):
    """Asked for more host memory than the arena may take."""


class Block:
    """A range of an arena; ``bytes`` is a tensor of just those bytes."""

    __slots__ = ("bytes", "owner", "slab", "start")

    def __init__(self, slab: "_Slab", start: int, memory: torch.Tensor, owner: object):
        self.slab, self.start, self.owner = slab, start, owner
        self.bytes = memory


class _Slab:
    def __init__(self, nbytes: int, *, pin: bool, device: torch.device | None):
        self.memory, self.extents = HostSlab(nbytes, pin=pin, device=device), Extents(nbytes)
        self.blocks: dict[int, Block] = {}


class HostArena:
    """At most ``limit`` bytes of host memory; by default ``host_share()``.

    ``pin``: page-lock it; by default where there is a CUDA device. ``growth``: the least bytes that a slab
    has which was not reserved. ``device``: as of ``HostSlab``.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        pin: bool | None = None,
        growth: int = _GROWTH,
        device: torch.device | None = None,
    ):
        self.limit = host_share() if limit is None else limit
        self.pin = torch.cuda.is_available() if pin is None else pin
        self.growth, self.device = growth, device
        self.in_use = self.peak = 0
        self._slabs: list[_Slab] = []

    @property
    def capacity(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.extents.capacity for slab in self._slabs)

    @property
    def pinned(self) -> bool:
        """Whether every slab is page-locked, once that is known."""
        return all(slab.memory.pinned for slab in self._slabs)

    def reserve(self, nbytes: int) -> None:
        """Have at least ``nbytes``, in use and free together; raises HostMemoryError past the limit.

        Returns at once: the first to allocate waits until the memory is locked.
        """
        needed = aligned(nbytes)
        if needed <= self.capacity:
            return
        if needed > self.limit:
            raise self._error("reserve", nbytes)
        # Slabs leave a rest in each: where the limit has no room for that, it is one if none is in use.
        if not self.in_use and needed + self.capacity > self.limit:
            self._drop_idle()
        self._add(needed - self.capacity)

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
        """``reserve`` for what is done within; where that fails, slabs that came for it are unlocked again.

        The arena is then what it was, or smaller where slabs had given way.
        """
        before = list(self._slabs)
        try:
            self.reserve(nbytes)
            yield
        except BaseException:
            self._drop([slab for slab in self._slabs if slab not in before and not slab.blocks])
            raise

    def allocate(self, nbytes: int, owner: object = None) -> Block:
        """A block of ``nbytes``, its contents undefined; ``owner`` is who frees it, for ``free_owned``.

        Raises HostMemoryError where it does not fit within the limit; nothing has changed then.
        """
        if nbytes < 0:
            raise ValueError(f"HostArena: a block of {nbytes} bytes was asked for; sizes are 0 or more.")
        block = self._place(nbytes, owner)
        if block is None:
            self._grow(nbytes)
            block = self._place(nbytes, owner)
            assert block is not None
        return block

    def free(self, block: Block) -> None:
        """Give ``block`` back; raises ValueError where it is not in use."""
        slab = block.slab
        if slab.blocks.get(block.start) is not block:
            raise ValueError(
                f"HostArena: the block of {block.bytes.numel()} bytes at {block.start} is freed twice; free "
                "a block once, when the copy that last reads it is ordered before any later one."
            )
        self.in_use -= slab.extents.taken[block.start]
        del slab.blocks[block.start]
        slab.extents.give_back(block.start)

    def free_owned(self, owner: object) -> None:
        """Free what ``owner`` has, also where an exception came in the middle of a call."""
        for slab in self._slabs:
            slab.blocks = {start: block for start, block in slab.blocks.items() if block.owner is not owner}
            slab.extents.taken = {start: aligned(b.bytes.numel()) for start, b in slab.blocks.items()}
            slab.extents.rebuild()
        self.in_use = sum(sum(slab.extents.taken.values()) for slab in self._slabs)

    def release(self) -> None:
        """Unlock and drop all slabs; raises ValueError where blocks are in use."""
        if self.in_use:
            raise ValueError(
                f"HostArena: released with {size_text(self.in_use)} in use; free its blocks first."
            )
        self._drop_idle()

    def _place(self, nbytes: int, owner: object) -> Block | None:
        for slab in self._slabs:
            # Before a range is taken: it waits for the lock, which can fail, as the wait can be interrupted.
            memory = slab.memory.bytes
            start = slab.extents.take(nbytes)
            if start is None:
                continue
            block = slab.blocks[start] = Block(slab, start, memory[start : start + nbytes], owner)
            self.in_use += aligned(nbytes)
            self.peak = max(self.peak, self.in_use)
            return block
        return None

    def _grow(self, nbytes: int) -> None:
        needed = aligned(nbytes)
        if self.capacity + needed > self.limit:
            # Slabs that hold nothing may give way to one that is large enough.
            idle = sum(slab.extents.capacity for slab in self._slabs if not slab.blocks)
            if self.capacity - idle + needed > self.limit:
                raise self._error("allocate", nbytes)
            self._drop_idle()
        self._add(max(needed, min(self.growth, self.limit - self.capacity)))

    def _add(self, nbytes: int) -> None:
        # Where locking failed once, it is not tried, nor warned of, again.
        self.pin = self.pin and self.pinned
        self._slabs.append(_Slab(nbytes, pin=self.pin, device=self.device))

    def _drop_idle(self) -> None:
        self._drop([slab for slab in self._slabs if not slab.blocks])

    def _drop(self, slabs: Sequence[_Slab]) -> None:
        # Out of the arena before anything is asked of them: a thread that failed to lock one raises here.
        self._slabs = [slab for slab in self._slabs if slab not in slabs]
        self.pin = self.pin and all(slab.memory.pinned for slab in slabs)
        for slab in slabs:
            slab.memory.close()

    def _error(self, verb: str, nbytes: int) -> HostMemoryError:
        largest = max((slab.extents.largest_free for slab in self._slabs), default=0)
        return HostMemoryError(
            f"HostArena: {verb} {size_text(nbytes)} with {size_text(self.in_use)} in use and "
            f"{size_text(largest)} the largest free range passes the host budget of {size_text(self.limit)}; "
            "give a larger host_budget, or a larger memory_budget, so that less is offloaded."
        )
