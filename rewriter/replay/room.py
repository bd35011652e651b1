"""What may be recorded: up to how many tokens, and within what memory.

What a recording holds, the program can no longer use when it runs as compiled. Short steps' recordings are
held to a share of the device. A long step's has to fit twice: beside the model, and beside the largest step
that was seen to run as compiled. One that comes later and is larger takes the memory of all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rewriter.replay.capture import NoRoom
from rewriter.replay.step import Recorder
from rewriter.size_text import size_text

# What a call takes beside the activations that it keeps.
_WORKING_MEMORY = 1.25


@dataclass(frozen=True)
class Limits:
    """What may be recorded, in tokens of a call (rows times length) and in bytes.

    Attributes:
        tokens: calls of at most so many are short.
        bytes: the most that recordings hold.
        long: calls of at most so many may be recorded where they come back.
        free: bytes for calls as compiled and recordings together; None for all that the device has.
        held: of these bytes, what recordings of all programs hold now; None where they are the program's own.
    """

    tokens: int
    bytes: int
    long: int = 0
    free: int | None = None
    held: Callable[[], int] | None = None


class Room:
    """What is left of ``limits`` and of the device, by what was recorded and what was seen to run.

    Attributes:
        most: tokens of the longest step that may be recorded.
    """

    def __init__(self, limits: Limits, recorder: Recorder):
        self._limits, self._recorder = limits, recorder
        self.most = max(limits.tokens, limits.long)
        # Of steps that ran as compiled, and of the largest recording.
        self._most_run, self._bytes_a_token = 1, 0.0

    def check(self, kept: int, tokens: int, *, short: bool) -> None:
        """Refuse a long step, of ``kept`` bytes, whose recording would take what steps as compiled may need.

        Raises:
            NoRoom: with the reason.
        """
        self._bytes_a_token = max(self._bytes_a_token, kept / tokens)
        if short:
            return
        beside = kept * max(1.0, self._most_run / tokens)
        room = self._recorder.room()
        if kept > self._limits.bytes:
            raise NoRoom(f"{size_text(kept)} to hold, more than {size_text(self._limits.bytes)}")
        if _WORKING_MEMORY * (kept + beside) > room:
            raise NoRoom(
                f"{size_text(kept)} to hold, {size_text(beside)} for steps as compiled, "
                f"{size_text(room)} are free"
            )

    def refuse(self, tokens: int) -> None:
        """Let no step of so many tokens, or more, be recorded from now on."""
        self.most = min(self.most, tokens - 1)

    def is_full(self) -> bool:
        """Whether recordings hold more than they may."""
        return self._held() > self._limits.bytes

    def is_needed(self, tokens: int) -> bool:
        """Whether a step of ``tokens`` that is to run as compiled may need what the recordings hold."""
        if tokens <= self._most_run:
            return False
        self._most_run = tokens
        need = int(_WORKING_MEMORY * self._bytes_a_token * tokens)
        room = self._recorder.room()
        free = room if self._limits.free is None else min(room, self._limits.free)
        return need + self._held() > free

    def _held(self) -> int:
        return self._recorder.bytes() if self._limits.held is None else self._limits.held()
