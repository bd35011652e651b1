"""Hands out ranges of one address space: numbers only, no memory.

Best fit: of the free ranges that are large enough, the smallest, and of equal ones the lowest. Neighbouring
free ranges are one range, always. Sizes are rounded to ``ALIGNMENT`` bytes and no further: PyTorch's own
pinned allocator rounds to powers of two, which turns a 2.8 GB tensor into 4 GiB of host memory.
"""

from bisect import bisect_left

# A copy engine's burst, and what PyTorch's device allocator aligns to.
ALIGNMENT = 512


def aligned(nbytes: int) -> int:
    """``nbytes`` as handed out: rounded up, and never nothing, so that each range has its own start."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class Extents:
    """The ranges in use and the free ones of ``[0, capacity)``."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.taken: dict[int, int] = {}
        self.free: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    @property
    def largest_free(self) -> int:
        return max((end - start for start, end in self.free), default=0)

    def take(self, nbytes: int) -> int | None:
        """The start of a range of ``aligned(nbytes)`` bytes, None where no free range is large enough."""
        size = aligned(nbytes)
        fitting = [(end - start, i) for i, (start, end) in enumerate(self.free) if end - start >= size]
        if not fitting:
            return None
        _, best = min(fitting)
        start, end = self.free[best]
        self.free[best : best + 1] = [(start + size, end)] if end - start > size else []
        self.taken[start] = size
        return start

    def give_back(self, start: int) -> None:
        """Free the range that begins at ``start``; a KeyError where none in use does."""
        end = start + self.taken.pop(start)
        first = last = bisect_left(self.free, (start, end))
        if first and self.free[first - 1][1] == start:
            first -= 1
            start = self.free[first][0]
        if last < len(self.free) and self.free[last][0] == end:
            end = self.free[last][1]
            last += 1
        self.free[first:last] = [(start, end)]

    def rebuild(self) -> None:
        """Work the free ranges out again from those in use: an interrupt may have left some out."""
        self.free, end = [], 0
        for start in sorted(self.taken):
            if start > end:
                self.free.append((end, start))
            end = start + self.taken[start]
        if self.capacity > end:
            self.free.append((end, self.capacity))
