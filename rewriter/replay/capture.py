"""Records a program's forward and backward as two CUDA graphs, and runs them again.

All recordings of a recorder share one memory pool: what one holds between its forward and its backward, the
next overwrites, so that the pool is as large as the largest needs. Its caller sees to it that one forward's
backward is done, or can no longer come, before another forward is run. The pool begins as one block of what
the forward keeps: of blocks as small as the tensors of one length, a longer one could use none.

PyTorch's random numbers are others at each run: a graph reads the generator's state and moves it on, as a run
of the program would.

Kept beside the graphs: the inputs that are copied in, the results, and one buffer a dtype that every
recording writes its gradients to, made where the first recording's activations lay. Weights are neither
copied nor kept alive; graphs hold their addresses.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, _foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
from torch._utils import _unflatten_dense_tensors

from rewriter.replay.lending import Lender


class Unrecordable(Exception):
    """Why a program cannot be recorded."""


class NoRoom(Unrecordable):
    """Why a program's recording would take too much memory."""


@dataclass(frozen=True)
class _Part:
    """The gradients of one dtype: the leaves they belong to, tensors of their shapes, and where they go."""

    members: tuple[int, ...]
    shapes: tuple[Tensor, ...]
    buffer: Tensor


class CudaRecording:
    """One program at one size of its inputs.

    Attributes:
        outputs: what ``forward`` leaves there, without history; the next run of any recording overwrites it.
        seeds: where the caller puts the gradients of the results ``seeded`` before ``backward``.
    """

    def __init__(
        self,
        recorder: "CudaRecorder",
        program: Callable,
        inputs: list[Any],
        trainable: Sequence[int],
        check: Callable[[int], None],
    ):
        leaves = [inputs[i].detach().requires_grad_() for i in trainable]
        inputs = list(inputs)
        for i, leaf in zip(trainable, leaves, strict=True):
            inputs[i] = leaf
        with torch.enable_grad():
            self.seeded, kept = _warm_up(program, inputs, leaves, recorder.device)
            check(kept)
            self._count, self._lender = len(leaves), recorder.lender
            self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with recorder.recording(self._forward):
                recorder.enlarge_pool(kept)
                results = tuple(program(*inputs))
            _refuse_aliases(results, inputs)
            self.seeds = [torch.zeros_like(results[i]) for i in self.seeded]
            with recorder.recording(self._backward):
                found = torch.autograd.grad(
                    [results[i] for i in self.seeded], leaves, self.seeds, allow_unused=True
                )
                self._parts = _parts(found, recorder)
                self._store(found)
        self.differentiable = tuple(isinstance(r, Tensor) and r.requires_grad for r in results)
        self.outputs = tuple(r.detach() if isinstance(r, Tensor) else r for r in results)

    def _store(self, found: Sequence[Any]) -> None:
        for part in self._parts:
            views = _unflatten_dense_tensors(part.buffer, part.shapes)
            _foreach_copy_(list(views), [found[i] for i in part.members])

    def forward(self) -> None:
        """Compute ``outputs`` from the inputs that it was recorded with."""
        self._forward.replay()

    def backward(self) -> list[Tensor | None]:
        """The gradients of the trainable inputs, from ``seeds``.

        The caller may change them. While he keeps them, ``CudaRecorder.reclaim`` is false: nothing may run.
        """
        self._backward.replay()
        found: list[Tensor | None] = [None] * self._count
        for part in self._parts:
            for i, gradient in zip(part.members, self._lender.give(part.buffer, part.shapes), strict=True):
                found[i] = gradient
        return found


def _warm_up(
    program: Callable, inputs: list[Any], leaves: list[Tensor], device: torch.device
) -> tuple[tuple[int, ...], int]:
    """Run once, so that kernels are compiled and loaded, and plans made, before anything is recorded.

    Returns:
        the results whose gradients the backward starts from, and the bytes that the forward leaves.
    """
    before = torch.cuda.memory_allocated(device)
    results = tuple(program(*inputs))
    kept = torch.cuda.memory_allocated(device) - before
    if not all(isinstance(r, (Tensor, type(None))) for r in results):
        raise Unrecordable("it returns something else than tensors")
    seeded = [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.requires_grad]
    # A loss, where there is one: a model's other results are seldom trained through.
    seeded = [i for i in seeded if results[i].dim() == 0] or seeded
    if not seeded:
        raise Unrecordable("no result needs a gradient")
    ends = [results[i] for i in seeded]
    torch.autograd.grad(ends, leaves, [torch.ones_like(r) for r in ends], allow_unused=True)
    return tuple(seeded), kept


def _parts(gradients: Sequence[Tensor | None], recorder: "CudaRecorder") -> list[_Part]:
    members: dict[torch.dtype, dict[int, Tensor]] = {}
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            members.setdefault(gradient.dtype, {})[i] = gradient
    return [
        _Part(
            tuple(found),
            tuple(torch.empty(g.shape, device="meta") for g in found.values()),
            recorder.buffer(dtype, sum(g.numel() for g in found.values())),
        )
        for dtype, found in members.items()
    ]


def _refuse_aliases(results: Sequence[Any], inputs: Sequence[Any]) -> None:
    held = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    if any(isinstance(r, Tensor) and r.untyped_storage().data_ptr() in held for r in results):
        raise Unrecordable("it returns an input, or a view of one")


class CudaRecorder:
    """Makes recordings that share a memory pool, a stream to record on and the buffers of gradients.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.lender = Lender()
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._pool_bytes = 0
        self._home = torch.cuda.current_stream(device)

    def record(
        self,
        program: Callable,
        inputs: list[Any],
        trainable: Sequence[int],
        check: Callable[[int], None] = lambda kept: None,
    ) -> CudaRecording:
        """Run ``program`` twice and record the second run. Random numbers go on as if it had not run.

        Args:
            check: told, before anything is recorded, the bytes that a forward keeps; may raise ``NoRoom``.

        Raises:
            Unrecordable: its results are of a kind that cannot be given again.
        """
        state = torch.cuda.get_rng_state(self.device)
        try:
            return CudaRecording(self, program, inputs, trainable, check)
        finally:
            torch.cuda.set_rng_state(state, self.device)

    def ready(self) -> bool:
        """Whether a recording may be made or run where the caller stands."""
        return (
            not torch.cuda.is_current_stream_capturing()
            and torch.cuda.current_stream(self.device) == self._home
        )

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        """Whether a recording may write its gradients, since nobody holds those that the last one gave.

        Gradients of ``parameters`` that stand in the way are replaced by copies.
        """
        return self.lender.reclaim(parameters)

    def bytes(self) -> int:
        """Device memory that the recordings hold."""
        return self._pool_bytes

    def room(self) -> int:
        """Device memory that is not taken, with what the recordings hold."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def forget(self) -> None:
        """To be called when no recording is left: their memory goes back to the device."""
        # A pool that no graph uses any more cannot be recorded into again.
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0
        self._buffers.clear()
        self.lender.forget()

    def buffer(self, dtype: torch.dtype, size: int) -> Tensor:
        """A vector for gradients, the same for all recordings that want one of that size.

        Made while the first of them is recorded, at its backward's end, when its activations are gone.
        """
        if (dtype, size) not in self._buffers:
            self._buffers[dtype, size] = torch.empty(size, dtype=dtype, device=self.device)
        return self._buffers[dtype, size]

    def enlarge_pool(self, size: int) -> None:
        """Within ``recording``: make one block of what the pool lacks of ``size`` bytes."""
        torch.empty(max(0, size - self._pool_bytes), dtype=torch.uint8, device=self.device)

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        collects = gc.isenabled()
        # A collection in between could free what must not be freed while a graph is being recorded.
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        self._pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
