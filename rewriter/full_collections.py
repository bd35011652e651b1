"""No full garbage collections while Dynamo compiles.

A trace makes millions of objects that live to its end, and whenever they have grown by a quarter Python looks
for cycles among all objects of the process: an eighth of the time to trace 32 layers, which frees next to
nothing. Young objects, among them what the trace drops, are collected as ever.

Nor is one due the moment that a compilation ends, while all of the trace is still held: what is there by then
counts as old, as it does after a full collection, and the next one comes as many collections of younger
objects later. It finds less: most of a trace goes with its last reference.

The threshold is the process's, so that other backends' compilations are spared them too; it is back when each
compilation ends.
"""

import gc
from typing import Any

_NEVER = 1_000_000


class Deferral:
    """The thresholds of before, while a compilation runs."""

    def __init__(self) -> None:
        self.before: tuple[int, int, int] | None = None

    def begin(self, _: Any) -> None:
        self.before = gc.get_threshold()
        gc.set_threshold(*self.before[:2], _NEVER)

    def end(self, _: Any) -> None:
        if self.before is not None and gc.get_threshold()[2] == _NEVER:
            gc.set_threshold(*self.before)
            _count_anew()
        self.before = None


def _count_anew() -> None:
    # Freezing is the one way to begin the counts of collections anew without a collection; it moves lists,
    # not objects. Where somebody has frozen objects, thawing would thaw theirs.
    if gc.get_freeze_count() == 0:
        gc.freeze()
        gc.unfreeze()


def defer_full_collections() -> None:
    """From now on, while Dynamo compiles; until ``torch._dynamo.reset``. A second call changes nothing."""
    from torch._dynamo.callback import callback_handler as handler

    if any(isinstance(getattr(known, "__self__", None), Deferral) for known in handler.start_callbacks):
        return
    deferral = Deferral()
    handler.register_start_callback(deferral.begin)
    handler.register_end_callback(deferral.end)
