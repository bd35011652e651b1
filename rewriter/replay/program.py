"""A compiled program of which few sizes are run again and again, as recordings, and the rest as it is.

A step on few tokens is bound by the host: 32 layers launch some thousands of kernels that each run for less
time than it takes to launch them. A recording launches all of them at once. It is made for one size of the
inputs; lengths that vary are padded to a bucket (``buckets``), where that is proven to be without effect
(``padding``).

What a recording gives is copied before the user has it: results, since the next step overwrites them, and
gradients, since autograd keeps and adds to them. Weights are read where they lie. A recording serves only
where that is sure to be right; everything else runs as compiled:

- weights that have moved: recorded anew, and after some times given up;
- a forward whose predecessor may still have its backward: two at once would overwrite each other;
- gradients of other results than the loss, as of logits that a user trains through, are computed by running
  the program again, as compiled, in the backward.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rewriter.replay.buckets import bucket
from rewriter.replay.capture import Unrecordable
from rewriter.replay.padding import PaddedInput, Reading, admits, conditions

log = logging.getLogger(__name__)

# Runs before a size is recorded: with buckets lengths are known to come back, without they have to show it.
_RUNS_BEFORE_BUCKET, _RUNS_BEFORE_SIZE = 1, 3
_MOST_SIZES = 64
_MOST_MOVES = 8
_MOST_RECOMPUTED = 3


class Recording(Protocol):
    """A program at one size; see ``capture.CudaRecording``."""

    outputs: tuple[Any, ...]
    differentiable: tuple[bool, ...]
    seeded: tuple[int, ...]
    seeds: list[Tensor]

    def forward(self) -> None: ...
    def backward(self) -> list[Tensor | None]: ...


class Recorder(Protocol):
    """Makes recordings; see ``capture.CudaRecorder``."""

    def record(self, program: Callable, inputs: list[Any], trainable: Sequence[int]) -> Recording: ...
    def ready(self) -> bool: ...
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What may be recorded: calls of at most ``tokens`` tokens, while recordings hold at most ``bytes``."""

    tokens: int
    bytes: int


class _Ticket:
    """Held by the autograd graph of one recorded forward: while it lives, its backward may come."""

    def __init__(self):
        self.done = False


@dataclass
class _Sized:
    """A recording and what it was made for: its length, its copied inputs, the addresses of the others."""

    recording: Recording
    length: int | None
    copies: dict[int, Tensor]
    held: tuple[int, ...]
    addresses: list[int]


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
        examples = reading.values
        self._sizes = [i for i, e in enumerate(examples) if not isinstance(e, Tensor)]
        self._tensors = [i for i, e in enumerate(examples) if isinstance(e, Tensor)]
        self.trainable = [i for i in self._tensors if examples[i].requires_grad]
        self._copied = {i for i in self._tensors if is_batch(examples[i])}
        padding = reading.padding
        self._padded = {} if padding is None else {p.position: p for p in padding.inputs}
        self._copied |= set(self._padded)
        self._cuts = {} if padding is None else {c.position: c for c in padding.outputs}
        self._lengths = frozenset() if padding is None else frozenset(padding.sizes)
        self._recordings: dict[tuple, _Sized] = {}
        self._admitted: dict[tuple, bool] = {}
        self._runs: Counter[tuple] = Counter()
        self._moves = self.recomputed = 0
        self._pending: Callable[[], _Ticket | None] = lambda: None
        self._off = self._full = False

    def __call__(self, *inputs: Any) -> Any:
        inputs = (*inputs, *(inputs[i] for i in self._reading.doubled))
        sized = self._sized(inputs) if self._may_replay() else None
        if sized is None:
            return self.program(*inputs)
        ticket = _Ticket()
        self._pending = weakref.ref(ticket)
        found = iter(_Replay.apply(self, sized, ticket, inputs, *(inputs[i] for i in self.trainable)))
        return tuple(next(found) if isinstance(o, Tensor) else o for o in sized.recording.outputs)

    def _may_replay(self) -> bool:
        if self._off or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        pending = self._pending()
        return (pending is None or pending.done) and self._recorder.ready()

    def _sized(self, inputs: tuple) -> _Sized | None:
        """The recording for these inputs, made if it is time; None to run the program itself."""
        length = self._length(inputs)
        key = tuple(length if i in self._lengths else inputs[i] for i in self._sizes)
        self._runs[key] += 1
        sized = self._recordings.get(key)
        if sized is not None and self._in_place(sized, inputs):
            return sized
        if self._full or not self._is_time(key) or not self._is_small(inputs, length):
            return None
        return self._record(key, length, inputs)

    def _length(self, inputs: tuple) -> int | None:
        """What the call's length is padded to; its own where a longer one would not be admitted."""
        padding = self._reading.padding
        if padding is None:
            return None
        length, examples = inputs[padding.sizes[0]], self._reading.values
        longer = bucket(length)
        # Lowering a backward, which is done late, may add conditions.
        case = (*(inputs[i] for i in self._sizes if i not in self._lengths), longer, conditions(examples))
        if case not in self._admitted:
            self._admitted[case] = admits(padding, examples, inputs, longer)
        return longer if self._admitted[case] else length

    def _is_time(self, key: tuple) -> bool:
        if self._reading.padding is not None:
            return self._runs.total() > _RUNS_BEFORE_BUCKET
        return self._runs[key] > _RUNS_BEFORE_SIZE

    def _is_small(self, inputs: tuple, length: int | None) -> bool:
        tokens = [inputs[i].shape for i in self._tensors if i in self._copied and inputs[i].dim() == 2]
        return bool(tokens) and max(rows * (length or own) for rows, own in tokens) <= self._limits.tokens

    def _in_place(self, sized: _Sized, inputs: tuple) -> bool:
        """Whether what the recording reads where it lies still lies there; else it is forgotten."""
        now = [inputs[i].data_ptr() for i in sized.held]
        if now == sized.addresses:
            return True
        moved = [i for i, a, b in zip(sized.held, now, sized.addresses, strict=True) if a != b]
        self._copied |= {i for i in moved if not isinstance(self._reading.values[i], nn.Parameter)}
        self._recordings.clear()
        self._moves += 1
        if self._moves > _MOST_MOVES:
            self._stop(f"{len(moved)} of its inputs lie elsewhere in memory at each step")
        return False

    def _record(self, key: tuple, length: int | None, inputs: tuple) -> _Sized | None:
        if len(self._recordings) >= _MOST_SIZES:
            self._full = True
            self._note(f"{_MOST_SIZES} sizes are recorded, further ones are not")
            return None
        static = list(inputs)
        for i in self._lengths:
            static[i] = length
        copies = {i: self._copy_of(inputs[i], i, length) for i in sorted(self._copied)}
        static = [copies.get(i, value) for i, value in enumerate(static)]
        held = tuple(i for i in self._tensors if i not in copies)
        self._fill(copies, inputs, length)
        try:
            recording = self._recorder.record(self.program, static, self.trainable)
        except Unrecordable as reason:
            self._stop(str(reason))
            return None
        except Exception as error:
            log.warning("recording failed, the program runs as compiled: %s", error, exc_info=True)
            self._stop(f"recording failed: {type(error).__name__}: {error}")
            return None
        addresses = [inputs[i].data_ptr() for i in held]
        sized = self._recordings[key] = _Sized(recording, length, copies, held, addresses)
        if (held_bytes := self._recorder.bytes()) > self._limits.bytes:
            self._full = True
            self._note(f"recordings hold {held_bytes / 2**30:.2f} GiB, no further size is recorded")
        what = f"length {length}" if length is not None else f"sizes {key}" if key else "its one size"
        self._note(f"{what} recorded, {held_bytes / 2**30:.2f} GiB held in all")
        return sized

    def _copy_of(self, value: Tensor, position: int, length: int | None) -> Tensor:
        if position not in self._padded or length is None:
            shape, stride = value.shape, value.stride()
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        shape = (value.shape[0], length, *value.shape[2:])
        return torch.empty(shape, dtype=value.dtype, device=value.device)

    def _fill(self, copies: dict[int, Tensor], inputs: tuple, length: int | None) -> None:
        for i, copy in copies.items():
            padded = self._padded.get(i)
            if padded is None or inputs[i].shape == copy.shape:
                copy.copy_(inputs[i])
            else:
                _fill_padded(copy, inputs[i], padded)

    def forward(self, sized: _Sized, inputs: tuple) -> tuple[Tensor, ...]:
        """Run a recording on ``inputs``; the results are the caller's own."""
        self._fill(sized.copies, inputs, sized.length)
        sized.recording.forward()
        return tuple(
            self._cut(output, i, inputs).clone() if i in self._cuts else output.clone()
            for i, output in enumerate(sized.recording.outputs)
            if isinstance(output, Tensor)
        )

    def backward(self, sized: _Sized, inputs: tuple, grads: dict[int, Tensor]) -> Sequence[Tensor | None]:
        """Gradients of the trainable inputs, from those of the results by position."""
        recording = sized.recording
        if not set(grads) <= set(recording.seeded):
            self.recomputed += 1
            if self.recomputed > _MOST_RECOMPUTED:
                self._stop("gradients of other results than its loss are asked for")
            return self._recompute(inputs, grads)
        for position, seed in zip(recording.seeded, recording.seeds, strict=True):
            if position not in grads:
                seed.zero_()
            elif position in self._cuts:
                seed.zero_()
                self._cut(seed, position, inputs).copy_(grads[position])
            else:
                seed.copy_(grads[position])
        return recording.backward()

    def _cut(self, output: Tensor, position: int, inputs: tuple) -> Tensor:
        cut, padding = self._cuts[position], self._reading.padding
        assert padding is not None
        return output.narrow(cut.axis, 0, inputs[padding.sizes[0]] + cut.offset)

    def _recompute(self, inputs: tuple, grads: dict[int, Tensor]) -> Sequence[Tensor | None]:
        given = list(inputs)
        for i in self.trainable:
            given[i] = inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            results = self.program(*given)
        leaves = [given[i] for i in self.trainable]
        ends = [results[i] for i in grads]
        return torch.autograd.grad(ends, leaves, list(grads.values()), allow_unused=True)

    def _stop(self, reason: str) -> None:
        self._off = True
        self._recordings.clear()
        self._note(f"not recorded any more: {reason}")

    def _note(self, text: str) -> None:
        self._notes.append(f"CUDA graphs: {text}")


def is_batch(value: Tensor) -> bool:
    """Whether an input is likely another tensor at each step: ids, labels and masks are copied in."""
    integers = (torch.int64, torch.int32, torch.bool)
    return value.dtype in integers and value.dim() > 0 and not isinstance(value, nn.Parameter)


def _fill_padded(copy: Tensor, value: Tensor, padded: PaddedInput) -> None:
    length = value.shape[1]
    copy[:, :length].copy_(value)
    tail = copy[:, length:]
    if padded.fill is None:
        tail.copy_(value[:, -1:].expand_as(tail))
    else:
        tail.fill_(padded.fill)


class _Replay(torch.autograd.Function):
    """A recorded forward and its backward. Saving the weights lets autograd see where one was changed."""

    @staticmethod
    def forward(ctx, replayed: Replayed, sized: _Sized, ticket: _Ticket, inputs: tuple, *trainable: Tensor):
        ctx.set_materialize_grads(False)
        ctx.replayed, ctx.sized, ctx.ticket, ctx.inputs = replayed, sized, ticket, inputs
        ctx.save_for_backward(*trainable, *(inputs[i] for i in sized.copies))
        outputs = replayed.forward(sized, inputs)
        recorded = sized.recording
        tensors = [i for i, o in enumerate(recorded.outputs) if isinstance(o, Tensor)]
        ctx.positions = tensors
        ctx.mark_non_differentiable(
            *(o for o, i in zip(outputs, tensors, strict=True) if not recorded.differentiable[i])
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if ctx.ticket.done:
            raise RuntimeError(
                "rewriter: a second backward through one step of a captured program: what it saved is gone. "
                'Compile with options={"cuda_graphs": False} to keep it for retain_graph=True.'
            )
        # Raises where a weight was changed in place since the forward.
        _ = ctx.saved_tensors
        found = {i: g for i, g in zip(ctx.positions, grads, strict=True) if g is not None}
        results = ctx.replayed.backward(ctx.sized, ctx.inputs, found)
        ctx.ticket.done = True
        return None, None, None, None, *results
