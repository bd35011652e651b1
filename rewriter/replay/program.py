"""A compiled program of which few sizes are run again and again, as recordings, and the rest as it is.

A step on few tokens is bound by the host: 32 layers launch some thousands of kernels that each run for less
time than it takes to launch them. A recording launches all of them at once. It is made for one size of the
inputs; lengths that vary are padded to a bucket (``buckets``), where that is proven to be without effect
(``padding``).

Longer steps gain less: the device waits at the step's beginning and for some microseconds between kernels.
They are recorded too, up to a limit, where their size comes back (``sightings``), nearly all of their tokens
have a label (the program leaves out the head's products for others, a recording cannot), and their memory can
be spared: what a recording holds, the program can no longer use when it runs as compiled.

A recording serves only where that is sure to be right; everything else runs as compiled:

- without gradients, on another stream, or while the user records a CUDA graph of his own;
- weights that have moved: recorded anew, and after some times given up;
- more tokens than the device has memory for beside the recordings: those are given up;
- a forward whose predecessor may still have its backward: two at once would overwrite each other;
- gradients of the last recorded step that somebody holds elsewhere than in a parameter's ``grad``;
- gradients of other results than the loss, as of logits that a user trains through: the backward then runs
  the program again, as compiled.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.replay.buckets import bucket, fine_bucket
from rewriter.replay.capture import NoRoom, Unrecordable
from rewriter.replay.padding import Reading, admits, conditions
from rewriter.replay.sightings import Sightings
from rewriter.replay.step import Copies, Recorder, Recording, Step, Ticket

log = logging.getLogger(__name__)

_MOST_SIZES = 64
_MOST_MOVES = 8
_MOST_RECOMPUTED = 3
# Of a long step's labels, those that may be ignored ones: the head is a fifth of 8 layers' products.
_MOST_IGNORED = 1 / 8
# What a call takes beside the activations that it keeps.
_WORKING_MEMORY = 1.25


@dataclass(frozen=True)
class Limits:
    """What may be recorded, in tokens of a call (rows times length) and in bytes.

    Attributes:
        tokens: calls of at most so many are short.
        bytes: the most that recordings hold.
        long: calls of at most so many may be recorded where they come back.
    """

    tokens: int
    bytes: int
    long: int = 0


@dataclass(frozen=True)
class _Size:
    """A call's size: its length as recorded, padded if ``is_bucket``, and its tokens at that length."""

    key: tuple
    is_bucket: bool
    tokens: int
    short: bool

    @property
    def length(self) -> int | None:
        return self.key[0]


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
        self._sightings = Sightings()
        self._most = max(limits.tokens, limits.long)
        self._few_labels: set[tuple] = set()
        # Of steps that ran as compiled, and of the largest recording: how many, and the bytes a token.
        self._most_run, self._bytes_a_token = 1, 0.0
        self._moves = self._recomputed = 0
        self._pending: Callable[[], Ticket | None] = lambda: None
        self._off = self._full = False

    def __call__(self, *inputs: Any) -> Any:
        inputs = (*inputs, *(inputs[i] for i in self._reading.doubled))
        step = self._step(inputs) if self._may_replay(inputs) else None
        if step is None:
            return self.program(*inputs)
        ticket = Ticket()
        self._pending = weakref.ref(ticket)
        return step(ticket, inputs)

    def _may_replay(self, inputs: tuple) -> bool:
        if self._off or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        pending = self._pending()
        if not (pending is None or pending.done) or not self._recorder.ready():
            return False
        return self._recorder.reclaim(inputs[i] for i in self._trainable)

    def _step(self, inputs: tuple) -> Step | None:
        """The recording for these inputs, made if it is time; None to run the program itself."""
        size = self._size(inputs)
        self._sightings.add(size.key)
        step = self._steps.get(size.key)
        if step is not None and self._stands(step, inputs):
            return step
        if self._may_record(size, inputs):
            step = self._record(size, inputs)
            if step is not None:
                return step
        self._make_room(size.tokens)
        return None

    def _size(self, inputs: tuple) -> _Size:
        others = tuple(inputs[i] for i in self._others)
        padding = self._reading.padding
        batches = [inputs[i].shape for i in self._copied if inputs[i].dim() == 2]
        if padding is None:
            tokens = max((rows * length for rows, length in batches), default=0)
            return _Size((None, *others), False, tokens, tokens <= self._limits.tokens)
        rows, own = max((rows for rows, _ in batches), default=0), inputs[padding.sizes[0]]
        short = rows * bucket(own) <= self._limits.tokens
        longer = bucket(own) if short else fine_bucket(own)
        length = longer if self._admits(longer, inputs, others) else own
        return _Size((length, *others), length == longer, rows * length, short)

    def _admits(self, length: int, inputs: tuple, others: tuple) -> bool:
        padding, values = self._reading.padding, self._reading.values
        # Lowering a backward, which is done late, may add conditions.
        case = (length, *others, conditions(values))
        if case not in self._admitted:
            self._admitted[case] = padding is not None and admits(padding, values, inputs, length)
        return self._admitted[case]

    def _may_record(self, size: _Size, inputs: tuple) -> bool:
        if self._off or self._full or not 0 < size.tokens <= self._most:
            return False
        if not self._sightings.is_time(size.key, short=size.short, is_bucket=size.is_bucket):
            return False
        return size.short or self._is_labelled(size, inputs)

    def _is_labelled(self, size: _Size, inputs: tuple) -> bool:
        """Whether a long step's labels are nearly all there, judged by one batch of its size."""
        if size.key in self._few_labels:
            return False
        for position, ignored in self._reading.labels:
            share = (inputs[position] == ignored).float().mean().item()
            if share > _MOST_IGNORED:
                self._few_labels.add(size.key)
                self._note(f"{size.tokens} tokens not recorded, {share:.0%} of them have no label")
                return False
        return True

    def _make_room(self, tokens: int) -> None:
        """Before a call runs as compiled: forget the recordings if it may need the memory that they hold."""
        if tokens <= self._most_run:
            return
        self._most_run = tokens
        if not self._steps:
            return
        need = int(_WORKING_MEMORY * self._bytes_a_token * tokens)
        if need + self._recorder.bytes() > self._recorder.room():
            self._stop(f"the {self._recorder.bytes() / 2**30:.2f} GiB are needed for {tokens} tokens")

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

    def _record(self, size: _Size, inputs: tuple) -> Step | None:
        if len(self._steps) >= _MOST_SIZES:
            self._full = True
            self._note(f"{_MOST_SIZES} sizes are recorded, further ones are not")
            return None
        recording, copies = self._recording(size, inputs)
        if recording is None or not self._fits(size):
            return None
        held = tuple(i for i in self._tensors if i not in copies.tensors)
        addresses = [inputs[i].data_ptr() for i in held]
        kept = (self.program, recording, copies, held, addresses, self._trainable)
        step = Step(*kept, self._reading.draws, self._count_recomputed)
        self._steps[size.key] = step
        return step

    def _recording(self, size: _Size, inputs: tuple) -> tuple[Recording | None, Copies]:
        copies = Copies.of(inputs, sorted(self._copied), self._reading.padding, size.length)
        copies.fill(inputs)
        lengths = dict.fromkeys(self._lengths, size.length)
        given = [lengths.get(i, copies.tensors.get(i, v)) for i, v in enumerate(inputs)]

        def check(kept: int) -> None:
            self._check(size, kept)

        try:
            return self._recorder.record(self.program, given, self._trainable, check), copies
        except NoRoom as reason:
            self._shorten(size, str(reason))
        except Unrecordable as reason:
            self._stop(str(reason))
        except Exception as error:
            log.warning("recording failed, the program runs as compiled: %s", error, exc_info=True)
            if size.short or not isinstance(error, torch.OutOfMemoryError):
                self._stop(f"recording failed: {type(error).__name__}: {error}")
            else:
                # What was recorded of it lies in the memory of the others.
                self._forget()
                self._shorten(size, "the device's memory was full")
        return None, copies

    def _check(self, size: _Size, kept: int) -> None:
        """Refuse a long step whose recording would take memory that steps as compiled may need."""
        self._bytes_a_token = max(self._bytes_a_token, kept / size.tokens)
        if size.short:
            return
        # The largest step seen has to fit beside it.
        beside = kept * max(1.0, self._most_run / size.tokens)
        room = self._recorder.room()
        if kept > self._limits.bytes:
            raise NoRoom(f"{_gib(kept)} to hold, more than {_gib(self._limits.bytes)}")
        if _WORKING_MEMORY * (kept + beside) > room:
            raise NoRoom(f"{_gib(kept)} to hold, {_gib(beside)} for steps as compiled, {_gib(room)} are free")

    def _shorten(self, size: _Size, reason: str) -> None:
        """Record no step of so many tokens, or more, from now on."""
        self._most = min(self._most, size.tokens - 1)
        self._note(f"steps of {size.tokens} tokens or more are not recorded: {reason}")

    def _fits(self, size: _Size) -> bool:
        """Note what recordings hold now; False where the first one is too large already."""
        length, *others = size.key
        held, most = self._recorder.bytes(), self._limits.bytes
        what = f"length {length}" if length is not None else "its size" if others else "its one size"
        self._note(f"{what}{f' with {others}' if others else ''} recorded, {_gib(held)} held in all")
        self._full = held > most
        if self._full and not self._steps:
            reason = f"they would hold more than {_gib(most)}"
            if size.short:
                self._stop(reason)
            else:
                self._forget()
                self._shorten(size, reason)
            return False
        if self._full:
            self._note(f"no further size, for more than {_gib(most)} are held")
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


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def is_batch(value: Tensor) -> bool:
    """Whether an input is likely another tensor at each step: ids, labels, masks, numbers of items."""
    integers = (torch.int64, torch.int32, torch.bool)
    return value.dtype in integers and not isinstance(value, nn.Parameter)
