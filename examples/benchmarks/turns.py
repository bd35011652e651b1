"""How a benchmark's process and the one that started it agree on when it may go on, over two pipes.

A process sends the name of the point it has come to and waits for an answer of one byte. Nothing is said
over its output, which libraries print to.
"""

import os
from dataclasses import dataclass

MEMORY, TIMING = "memory", "timing"  # the points: it needs the GPU's memory; it is ready for the clock


@dataclass(frozen=True)
class Turn:
    """The process's end: file descriptors that it reads answers from, and writes points to."""

    answers: int
    points: int

    def wait(self, point: str) -> None:
        """
        Raises:
            SystemExit: nobody is left to answer.
        """
        os.write(self.points, point.encode())
        if not os.read(self.answers, 1):
            raise SystemExit(f"end_to_end: what started this process is gone, at {point!r}")
