"""One size of a program as a recording: its inputs copied in and padded, its results copied out.

Results are copied before the user has them, since the next step overwrites them; gradients are his until the
next one (``lending``). Weights are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rewriter.replay.padding import CutOutput, PaddedInput, Padding


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

    def record(
        self,
        program: Callable,
        inputs: list[Any],
        trainable: Sequence[int],
        check: Callable[[int], None] = ...,
    ) -> Recording: ...
    def ready(self) -> bool: ...
    def reclaim(self, parameters: Iterable[Tensor]) -> bool: ...
    def bytes(self) -> int: ...
    def room(self) -> int: ...
    def forget(self) -> None: ...


class Ticket:
    """Held by the autograd graph of one recorded forward: while it lives, its backward may come.

    ``reads``: what that reads beside the inputs and has no other owner.
    """

    def __init__(self):
        self.done = False
        self.reads: Sequence[Tensor] = ()


@dataclass
class Copies:
    """The inputs of a recording that are other tensors at each step, by position.

    Attributes:
        padding: what is longer than the caller's, if anything.
    """

    tensors: dict[int, Tensor]
    padding: Padding | None

    @classmethod
    def of(
        cls, inputs: Sequence[Any], positions: Sequence[int], padding: Padding | None, length: int | None
    ) -> Copies:
        """Room for the inputs at ``positions``, those with tokens ``length`` long."""
        padded = {} if padding is None else {p.position for p in padding.inputs}
        made = {}
        for i in positions:
            value, shape = inputs[i], list(inputs[i].shape)
            if i in padded and length is not None and shape[1] != length:
                shape[1] = length
                made[i] = torch.empty(shape, dtype=value.dtype, device=value.device)
            else:
                stride = value.stride()
                made[i] = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return cls(made, padding)

    def fill(self, inputs: Sequence[Any]) -> None:
        padded = {} if self.padding is None else {p.position: p for p in self.padding.inputs}
        for i, copy in self.tensors.items():
            if inputs[i].shape == copy.shape:
                copy.copy_(inputs[i])
            else:
                _fill_padded(copy, inputs[i], padded[i])


def _fill_padded(copy: Tensor, value: Tensor, padded: PaddedInput) -> None:
    length = value.shape[1]
    copy[:, :length].copy_(value)
    tail = copy[:, length:]
    if padded.fill is None:
        tail.copy_(value[:, -1:].expand_as(tail))
    else:
        tail.fill_(padded.fill)


@dataclass
class Step:
    """A recording, and what has to be as it was when it was made.

    Attributes:
        held: positions of the inputs that it reads where they lie, at ``addresses``.
        trainable: positions of the inputs that get gradients.
        draws: whether the program draws random numbers.
        recomputed: to be told when the program had to run again for a backward.
    """

    program: Callable
    recording: Recording
    copies: Copies
    held: tuple[int, ...]
    addresses: list[int]
    trainable: Sequence[int]
    draws: bool
    recomputed: Callable[[], None]

    def moved(self, inputs: Sequence[Any]) -> list[int]:
        """Positions of the inputs that do not lie where they did."""
        now = [inputs[i].data_ptr() for i in self.held]
        if now == self.addresses:
            return []
        return [i for i, a, b in zip(self.held, now, self.addresses, strict=True) if a != b]

    def __call__(self, ticket: Ticket, inputs: Sequence[Any]) -> tuple:
        """The program's results, the caller's own and part of his autograd graph, which holds ``ticket``."""
        # The device starts before autograd's bookkeeping of some hundred weights.
        self.copies.fill(inputs)
        self.recording.forward()
        found = iter(_Replay.apply(self, ticket, inputs, *(inputs[i] for i in self.trainable)))
        return tuple(next(found) if isinstance(o, Tensor) else o for o in self.recording.outputs)

    def results(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Copies of what the recording's forward left."""
        outputs = enumerate(self.recording.outputs)
        return tuple(self._cut(o, i, inputs).clone() for i, o in outputs if isinstance(o, Tensor))

    def backward(self, inputs: Sequence[Any], grads: dict[int, Tensor]) -> Sequence[Tensor | None]:
        """Gradients of the trainable inputs, from those of the results that it was recorded for."""
        for position, seed in zip(self.recording.seeded, self.recording.seeds, strict=True):
            cut = self._cut(seed, position, inputs)
            if position not in grads or cut is not seed:
                seed.zero_()
            if position in grads:
                cut.copy_(grads[position])
        return self.recording.backward()

    def recompute(self, inputs: Sequence[Any], grads: dict[int, Tensor]) -> Sequence[Tensor | None]:
        """The same from gradients of any results: the program runs again, as compiled."""
        self.recomputed()
        given = list(inputs)
        for i in self.trainable:
            given[i] = inputs[i].detach().requires_grad_()
        with torch.enable_grad():
            results = self.program(*given)
        leaves, ends = [given[i] for i in self.trainable], [results[i] for i in grads]
        return torch.autograd.grad(ends, leaves, list(grads.values()), allow_unused=True)

    def _cut(self, output: Tensor, position: int, inputs: Sequence[Any]) -> Tensor:
        """The part of a result that belongs to the caller's tokens."""
        cut = self._cuts().get(position)
        if cut is None or self.copies.padding is None:
            return output
        return output.narrow(cut.axis, 0, inputs[self.copies.padding.sizes[0]] + cut.offset)

    def _cuts(self) -> dict[int, CutOutput]:
        padding = self.copies.padding
        return {} if padding is None else {cut.position: cut for cut in padding.outputs}


class _Replay(torch.autograd.Function):
    """A step for autograd. Saving the weights lets autograd see where one was changed before the backward."""

    @staticmethod
    def forward(ctx, step: Step, ticket: Ticket, inputs: Sequence[Any], *trainable: Tensor):
        ctx.set_materialize_grads(False)
        ctx.step, ctx.ticket, ctx.inputs = step, ticket, inputs
        ctx.versions = _versions(step, inputs)
        ctx.save_for_backward(*trainable)
        outputs, recording = step.results(inputs), step.recording
        ctx.positions = [i for i, o in enumerate(recording.outputs) if isinstance(o, Tensor)]
        without = [o for o, i in zip(outputs, ctx.positions, strict=True) if not recording.differentiable[i]]
        ctx.mark_non_differentiable(*without)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        step, inputs = ctx.step, ctx.inputs
        if ctx.ticket.done:
            raise RuntimeError(
                "rewriter: a second backward through one step that runs as a CUDA graph: what it saved is "
                'gone. Compile with options={"cuda_graphs": False} to keep it for retain_graph=True.'
            )
        _ = ctx.saved_tensors
        found = {i: g for i, g in zip(ctx.positions, grads, strict=True) if g is not None}
        if set(found) <= set(step.recording.seeded):
            results = step.backward(inputs, found)
        else:
            _check_repeatable(step, _versions(step, inputs) == ctx.versions)
            results = step.recompute(inputs, found)
        ctx.ticket.done, ctx.ticket.reads = True, ()
        return None, None, None, *results


def _check_repeatable(step: Step, is_same: bool) -> None:
    """Raise where running the program again would give something else than the forward did."""
    if is_same and not step.draws:
        return
    why = "the batch was written in place since" if not is_same else "its dropout would be another"
    raise RuntimeError(
        "rewriter: gradients of other results than the loss are asked of a step that ran as a CUDA graph, "
        f'and it cannot be run again for them: {why}. Compile with options={{"cuda_graphs": False}}.'
    )


def _versions(step: Step, inputs: Sequence[Any]) -> list[int | None]:
    batch = [inputs[i] for i in step.copies.tensors]
    return [None if t.is_inference() else t._version for t in batch]
