"""What a process has one of for each device, made when it is first asked for.

``functools.cache`` calls a function twice where two threads ask before it has answered, and each goes on with
a thing of its own: two pools of host memory that together pass one budget. Here the second thread waits.
"""

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

_Made = TypeVar("_Made")


def made_once(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """``make``, called once for each set of its arguments (hashable, by place), whoever asks first."""
    turn, cached = threading.Lock(), functools.cache(make)

    @functools.wraps(make)
    def made(*arguments) -> _Made:
        with turn:
            return cached(*arguments)

    return made
