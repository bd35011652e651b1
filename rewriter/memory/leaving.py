"""Tensors on their way to host memory, in the order of their copies, and how many bytes of them are held."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from rewriter.memory.groups import Group
from rewriter.memory.spare import Spare
from rewriter.memory.tickets import Copy


class Leaving:
    """What is held is bounded by windows: the oldest goes first, by ``give_up``, which orders the wait.

    A group that was announced (``expect``) has what its layer leaves free, too.

    Attributes:
        forwards: how many were announced.
    """

    def __init__(self, give_up: Callable[[Copy], None]):
        self._give_up = give_up
        # Some have been given up already.
        self._copies: deque[Copy] = deque()
        self._spares: deque[Spare] = deque()
        self.forwards = 0

    @property
    def held(self) -> int:
        """Bytes."""
        return sum(copy.layout.nbytes for copy in self._copies if copy.source is not None)

    def expect(self, spares: Iterable[Spare]) -> None:
        """A forward begins: say what is spare for its groups, in order."""
        self._spares = deque(spares)
        self.forwards += 1

    def spare(self, window: int) -> Spare:
        """What is spare for a group that begins; there may have been more before."""
        spare = self._spares.popleft() if self._spares else Spare(window, window, window)
        self.hold_at_most(spare.out)
        return spare

    def add(self, copy: Copy, group: Group) -> None:
        """``copy``, of ``group``, has been ordered."""
        while self._copies and self._copies[0].source is None:
            self._copies.popleft()
        self._copies.append(copy)
        self.hold_at_most(group.spare.out + group.whole)

    def hold_at_most(self, most: float) -> None:
        """Give up the oldest until at most so many bytes are held."""
        held = self.held
        while held > most:
            copy = self._copies.popleft()
            if copy.source is not None:
                held -= copy.layout.nbytes
                self._give_up(copy)

    def making_room(self, due: Sequence[Copy], room: float) -> Iterator[Copy]:
        """``due``: those that are still held, and each of the others once it fits beside what is held then.

        Args:
            room: bytes that may be held beside all of them.
        """
        away = [copy for copy in due if copy.source is None]
        yield from [copy for copy in due if copy.source is not None]
        room += sum(copy.layout.nbytes for copy in away)
        self.hold_at_most(room)
        for copy in away:
            room -= copy.layout.nbytes
            self.hold_at_most(room)
            yield copy

    def clear(self) -> None:
        """Forget all, what is to come too."""
        self._copies.clear()
        self._spares.clear()
