"""A compiled program of which few sizes are run again and again, as recordings, and the rest as it is.

A step on few tokens is bound by the host: 32 layers launch some thousands of kernels that each run for less
time than it takes to launch them. A recording launches all of them at once. It is made for one size of the
inputs; lengths that vary are padded to a bucket (``sizes``), where that is proven to be without effect
(``padding``).

Longer steps gain less: the device waits at the step's beginning and for some microseconds between kernels.
They are recorded too, up to a limit, where their size comes back (``sightings``), nearly all of their tokens
have a label (the program leaves out the head's products for others, a recording cannot), and their memory can
be spared: what a recording holds, the program can no longer use when it runs as compiled.

A recording serves only where that is sure to be right; everything else runs as compiled:

- without gradients, on another stream, or while the user records a CUDA graph of his own;
- under hooks of saved tensors, which a recording does not call: a checkpoint would find other ones than the
  program saves when it runs the step again;
- weights that have moved: recorded anew, and after some times given up;
- more tokens than the device has memory for beside the recordings: those are given up;
- a forward whose predecessor may still have its backward: two at once would overwrite each other;
- gradients of the last recorded step that somebody holds elsewhere than in a parameter's ``grad``;
- gradients of other results than the loss, as of logits that a user trains through: the backward then runs
  the program again, as compiled.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.replay.capture import NoRoom, Unrecordable
from rewriter.replay.padding import Reading
from rewriter.replay.room import Limits, Room
from rewriter.replay.sightings import Sightings
from rewriter.replay.sizes import Size, Sizes, batches
from rewriter.replay.step import Copies, Recorder, Recording, Step, Ticket
from rewriter.saved_hooks import has_saved_hooks
from rewriter.size_text import size_text

log = logging.getLogger(__name__)

_MOST_SIZES = 64
_MOST_MOVES = 8
_MOST_RECOMPUTED = 3
# Of a long step's labels, those that may be ignored ones: the head is a fifth of 8 layers' products.
_MOST_IGNORED = 1 / 8


class Replayed:
    """``program``, some sizes of which are recordings; takes and returns what it does.

    Args:
        reading: of the program's graph; its ``doubled`` inputs are appended here.
        recorder: makes the recordings.
        notes: told what is recorded, and what is not and why.
        settle: told the inputs before a recording is made or runs, says for which turn recordings hold, and
            what they read that the program keeps on the device: in another turn it is gone.
    """

    def __init__(
        self,
        program: Callable,
        reading: Reading,
        limits: Limits,
        recorder: Recorder,
        notes: list[str],
        settle: Callable[[tuple], tuple[int, Sequence[Tensor]]] = lambda inputs: (0, ()),
    ):
        self.program, self._reading, self._limits = program, reading, limits
        self._recorder, self._notes = recorder, notes
        self._room = Room(limits, recorder)
        values, padding = reading.values, reading.padding
        self._tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        self._trainable = [i for i in self._tensors if values[i].requires_grad]
        self._copied = batches(reading)
        self._lengths = frozenset() if padding is None else frozenset(padding.sizes)
        self._steps: dict[tuple, Step] = {}
        self._sizes, self._sightings = Sizes(reading, limits.tokens), Sightings()
        self._few_labels: set[tuple] = set()
        self._settle, self._recorded_turn = settle, 0
        self._moves = self._recomputed = 0
        self._pending: Callable[[], Ticket | None] = lambda: None
        self._off = self._full = False
        self._turn = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        inputs = (*inputs, *(inputs[i] for i in self._reading.doubled))
        # Of two threads that call at once, one has the recordings.
        if not self._turn.acquire(blocking=False):
            return self.program(*inputs)
        try:
            ticket = Ticket()
            step = self._step(inputs, ticket) if self._may_replay(inputs) else None
            if step is not None:
                self._pending = weakref.ref(ticket)
                return step(ticket, inputs)
        finally:
            self._turn.release()
        return self.program(*inputs)

    def _may_replay(self, inputs: tuple) -> bool:
        if self._off or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        if has_saved_hooks():
            return False
        pending = self._pending()
        if not (pending is None or pending.done) or not self._recorder.ready():
            return False
        if not self._recorder.reclaim(inputs[i] for i in self._trainable):
            self._note(
                "steps run as compiled while gradients are held elsewhere than in a parameter's `grad`"
            )
            return False
        return True

    def _step(self, inputs: tuple, ticket: Ticket) -> Step | None:
        """The recording for these inputs, made if it is time; None to run the program itself."""
        turn, ticket.reads = self._settle(inputs)
        if turn != self._recorded_turn:
            self._recorded_turn = turn
            self._give_up_moved("what it reads was made anew some times")
        size = self._sizes.of(inputs)
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

    def _may_record(self, size: Size, inputs: tuple) -> bool:
        if self._off or self._full or not 0 < size.tokens <= self._room.most:
            return False
        # By those of others by now, perhaps.
        if self._room.is_full():
            return False
        if not self._sightings.is_time(size.key, short=size.short, is_bucket=size.is_bucket):
            return False
        return size.short or self._is_labelled(size, inputs)

    def _is_labelled(self, size: Size, inputs: tuple) -> bool:
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
        if self._room.is_needed(tokens) and self._steps:
            self._stop(f"the {size_text(self._recorder.bytes())} are needed for {tokens} tokens")

    def _stands(self, step: Step, inputs: tuple) -> bool:
        """Whether what the recording reads where it lies still lies there; else all are forgotten."""
        moved = step.moved(inputs)
        if not moved:
            return True
        self._copied |= {i for i in moved if not isinstance(self._reading.values[i], nn.Parameter)}
        self._give_up_moved(f"{len(moved)} of its inputs lie elsewhere in memory at each step")
        return False

    def _give_up_moved(self, reason: str) -> None:
        """Forget all that is recorded, since what it reads is gone; after some times for good."""
        self._moves += bool(self._steps)
        self._forget()
        if self._moves > _MOST_MOVES:
            self._stop(reason)

    def _record(self, size: Size, inputs: tuple) -> Step | None:
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

    def _recording(self, size: Size, inputs: tuple) -> tuple[Recording | None, Copies]:
        copies = Copies.of(inputs, sorted(self._copied), self._reading.padding, size.length)
        copies.fill(inputs)
        lengths = dict.fromkeys(self._lengths, size.length)
        given = [lengths.get(i, copies.tensors.get(i, v)) for i, v in enumerate(inputs)]

        def check(kept: int) -> None:
            self._room.check(kept, size.tokens, short=size.short)

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

    def _shorten(self, size: Size, reason: str) -> None:
        self._room.refuse(size.tokens)
        self._note(f"steps of {size.tokens} tokens or more are not recorded: {reason}")

    def _fits(self, size: Size) -> bool:
        """Note what recordings hold now; False where the first one is too large already."""
        length, *others = size.key
        what = f"length {length}" if length is not None else "its size" if others else "its one size"
        self._note(
            f"{what}{f' with {others}' if others else ''} recorded, "
            f"{size_text(self._recorder.bytes())} held in all"
        )
        self._full = self._room.is_full()
        if self._full and not self._steps:
            reason = f"they would hold more than {size_text(self._limits.bytes)}"
            if size.short:
                self._stop(reason)
            else:
                self._forget()
                self._shorten(size, reason)
            return False
        if self._full:
            self._note(f"no further size, for more than {size_text(self._limits.bytes)} are held")
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
        note = f"CUDA graphs: {text}"
        if note not in self._notes:
            self._notes.append(note)
