"""Which tensors a backward should have back early, of those that it comes to next."""

from collections.abc import Sequence
from math import inf

from rewriter.memory.groups import Group
from rewriter.memory.tickets import Copy


def coming(groups: Sequence[Group], wanted: Copy | None) -> list[Copy]:
    """The copies to begin, in the order of need, as far as there is room for them.

    While a layer runs, what is back for it is bounded by its window and its spare bytes; what is back for
    those below it by the window of the next one, and the same bytes.

    Args:
        groups: in the order of the forward, the last that of the layer that runs.
        wanted: what is asked for now, and has its place.
    """
    ahead, allowed, within, above = 0, inf, inf, inf
    due: list[Copy] = []
    for group in reversed(groups):
        if group.window is not None:
            within = min(within, above + group.window)
            above = ahead + group.spare.back
            allowed = min(within, above + group.window)
        for copy in group.copies:
            if copy is wanted or copy.given >= copy.uses:
                continue
            ahead += copy.layout.nbytes
            if ahead > max(allowed, copy.layout.nbytes):
                return due
            if copy.device is None:
                due.append(copy)
    return due
