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

    Attributes:
        number: groups that are made later have higher ones.
        forward: how many forwards had been announced when it was made.
        window: as ``Transfers.group`` says.
        spare: what of its copies and of others' may be under way.
        copies: in the order in which the backward asks for them, where somebody has said which it is, else in
            that of the offloads.
        whole: bytes of those that were not sent in tiles.
    """

    def __init__(self, transfers: "Transfers", number: int, forward: int, window: int, spare: Spare):
        self._transfers = weakref.ref(transfers)
        self.number, self.forward, self.window, self.spare = number, forward, window, spare
        self._outer: Group | None = None
        self.copies: list[Copy] = []
        self.whole = 0
        self.closed = False

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
        """The group is complete: no more than is spare for it is held on its way out from now on."""
        transfers = self._transfers()
        if transfers is not None and not self.closed:
            self.closed = True
            transfers._complete(self)

    def precedes(self, running: "Group") -> bool:
        """Whether the backward that is at ``running`` has yet to end it; it may be that group itself.

        Groups of a forward before have a backward of their own, which may be far or never come.
        """
        return self.forward == running.forward and self.number <= running.number

    @property
    def places_wholes(self) -> bool:
        """Whether the backward counts from its beginning what was sent whole: it exceeds the window."""
        return self.whole > self.window

    def will_need(self, tickets: Sequence[Ticket]) -> None:
        """Say in which order the backward asks for them."""
        place = {id(ticket._copy): i for i, ticket in reversed(list(enumerate(tickets)))}
        self.copies.sort(key=lambda copy: place.get(id(copy), len(place)))
