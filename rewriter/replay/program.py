"""A compiled program of which few sizes are run again and again, as recordings, and the rest as it is.

A step on few tokens is bound by the host: 32 layers launch some thousands of kernels that each run for less
time than it takes to launch them. A recording launches all of them at once. It is made for one size of the
inputs; lengths that vary are padded to a bucket (``buckets``), where that is proven to be without effect
(``padding``).

A recording serves only where that is sure to be right; everything else runs as compiled:

- without gradients, on another stream, or while the user records a CUDA graph of his own;
- weights that have moved: recorded anew, and after some times given up;
- a forward whose predecessor may still have its backward: two at once would overwrite each other;
- gradients of other results than the loss, as of logits that a user trains through: the backward then runs
  the program again, as compiled.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.replay.buckets import bucket
from rewriter.replay.capture import Unrecordable
from rewriter.replay.padding import Reading, admits, conditions
from rewriter.replay.step import Copies, Recorder, Step, Ticket

log = logging.getLogger(__name__)

# Runs before a size is recorded: buckets are known to come back, other sizes have to show it.
_RUNS_BEFORE_BUCKET, _RUNS_BEFORE_SIZE = 1, 3
_MOST_SIZES = 64
_MOST_MOVES = 8
_MOST_RECOMPUTED = 3


@dataclass(frozen=True)
class Limits:
    """What may be recorded: calls of at most ``tokens`` tokens, while recordings hold at most ``bytes``."""

    tokens: int
    bytes: int


class Replayed:
    """``program``, some sizes of which are recordings; takes and returns what it does.

    Args:
        reading: of the program's graph; its ``doubled`` inputs are appended here.
        recorder: makes the recordings.
        notes: told what is recorded, and what is not and why.
    """

    def __init__(
        self, program: Callable, reading: Reading, limits: Limits, recorder: Recorder, notes: list[str]
    ):
        self.program, self._reading, self._limits = program, reading, limits
        self._recorder, self._notes = recorder, notes
        values, padding = reading.values, reading.padding
        self._tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        self._trainable = [i for i in self._tensors if values[i].requires_grad]
        self._copied = {i for i in self._tensors if is_batch(values[i])}
        self._copied |= set() if padding is None else {p.position for p in padding.inputs}
        self._lengths = frozenset() if padding is None else frozenset(padding.sizes)
        self._others = [i for i in range(len(values)) if i not in (*self._tensors, *self._lengths)]
        self._steps: dict[tuple, Step] = {}
        self._admitted: dict[tuple, bool] = {}
        self._runs: Counter[tuple] = Counter()
        self._runs_of_others: Counter[tuple] = Counter()
        self._moves = self._recomputed = 0
        self._pending: Callable[[], Ticket | None] = lambda: None
        self._off = self._full = False

    def __call__(self, *inputs: Any) -> Any:
        inputs = (*inputs, *(inputs[i] for i in self._reading.doubled))
        step = self._step(inputs) if self._may_replay() else None
        if step is None:
            return self.program(*inputs)
        ticket = Ticket()
        self._pending = weakref.ref(ticket)
        return step(ticket, inputs)

    def _may_replay(self) -> bool:
        if self._off or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        pending = self._pending()
        return (pending is None or pending.done) and self._recorder.ready()

    def _step(self, inputs: tuple) -> Step | None:
        """The recording for these inputs, made if it is time; None to run the program itself."""
        others = tuple(inputs[i] for i in self._others)
        length = self._length(inputs, others)
        key = (length, *others)
        self._runs[key] += 1
        self._runs_of_others[others] += 1
        step = self._steps.get(key)
        if step is not None and self._stands(step, inputs):
            return step
        if self._off or self._full or not self._is_time(key, others) or not self._is_small(inputs, length):
            return None
        return self._record(key, length, inputs)

    def _length(self, inputs: tuple, others: tuple) -> int | None:
        """What the call's length is padded to; its own where a longer one would not be admitted."""
        padding, values = self._reading.padding, self._reading.values
        if padding is None:
            return None
        length = inputs[padding.sizes[0]]
        longer = bucket(length)
        # Lowering a backward, which is done late, may add conditions.
        case = (longer, *others, conditions(values))
        if case not in self._admitted:
            self._admitted[case] = admits(padding, values, inputs, longer)
        return longer if self._admitted[case] else length

    def _is_time(self, key: tuple, others: tuple) -> bool:
        length = key[0]
        if length is not None and length == bucket(length):
            return self._runs_of_others[others] > _RUNS_BEFORE_BUCKET
        return self._runs[key] > _RUNS_BEFORE_SIZE

    def _is_small(self, inputs: tuple, length: int | None) -> bool:
        batches = [inputs[i].shape for i in self._tensors if i in self._copied and inputs[i].dim() == 2]
        return bool(batches) and max(rows * (length or own) for rows, own in batches) <= self._limits.tokens

    def _stands(self, step: Step, inputs: tuple) -> bool:
        """Whether what the recording reads where it lies still lies there; else all are forgotten."""
        moved = step.moved(inputs)
        if not moved:
            return True
        self._copied |= {i for i in moved if not isinstance(self._reading.values[i], nn.Parameter)}
        self._forget()
        self._moves += 1
        if self._moves > _MOST_MOVES:
            self._stop(f"{len(moved)} of its inputs lie elsewhere in memory at each step")
        return False

    def _record(self, key: tuple, length: int | None, inputs: tuple) -> Step | None:
        if len(self._steps) >= _MOST_SIZES:
            self._full = True
            self._note(f"{_MOST_SIZES} sizes are recorded, further ones are not")
            return None
        copies = Copies.of(inputs, sorted(self._copied), self._reading.padding, length)
        copies.fill(inputs)
        given = [length if i in self._lengths else copies.tensors.get(i, v) for i, v in enumerate(inputs)]
        try:
            recording = self._recorder.record(self.program, given, self._trainable)
        except Unrecordable as reason:
            self._stop(str(reason))
            return None
        except Exception as error:
            log.warning("recording failed, the program runs as compiled: %s", error, exc_info=True)
            self._stop(f"recording failed: {type(error).__name__}: {error}")
            return None
        if not self._fits(key):
            return None
        held = tuple(i for i in self._tensors if i not in copies.tensors)
        addresses = [inputs[i].data_ptr() for i in held]
        kept = (self.program, recording, copies, held, addresses, self._trainable)
        step = Step(*kept, self._reading.draws, self._count_recomputed)
        self._steps[key] = step
        return step

    def _fits(self, key: tuple) -> bool:
        """Note what recordings hold now; False where the first one is too large already."""
        length, *others = key
        size, most = self._recorder.bytes() / 2**30, self._limits.bytes / 2**30
        what = f"length {length}" if length is not None else "its size" if others else "its one size"
        self._note(f"{what}{f' with {others}' if others else ''} recorded, {size:.2f} GiB held in all")
        self._full = size > most
        if self._full and not self._steps:
            self._stop(f"they would hold more than {most:.2f} GiB")
            return False
        if self._full:
            self._note(f"no further size, for more than {most:.2f} GiB are held")
        return True

    def _count_recomputed(self) -> None:
        self._recomputed += 1
        if self._recomputed > _MOST_RECOMPUTED:
            self._stop("gradients of other results than its loss are asked for")

    def _forget(self) -> None:
        self._steps.clear()
        self._full = False
        self._recorder.forget()

    def _stop(self, reason: str) -> None:
        if not self._off:
            self._note(f"not recorded any more: {reason}")
        self._off = True
        self._forget()

    def _note(self, text: str) -> None:
        self._notes.append(f"CUDA graphs: {text}")


def is_batch(value: Tensor) -> bool:
    """Whether an input is likely another tensor at each step: ids, labels, masks, numbers of items."""
    integers = (torch.int64, torch.int32, torch.bool)
    return value.dtype in integers and not isinstance(value, nn.Parameter)
