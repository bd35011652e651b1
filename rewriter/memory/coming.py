"""Which tensors a backward should have back early, of those that it comes to next."""

from collections.abc import Sequence
from math import inf

from rewriter.memory.groups import Group
from rewriter.memory.tickets import Copy


def coming(groups: Sequence[Group], running: Group, wanted: Copy | None) -> tuple[list[Copy], float]:
    """The copies to begin, in the order of need, as far as there is room for them; and the room that is left.

    What is back early is bounded at each layer that runs until its use, by what is spare there.

    Args:
        groups: in the order of the forward, none after that of the layer that runs.
        running: of the layer that runs, which may have nothing to come.
        wanted: what is asked for now, and has its place.
    """
    ahead, most, before = 0, inf, running.spare
    due: list[Copy] = []
    for group in reversed(groups):
        most = min(most, ahead + group.spare.until(before))
        own, before, placed = ahead + group.spare.back, group.spare, group.places_wholes
        for copy in group.copies:
            if copy is wanted:
                continue
            nbytes = copy.layout.nbytes
            if placed and not copy.tile:
                own += nbytes
            if ahead + nbytes > most or ahead + nbytes > own:
                return due, min(most, own) - ahead
            ahead += nbytes
            if copy.device is None:
                due.append(copy)
        most = min(most, own)
    return due, most - ahead
