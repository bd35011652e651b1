"""Tensors on their way to host memory, in the order of their copies, and how many bytes of them are held."""

from collections import deque
from collections.abc import Callable, Iterable

from rewriter.memory.groups import Group
from rewriter.memory.spare import Spare
from rewriter.memory.tickets import Copy


class Leaving:
    """What is held is bounded by windows: the oldest goes first, by ``give_up``, which orders the wait.

    A group without a window bounds nothing. One that was announced (``expect``) has what its layer leaves
    free beside its window; what the layer before sent beyond its own has its place while this one runs.
    """

    def __init__(self, give_up: Callable[[Copy], None]):
        self._give_up = give_up
        # Some have been given up already.
        self._copies: deque[Copy] = deque()
        self._spares: deque[Spare] = deque()
        # The window of the last group that was announced.
        self._before = 0

    @property
    def held(self) -> int:
        """Bytes."""
        return sum(copy.layout.nbytes for copy in self._copies if copy.source is not None)

    def expect(self, spares: Iterable[Spare]) -> None:
        """Say what is free beside their windows for the next groups that have one, in order."""
        self._spares = deque(spares)
        self._before = 0

    def allowed(self, window: int | None) -> tuple[Spare, int | None]:
        """Of a group that begins: what is spare for it, and all that may be held when its tensors leave."""
        if window is None or not self._spares:
            return Spare(), window
        spare, before = self._spares.popleft(), self._before
        # There may have been more room than there is now.
        self.hold_at_most((before or window) + spare.out)
        self._before = window
        return spare, max(window, before) + spare.out

    def add(self, copy: Copy, group: Group) -> None:
        """``copy``, of ``group``, has been ordered."""
        while self._copies and self._copies[0].source is None:
            self._copies.popleft()
        self._copies.append(copy)
        if group.bound is not None:
            self.hold_at_most(group.bound)

    def hold_at_most(self, most: int) -> None:
        """Give up the oldest until at most so many bytes are held."""
        held = self.held
        while held > most:
            copy = self._copies.popleft()
            if copy.source is not None:
                held -= copy.layout.nbytes
                self._give_up(copy)

    def clear(self) -> None:
        """Forget all, what is to come too."""
        self._copies.clear()
        self.expect(())
