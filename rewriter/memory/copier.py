"""One tensor to host memory and back, each copy on a stream of its own and ordered by events.

    copy = copier.send(tensor, ...)       # the device goes on; the tensor is held as the copy's source
    copier.give_up(copy)                  # whatever computes in its memory next comes after the copy
    copier.fetch(copy)                    # the device goes on; ``copy.arrived`` is what to wait for
    copier.end(copy)                      # the host block is free for copies that are ordered later

When each of these is due is for others to say (``transfer.py``). Per byte: one read and one write of the bus,
which moves 55 GB/s a direction beside matrix products on an H200 (PCIe 5).
"""

from dataclasses import dataclass
from typing import Any

import torch

from rewriter.memory.arena import Block, HostArena
from rewriter.memory.groups import Group
from rewriter.memory.layout import Layout, bytes_of
from rewriter.memory.streams import InOrder, SideStreams
from rewriter.memory.tickets import Copy, version_of

# All bits set are a NaN in float64, float32, float16, bfloat16 and the usual float8 formats.
_POISON = 255


@dataclass
class TransferStats:
    """What was moved since the beginning.

    Attributes:
        bytes_out, bytes_in: copied to the host, and back.
        bytes_spared: reloaded without a copy, since the device still had them.
        prefetches_skipped: times that a copy back found no device memory ahead of its use; it began there.
    """

    bytes_out: int = 0
    bytes_in: int = 0
    bytes_spared: int = 0
    prefetches_skipped: int = 0


class Copier:
    """Copies between ``device`` and blocks of ``arena``, on ``streams``; ``poison`` as of ``Transfers``."""

    def __init__(
        self, arena: HostArena, device: torch.device, streams: SideStreams | InOrder, *, poison: bool
    ):
        self.arena, self.device, self.streams, self.poison = arena, device, streams, poison
        self.stats = TransferStats()

    def send(
        self, tensor: torch.Tensor, layout: Layout, group: Group, epoch: int, tile: bool, owner: object
    ) -> Copy:
        """The copy of ``tensor`` to a block of ``owner``'s, begun once the computing stream has made it.

        Raises:
            HostMemoryError: the arena's limit does not allow it; nothing has changed then.
        """
        source = tensor.detach()
        block = self.arena.allocate(layout.nbytes, owner=owner) if layout.nbytes else None
        copy = Copy(source, layout, block, version_of(tensor), group, epoch, tile)
        out = self.streams.out
        out.wait_stream(self.streams.compute())
        if block is not None:
            with self.streams.on(out):
                block.bytes.copy_(bytes_of(source), non_blocking=True)
        copy.left = out.record_event()
        self.stats.bytes_out += layout.nbytes
        return copy

    def give_up(self, copy: Copy) -> None:
        """Its source's memory, to whatever computes after the copy."""
        self.streams.compute().wait_event(copy.left)
        self.let_go(copy)

    def let_go(self, copy: Copy) -> None:
        """The same where the computing stream waits already."""
        source = copy.take_source()
        if self.poison and _held_by_nobody_else(source):
            bytes_of(source).fill_(_POISON)

    def fetch(self, copy: Copy) -> None:
        """Begin the copy back, where it has not begun; there is none where the device still has the source.

        Raises:
            torch.OutOfMemoryError: the device has no room; nothing has changed then.
        """
        if copy.device is not None:
            return
        if copy.source is not None:
            copy.device, copy.arrived = copy.take_source(), copy.left
            self.stats.bytes_spared += copy.layout.nbytes
            return
        compute, back = self.streams.compute(), self.streams.back
        device = copy.layout.empty(self.device)
        if self.poison:
            bytes_of(device).fill_(_POISON)
        # It has waited for the copy out, too, before the source was given up.
        back.wait_stream(compute)
        try:
            if copy.block is not None:
                with self.streams.on(back):
                    bytes_of(device).copy_(copy.block.bytes, non_blocking=True)
            copy.arrived, copy.device = back.record_event(), device
        except BaseException:
            # The memory goes to whoever computes next, and a copy into it may have begun.
            compute.wait_stream(back)
            raise
        self.stats.bytes_in += copy.layout.nbytes

    def abandon(self, copy: Copy) -> None:
        """One that nobody will ask for: the computing stream waits for what of it is under way."""
        compute = self.streams.compute()
        compute.wait_event(copy.left)
        if copy.arrived is not None:
            compute.wait_event(copy.arrived)
        if copy.source is not None:
            self.let_go(copy)
        copy.arrived = copy.left if copy.arrived is None else copy.arrived

    def end(self, copy: Copy) -> None:
        """Free its block; the computing stream waits for the copy back, and the block's next for that."""
        block, copy.block, copy.device = copy.block, None, None
        if block is None:
            return
        if self.poison:
            self._poison_block(block, copy.arrived)
        self.arena.free(block)

    def _poison_block(self, block: Block, after: Any) -> None:
        back = self.streams.back
        back.wait_event(after)
        with self.streams.on(back):
            poison = torch.full((block.bytes.numel(),), _POISON, dtype=torch.uint8, device=self.device)
            block.bytes.copy_(poison, non_blocking=True)
        # The block's next use is a copy out. The computing stream does not wait here: it would hide that it
        # did not wait where it must.
        self.streams.out.wait_event(back.record_event())


def _held_by_nobody_else(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    # One for the tensor, one for the Python object that was just made to ask.
    return torch._C._storage_Use_Count(storage._cdata) <= 2
