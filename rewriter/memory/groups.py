"""Tensors that leave the device together, as those of one call of a region."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewriter.memory.spare import Spare
from rewriter.memory.tickets import Copy, Ticket

if TYPE_CHECKING:
    from rewriter.memory.transfer import Transfers


class Group:
    """Tensors that are offloaded, given up and reloaded together; offloads in its context are its.

    ``window``: as ``Transfers.group`` says, ``spare``: bytes beyond it, ``bound``: all that may be held on
    its way out when one of its tensors leaves. ``copies`` are in the order in which the backward asks for
    them, where somebody has said which it is, else in that of the offloads.
    """

    def __init__(
        self,
        transfers: "Transfers",
        window: int | None = None,
        spare: Spare | None = None,
        bound: int | None = None,
    ):
        self._transfers = weakref.ref(transfers)
        self.window, self.spare, self.bound = window, spare or Spare(), bound
        self._outer: Group | None = None
        self.copies: list[Copy] = []
        self.closed = self.returning = False

    def __enter__(self) -> "Group":
        transfers = self._transfers()
        assert transfers is not None
        self._outer, transfers._group = transfers._group, self
        return self

    def __exit__(self, *_: object) -> None:
        transfers = self._transfers()
        assert transfers is not None
        transfers._group = self._outer
        self.close()

    def close(self) -> None:
        """The group is complete: the ``depth``-th complete one before it is given up."""
        transfers = self._transfers()
        if transfers is not None and not self.closed:
            self.closed = True
            transfers._complete(self)

    def will_need(self, tickets: Sequence[Ticket]) -> None:
        """Say in which order the backward asks for them."""
        place = {id(ticket._copy): i for i, ticket in reversed(list(enumerate(tickets)))}
        self.copies.sort(key=lambda copy: place.get(id(copy), len(place)))
