"""One line on a terminal that says what a compilation is at; silent where nobody watches.

rewriter: traced 18.2 s · 2310 operations, 224 rewrites · compiling layer_a, 2 of 4 · 21.5 s
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from torch._dynamo.callback import on_compile_start

_ERASE = "\r\x1b[2K"
# When Dynamo last began, seen by its own callback: the backend is only called when tracing has ended.
_began: list[float] = []


@on_compile_start
def _note_beginning(*_: object) -> None:
    _began[:] = [time.perf_counter()]


class ProgressLine:
    """What has been done, and what is being done, with the seconds since Dynamo began."""

    def __init__(self, stream: TextIO):
        self.stream, self.shown = stream, stream.isatty()
        self.began = _began[-1] if _began else time.perf_counter()
        self.done: list[str] = []

    def now(self, text: str) -> None:
        """Show ``text`` after what has been done."""
        if self.shown:
            elapsed = f"{time.perf_counter() - self.began:.1f} s"
            self.stream.write(_ERASE + "rewriter: " + " · ".join((*self.done, text, elapsed)))
            self.stream.flush()

    def finished(self, text: str) -> None:
        """``text`` stays on the line."""
        self.done.append(text)

    def clear(self) -> None:
        if self.shown:
            self.stream.write(_ERASE)
            self.stream.flush()


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """A line on standard error, gone at the end."""
    line = ProgressLine(sys.stderr)
    try:
        yield line
    finally:
        line.clear()


def seconds_since_beginning() -> float:
    """How long ago Dynamo began with the graph that is being compiled; 0 where it did not."""
    return time.perf_counter() - _began[-1] if _began else 0.0
