"""What takes the place of CUDA graphs on a CPU: recordings that overwrite what the next one of them needs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.replay.lending import Lender, Lent


class StandIn:
    """Runs a program anew at each step, on the inputs of its recording and into the results of its recording.

    As with a shared memory pool, a backward is right only for the latest forward of all recordings, and any
    forward overwrites the gradients that any recording gave.
    """

    def __init__(
        self, recorder: "StandInRecorder", program: Callable, inputs: list[Any], trainable: Sequence[int]
    ):
        self._recorder, self._program, self._inputs = recorder, program, list(inputs)
        self._leaves = [inputs[i].detach().requires_grad_() for i in trainable]
        for i, leaf in zip(trainable, self._leaves, strict=True):
            self._inputs[i] = leaf
        with torch.enable_grad():
            results = tuple(program(*self._inputs))
        self.differentiable = tuple(r.requires_grad for r in results)
        needing = [i for i, needs in enumerate(self.differentiable) if needs]
        self.seeded = tuple([i for i in needing if results[i].dim() == 0] or needing)
        self.seeds = [torch.zeros_like(results[i]) for i in self.seeded]
        self.outputs = tuple(r.detach().clone() for r in results)
        self._lent: Lent | None = None

    def forward(self) -> None:
        self._recorder.latest = self
        self._recorder.forwards += 1
        for gradient in self._recorder.gradients:
            gradient.fill_(torch.nan)
        with torch.enable_grad():
            self._results = self._program(*self._inputs)
        for kept, result in zip(self.outputs, self._results, strict=True):
            kept.copy_(result.detach())

    def backward(self) -> list[Tensor | None]:
        assert self._recorder.latest is self, "what this forward saved is overwritten"
        self._recorder.backwards += 1
        ends = [self._results[i] for i in self.seeded]
        found = torch.autograd.grad(ends, self._leaves, self.seeds, allow_unused=True)
        given = [g for g in found if g is not None]
        if self._lent is None:
            self._lent = Lent(torch.empty_like(g) for g in given)
            self._recorder.gradients.extend(self._lent.tensors)
        for place, gradient in zip(self._lent.tensors, given, strict=True):
            place.copy_(gradient)
        tensors = iter(self._recorder.lender.give(self._lent))
        return [None if g is None else next(tensors) for g in found]


class StandInRecorder:
    """Counts what is recorded and run; ``size`` is what each recording is said to take, of ``free`` bytes."""

    def __init__(self, size: int = 0):
        self.free = 2**40
        self.latest: StandIn | None = None
        self.recorded: list[list[Any]] = []
        self.forwards = self.backwards = 0
        self.is_ready = True
        self.lender = Lender()
        self.gradients: list[Tensor] = []
        self.waited: set[torch.Stream] = set()
        self._size, self._held = size, 0

    def record(
        self,
        program: Callable,
        inputs: list[Any],
        trainable: Sequence[int],
        check: Callable[[int], None] = lambda kept: None,
    ) -> StandIn:
        check(self._size)
        self.recorded.append(inputs)
        self._held += self._size
        return StandIn(self, program, inputs, trainable)

    def ready(self) -> bool:
        return self.is_ready

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        if not self.lender.reclaim(parameters):
            return False
        self.waited |= self.lender.take_streams()
        return True

    def bytes(self) -> int:
        return self._held

    def room(self) -> int:
        return self.free

    def forget(self) -> None:
        self._held = 0
        self.gradients.clear()
        self.lender.forget()
