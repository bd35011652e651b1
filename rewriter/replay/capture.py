"""Records a program's forward and backward as two CUDA graphs, and runs them again.

All recordings of a recorder share one memory pool: what one holds between its forward and its backward, the
next overwrites, so that the pool is as large as the largest needs (``pool``). Its caller sees to it that one
forward's backward is done, or can no longer come, before another forward is run. Results and gradients lie
where the program left them, in memory that any recording may use: results are read before the backward,
gradients are lent until the next forward (``lending``).

PyTorch's random numbers are others at each run: a graph reads the generator's state and moves it on, as a run
of the program would.

Kept beside the graphs: the inputs that are copied in, and the gradients of the results. Weights are neither
copied nor kept alive; graphs hold their addresses.
"""

import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import set_multithreading_enabled

from rewriter.replay.ending import ended
from rewriter.replay.lending import Lender, Lent
from rewriter.replay.pool import ROOMS, Needs, Reading, Segments, apart, borrowed, smallest
from rewriter.replay.side_streams import listen


class Unrecordable(Exception):
    """Why a program cannot be recorded."""


class NoRoom(Unrecordable):
    """Why a program's recording would take too much memory."""


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
        leaves: list[Tensor],
        seeded: tuple[int, ...],
        size: int,
    ):
        self._count, self._lender, self.seeded = len(leaves), recorder.lender, seeded
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with recorder.recording(self._forward, size):
            results = tuple(program(*inputs))
        _refuse_aliases(results, inputs)
        self.seeds = [torch.zeros_like(results[i]) for i in seeded]
        with recorder.recording(self._backward):
            found = torch.autograd.grad([results[i] for i in seeded], leaves, self.seeds, allow_unused=True)
            # As a parameter's gradient would be: dense, and its own.
            found = [None if g is None else g.contiguous() for g in found]
        self.differentiable = tuple(isinstance(r, Tensor) and r.requires_grad for r in results)
        segments = recorder.segments()
        self.outputs = tuple(_left_there(r, segments, self._forward) for r in results)
        gradients = {i: g for i, g in enumerate(found) if g is not None}
        own = apart({i: g for i, g in gradients.items() if _lies_in(segments, g)})
        self._others = {i: g for i, g in gradients.items() if i not in own}
        self._positions = tuple(sorted(own))
        self._lent = Lent(borrowed(gradients[i], self._backward) for i in self._positions)

    def forward(self) -> None:
        """Compute ``outputs`` from the inputs that it was recorded with."""
        self._forward.replay()

    def backward(self) -> list[Tensor | None]:
        """The gradients of the trainable inputs, from ``seeds``.

        The caller may change them. While he keeps them, ``CudaRecorder.reclaim`` is false: nothing may run.
        """
        self._backward.replay()
        found: list[Tensor | None] = [None] * self._count
        for i, gradient in self._others.items():
            found[i] = gradient.clone()
        for i, gradient in zip(self._positions, self._lender.give(self._lent), strict=True):
            found[i] = gradient
        return found


def _left_there(result: Any, segments: Segments, graph: torch.cuda.CUDAGraph) -> Any:
    """``result`` without history; memory of the pool stays free for other recordings."""
    if _lies_in(segments, result):
        return borrowed(result, graph)
    return result.detach() if isinstance(result, Tensor) else result


def _lies_in(segments: Segments, value: Any) -> bool:
    """Whether a tensor's memory is the pool's and can be borrowed; other memory has an owner."""
    return isinstance(value, Tensor) and value.numel() > 0 and segments.hold(value)


def _warm_up(
    program: Callable, inputs: list[Any], leaves: list[Tensor], device: torch.device
) -> tuple[tuple[int, ...], Needs]:
    """Run once, so that kernels are compiled and loaded, and plans made, before anything is recorded.

    Returns:
        the results whose gradients the backward starts from, and what the forward needs.
    """
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = Reading.now(device)
    results = tuple(program(*inputs))
    after = Reading.now(device)
    needs = after.needs_since(before)
    if not all(isinstance(r, (Tensor, type(None))) for r in results):
        raise Unrecordable("it returns something else than tensors")
    seeded = [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.requires_grad]
    # A loss, where there is one: a model's other results are seldom trained through.
    seeded = [i for i in seeded if results[i].dim() == 0] or seeded
    if not seeded:
        raise Unrecordable("no result needs a gradient")
    ends = [results[i] for i in seeded]
    torch.autograd.grad(ends, leaves, [torch.ones_like(r) for r in ends], allow_unused=True)
    return tuple(seeded), needs


# Collections go on or off for all threads: who records meanwhile must not have another switch them on.
_collections = threading.Lock()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected within, for one thread at a time.

    A collection could free what must not be freed while a graph is being recorded.
    """
    with _collections:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def _refuse_aliases(results: Sequence[Any], inputs: Sequence[Any]) -> None:
    held = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    if any(isinstance(r, Tensor) and r.untyped_storage().data_ptr() in held for r in results):
        raise Unrecordable("it returns an input, or a view of one")


class CudaRecorder:
    """Makes recordings that share a memory pool and a stream to record on.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.lender = Lender()
        listen(self.lender)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._pool_bytes = 0
        self._is_empty = True
        self._has_workspace = False
        self._home = torch.cuda.current_stream(device)

    def record(
        self,
        program: Callable,
        inputs: list[Any],
        trainable: Sequence[int],
        check: Callable[[int], None] = lambda kept: None,
    ) -> CudaRecording:
        """Run ``program``, then record it; the first, some times, until its pool is small (``pool.ROOMS``).

        Random numbers go on as if it had not run.

        Args:
            check: told, before anything is recorded, the bytes that a forward keeps; may raise ``NoRoom``.

        Raises:
            Unrecordable: its results are of a kind that cannot be given again.
        """
        self._make_workspace()
        state = torch.cuda.get_rng_state(self.device)
        leaves = {i: inputs[i].detach().requires_grad_() for i in trainable}
        inputs = [leaves.get(i, given) for i, given in enumerate(inputs)]
        trained = list(leaves.values())
        try:
            # cuBLAS has a workspace a thread and stream: one thread needs one.
            with torch.enable_grad(), set_multithreading_enabled(False):
                seeded, needs = _warm_up(program, inputs, trained, self.device)
                check(needs.kept)

                def record(size: int) -> CudaRecording:
                    return CudaRecording(self, program, inputs, trained, seeded, size)

                recording = self._smallest(record, needs) if self._is_empty else record(needs.size(ROOMS[0]))
                self._is_empty = False
                return recording
        finally:
            torch.cuda.set_rng_state(state, self.device)

    def _smallest(self, record: Callable[[int], CudaRecording], needs: Needs) -> CudaRecording:
        """The recording with the smallest pool, of some with more and more room for transients."""
        made: dict[int, CudaRecording] = {}

        def pool_of(size: int) -> int:
            made.clear()
            self.forget()
            made[size] = record(size)
            return self.segments().large

        best = smallest(needs, pool_of)
        if best not in made:
            pool_of(best)
        return made[best]

    def ready(self) -> bool:
        """Whether a recording may be made or run where the caller stands."""
        return (
            not torch.cuda.is_current_stream_capturing()
            and torch.cuda.current_stream(self.device) == self._home
        )

    def reclaim(self, parameters: Iterable[Tensor]) -> bool:
        """Whether a recording may write its gradients, since nobody holds those that the last one gave.

        Gradients of ``parameters`` that stand in the way are replaced by copies. What follows on the device
        waits for the streams that were said to use gradients.
        """
        if not self.lender.reclaim(parameters):
            return False
        self._wait_for_users()
        return True

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
        self._is_empty = True
        self.lender.forget()
        # What they read is in memory that others may have now.
        self._wait_for_users()

    def segments(self) -> Segments:
        """What the allocator has for the recordings."""
        return Segments.of(self._pool, self.device)

    def _wait_for_users(self) -> None:
        for used in self.lender.take_streams():
            stream = torch.cuda.Stream(
                stream_id=used.stream_id, device_index=used.device_index, device_type=used.device_type
            )
            self._home.wait_stream(stream)

    def _make_workspace(self) -> None:
        """What cuBLAS keeps of a stream's first product on: in the pool, it would hold a block for good."""
        if self._has_workspace:
            return
        with torch.cuda.stream(self._stream):
            square = torch.ones(16, 16, device=self.device)
            torch.mm(square, square)
        self._has_workspace = True

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph, size: int = 0) -> Iterator[None]:
        """Record what is run within, after the pool was made to hold ``size`` bytes of large tensors."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        lacking = self.segments().lacking(size)
        with uncollected(), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            with ended(graph, self._pool, self.device):
                _ = [torch.empty(n, dtype=torch.uint8, device=self.device) for n in lacking]
                del _
                yield
        self._pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
