"""Sends activations to host memory during the forward, and has them back when the backward asks.

    with transfers.group():                   # one a region's call
        ticket = transfers.offload(tensor)    # forward: returns at once
    ...
    tensor = transfers.reload(ticket)         # backward: returns at once; computing waits for the copy

Nothing here makes the host wait. The device orders everything by events, and all orders go through the
computing stream:

- an offload begins once the computing stream has made the tensor;
- the tensor's memory is given up only after the computing stream has been told to wait for the copy, so that
  whatever computes in that memory next comes later. ``record_stream`` would instead hold memory until the
  host happens to see the copy done: with the host far ahead, for ever;
- a group's ``window`` bounds by bytes what is on its way out: the oldest is given up first. So its copies
  have as long to run beside the computation as the window lasts;
- as a layer's backward begins (``begin_own``, ``begin_backward``), and at each reload, what comes next is
  started, of whichever group of that forward, within the window too. Its memory is the computing stream's,
  so each copy waits for what was computed in it before. Where a plan leaves more free than a window, it says
  so (``expect``);
- a host block is freed after the computing stream has been told to wait for the copy from it; the next
  offload into it waits for the computing stream.

What has not been given up when it is reloaded needs no copy back. The copies themselves are made in
``copier.py``.

The source must not be written between its offload and its reload. One ``Transfers`` serves one model, one
thread at a time. Refuses tensors that are sparse or lazily conjugated or negated, and tickets used twice.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from rewriter.memory.arena import HostArena
from rewriter.memory.coming import coming
from rewriter.memory.copier import Copier
from rewriter.memory.groups import Group
from rewriter.memory.layout import Layout
from rewriter.memory.leaving import Leaving
from rewriter.memory.spare import Spare
from rewriter.memory.streams import streams_of, with_index
from rewriter.memory.tickets import Copy, Ticket, identity
from rewriter.memory.weights_ahead import WeightsAhead


class Transfers:
    """Copies between ``device`` and the blocks of ``arena``.

    Args:
        arena: where offloaded tensors wait.
        device: the one that computes. Without streams, as the CPU, every copy is made at once.
        poison: fill memory with NaN as soon as others may use it, to show a wait that is missing. Slow.

    Attributes:
        weights: of layers, from host memory, on the same streams.
    """

    def __init__(self, arena: HostArena, device: torch.device | str, *, poison: bool = False):
        self.arena = arena
        self.device = with_index(torch.device(device))
        streams = streams_of(self.device)
        self._copier = Copier(arena, self.device, streams, poison=poison)
        self.stats = self._copier.stats
        self.weights = WeightsAhead(self.device, streams, poison)
        self._groups: list[Group] = []
        self._leaving = Leaving(self._copier.give_up)
        self._group: Group | None = None
        self._numbers = itertools.count()
        self._tickets: weakref.WeakValueDictionary[tuple, Ticket] = weakref.WeakValueDictionary()
        self._abandoned: deque[Copy] = deque()
        # Of what is not over, only what was offloaded since the last reset is good.
        self._epoch = 0

    def expect(self, spares: Iterable[Spare]) -> int:
        """A forward begins: say what is spare for its groups, in order. Returns its number."""
        self._leaving.expect(spares)
        return self._leaving.forwards

    def group(self, window: int = 0) -> Group:
        """A new group: for ``with``, or for ``offload(tensor, group)`` and then ``group.close()``.

        Args:
            window: bytes on their way out that may be held when one of its tensors leaves, and that may be
                back on the device before they are asked for.
        """
        return Group(self, next(self._numbers), self._leaving.forwards, window, self._leaving.spare(window))

    def offload(self, tensor: torch.Tensor, group: Group | None = None, *, tile: bool = False) -> Ticket:
        """Copy ``tensor`` (any shape and strides) to the arena.

        It belongs to ``group``, else to the group around the call, else to one of its own. What is no
        ``tile`` has a place beside the group's window until the group is complete.

        A tensor that is on its way already gets the same ticket, which is then reloaded once for each
        offload. Strides are kept; the bytes between the first element and the last are copied, so a slice of
        something much larger is better packed first. Raises HostMemoryError where the arena's limit does not
        allow it; nothing has changed then.
        """
        self._drain()
        target = group or self._group
        if target is None:
            with self.group() as alone:
                return self.offload(tensor, alone, tile=tile)
        if target.closed:
            raise ValueError("offload: the group is closed; offload into a group that is not complete yet.")
        if tensor.device != self.device:
            raise ValueError(
                f"offload: the tensor is on {tensor.device}, the transfers are of {self.device}."
            )
        layout = Layout.of(tensor)
        self._find_lost()
        ticket = self._share(tensor, target)
        return self._send(tensor, layout, target, tile) if ticket is None else ticket

    def reload(self, ticket: Ticket) -> torch.Tensor:
        """The tensor of ``ticket``, equal in values, shape and strides; detached.

        Raises ValueError for a ticket that was reloaded, or dropped by ``reset`` or ``forget``; RuntimeError
        for a tensor written since its offload; torch.OutOfMemoryError where the device has no room, and the
        ticket is still good then.
        """
        self._drain()
        copy = ticket._copy
        if not self._is_good(copy):
            raise ValueError(
                "reload: the ticket was reloaded already, or dropped by reset() or forget(); offload the "
                "tensor as often as it is read, and run the forward again after a failure."
            )
        self._copier.fetch(copy)
        self._fetch_ahead(copy.group, copy)
        if copy.written:
            raise RuntimeError(
                f"reload: the tensor of shape {copy.layout.shape} was written in place after its offload; "
                "offload a clone, or write to one."
            )
        self._copier.streams.compute().wait_event(copy.arrived)
        tensor = copy.device
        assert tensor is not None
        copy.uses -= 1
        if not copy.uses:
            self._finish(copy)
        return tensor

    def begin_own(self, group: Group) -> None:
        """As ``begin_backward``, which comes after, but of what ``group``'s own layer asks for alone."""
        self._drain()
        self._try_coming([group], group, None)

    def begin_backward(self, group: Group) -> None:
        """The backward of ``group``'s layer begins: what it and those before it ask for is started.

        Also where the layer has sent nothing. What is still on its way out has its place among that.
        """
        self._drain()
        self._fetch_ahead(group, None)

    def forget(self, forward: int) -> None:
        """Give back what the forward of that number sent: it failed, or its backward did.

        Whoever keeps the exception has its tickets by the frames of the traceback; they are void.
        """
        self._drain()
        for copy in [c for group in self._groups if group.forward == forward for c in group.copies]:
            self._give_back(copy)

    def reset(self) -> None:
        """Wait for all copies, on the host, and give everything back; for use after an exception in mid-step.

        All tickets are void. The next step begins as the first one did.
        """
        self._copier.streams.synchronize()
        self.weights.let_go()
        self._epoch += 1
        for group in self._groups:
            for copy in group.copies:
                copy.source = copy.device = copy.block = None
            group.copies = []
        self._groups.clear()
        self._leaving.clear()
        self._abandoned.clear()
        self._tickets.clear()
        self._group = None
        self.arena.free_owned(self)

    def _share(self, tensor: torch.Tensor, group: Group) -> Ticket | None:
        ticket = self._tickets.get(identity(tensor))
        # Once the source is given up, the same address is another tensor.
        if ticket is None or (copy := ticket._copy).source is None:
            return None
        # One of the two may fail, and the other not.
        if copy.group.forward != group.forward:
            return None
        copy.uses += 1
        # The backward comes to the latest group first.
        copy.group.copies.remove(copy)
        self._forget_empty(copy.group)
        self._enter(copy, group)
        return ticket

    def _send(self, tensor: torch.Tensor, layout: Layout, group: Group, tile: bool) -> Ticket:
        copy = self._copier.send(tensor, layout, group, self._epoch, tile, owner=self)
        # Before anything holds the copy: an interrupt from here on abandons it, as dropping the ticket does.
        ticket = Ticket(copy, self._abandoned)
        self._enter(copy, group)
        self._tickets[identity(tensor)] = ticket
        group.whole += 0 if tile else layout.nbytes
        self._leaving.add(copy, group)
        return ticket

    def _enter(self, copy: Copy, group: Group) -> None:
        if not group.copies:
            self._groups.append(group)
        group.copies.append(copy)
        copy.group = group

    def _complete(self, group: Group) -> None:
        self._drain()
        self._leaving.hold_at_most(group.spare.left)

    def _fetch_ahead(self, running: Group, wanted: Copy | None) -> None:
        """Begin what comes next while the layer of ``running`` runs, within what is spare there."""
        self._try_coming([group for group in self._groups if group.precedes(running)], running, wanted)

    def _try_coming(self, groups: Sequence[Group], running: Group, wanted: Copy | None) -> None:
        due, room = coming(groups, running, wanted)
        self._try(self._leaving.making_room(due, room))

    def _try(self, copies: Iterable[Copy]) -> None:
        try:
            for copy in copies:
                self._copier.fetch(copy)
        except torch.OutOfMemoryError:
            # The step can still succeed: this copy then begins at its use.
            self.stats.prefetches_skipped += 1

    def _finish(self, copy: Copy) -> None:
        copy.uses = 0
        # An interrupt may have come before it was there.
        if copy in copy.group.copies:
            copy.group.copies.remove(copy)
        self._forget_empty(copy.group)
        self._copier.end(copy)

    def _forget_empty(self, group: Group) -> None:
        if not group.copies and group in self._groups:
            self._groups.remove(group)

    def _drain(self) -> None:
        """Give back what nobody holds a ticket of: a forward had no backward, or one that failed."""
        while self._abandoned:
            copy = self._abandoned.popleft()
            if self._is_good(copy):
                self._give_back(copy)

    def _give_back(self, copy: Copy) -> None:
        self._copier.abandon(copy)
        self._finish(copy)

    def _find_lost(self) -> None:
        """Give back what an interrupt inside a call left with nobody, where nothing else is under way."""
        if any(copy.uses for group in self._groups for copy in group.copies):
            return
        if self.arena.in_use:
            self._copier.streams.synchronize()  # its copies may be
        self._groups.clear()
        self.arena.free_owned(self)

    def _is_good(self, copy: Copy) -> bool:
        return copy.uses > 0 and copy.epoch == self._epoch
