"""One line on a terminal that says what a compilation is at; silent where nobody watches.

rewriter: traced 2310 operations in 18.2 s · 224 rewrites · compiling layer_a, 2 of 4 · 21.5 s

Nothing is shown while Dynamo traces, which happens before it calls a backend. A memory plan stays on the
terminal.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rewriter.seconds_text import seconds_text

_ERASE = "\r\x1b[2K"


class ProgressLine:
    """What has been done, and what is being done, with the seconds since Dynamo began."""

    def __init__(self, stream: TextIO):
        self.stream, self.shown = stream, stream.isatty()
        self.began = time.perf_counter() - seconds_since_beginning()
        self.done: list[str] = []

    def now(self, text: str) -> None:
        """Show ``text`` after what has been done."""
        if self.shown:
            elapsed = seconds_text(time.perf_counter() - self.began)
            self.stream.write(_ERASE + "rewriter: " + " · ".join((*self.done, text, elapsed)))
            self.stream.flush()

    def finished(self, text: str) -> None:
        """``text`` stays on the line."""
        self.done.append(text)

    @contextmanager
    def while_at(self, text: str) -> Iterator[None]:
        """Show ``text`` while the block runs: of a backward, which is compiled when the rest is long done."""
        self.now(text)
        try:
            yield
        finally:
            self.clear()

    def lasting(self, text: str) -> None:
        """Show ``text``, which stays on the terminal, above the line."""
        if self.shown:
            self.stream.write(f"{_ERASE}{text}\n")
            self.stream.flush()

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
    # Importing the package alone does not load Dynamo.
    from torch._dynamo.utils import get_metrics_context

    # Dynamo's own record of the compilation in progress: the backend is only called when tracing has ended.
    context = get_metrics_context()
    return (time.time_ns() - context._start_time_ns) / 1e9 if context.in_progress() else 0.0
