"""Records a program's forward and backward as two CUDA graphs, and runs them again.

All recordings of a recorder share one memory pool: what one holds between its forward and its backward, the
next overwrites, so that the pool is as large as the largest needs. Its caller sees to it that one forward's
backward is done, or can no longer come, before another forward is run.

Kept beside the graphs: the inputs that are copied in, the results, and one buffer a dtype that every
recording writes its gradients to. Weights are neither copied nor kept alive; graphs hold their addresses.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, _foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
from torch._utils import _unflatten_dense_tensors


class Unrecordable(Exception):
    """Why a program cannot be recorded."""


@dataclass
class Gradients:
    """Where the backward leaves the gradients of ``leaves``: a dense buffer for those of each dtype."""

    buffers: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def reserve(self, leaves: Sequence[Tensor]) -> None:
        sizes: dict[torch.dtype, int] = {}
        for leaf in leaves:
            sizes[leaf.dtype] = sizes.get(leaf.dtype, 0) + leaf.numel()
        for dtype, size in sizes.items():
            if dtype not in self.buffers or self.buffers[dtype].numel() < size:
                self.buffers[dtype] = torch.empty(size, dtype=dtype, device=leaves[0].device)

    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


@dataclass(frozen=True)
class Part:
    """The gradients of one dtype: which leaves they belong to, and their shapes as empty tensors say."""

    dtype: torch.dtype
    members: tuple[int, ...]
    shapes: tuple[Tensor, ...]
    size: int


class CudaRecording:
    """One program at one size of its inputs.

    Attributes:
        outputs: what ``forward`` leaves there, without history; the next run of any recording overwrites it.
        seeds: where the caller puts the gradients of the results ``seeded`` before ``backward``.
    """

    def __init__(
        self, recorder: "CudaRecorder", program: Callable, inputs: list[Any], trainable: Sequence[int]
    ):
        self._gradients = recorder.gradients
        leaves = [inputs[i].detach().requires_grad_() for i in trainable]
        inputs = list(inputs)
        for i, leaf in zip(trainable, leaves, strict=True):
            inputs[i] = leaf
        with torch.enable_grad():
            self.seeded, needed = _warm_up(program, inputs, leaves)
            self._parts = _parts(leaves, needed)
            self._count = len(leaves)
            recorder.gradients.reserve([leaf for leaf, n in zip(leaves, needed, strict=True) if n])
            self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with recorder.recording(self._forward):
                results = tuple(program(*inputs))
            _refuse_aliases(results, inputs)
            self.seeds = [torch.zeros_like(results[i]) for i in self.seeded]
            with recorder.recording(self._backward):
                found = torch.autograd.grad(
                    [results[i] for i in self.seeded], leaves, self.seeds, allow_unused=True
                )
                self._store(found)
        self.differentiable = tuple(isinstance(r, Tensor) and r.requires_grad for r in results)
        self.outputs = tuple(r.detach() if isinstance(r, Tensor) else r for r in results)

    def _store(self, found: Sequence[Any]) -> None:
        for part in self._parts:
            views = _unflatten_dense_tensors(self._gradients.buffers[part.dtype][: part.size], part.shapes)
            _foreach_copy_(list(views), [found[i] for i in part.members])

    def forward(self) -> None:
        """Compute ``outputs`` from the inputs that it was recorded with."""
        self._forward.replay()

    def backward(self) -> list[Tensor | None]:
        """The gradients of the trainable inputs, from ``seeds``; the caller may keep and change them."""
        self._backward.replay()
        found: list[Tensor | None] = [None] * self._count
        for part in self._parts:
            # A copy: autograd keeps what it is given as a parameter's gradient and adds to it in place.
            own = self._gradients.buffers[part.dtype][: part.size].clone()
            for i, gradient in zip(part.members, _unflatten_dense_tensors(own, part.shapes), strict=True):
                found[i] = gradient
        return found


def _warm_up(
    program: Callable, inputs: list[Any], leaves: list[Tensor]
) -> tuple[tuple[int, ...], list[bool]]:
    """Run once, so that kernels are compiled and loaded, and plans made, before anything is recorded.

    Returns:
        the results whose gradients the backward starts from, and whether each leaf gets a gradient.
    """
    results = tuple(program(*inputs))
    if not all(isinstance(r, (Tensor, type(None))) for r in results):
        raise Unrecordable("it returns something else than tensors")
    seeded = [i for i, r in enumerate(results) if isinstance(r, Tensor) and r.requires_grad]
    # A loss, where there is one: a model's other results are seldom trained through.
    seeded = [i for i in seeded if results[i].dim() == 0] or seeded
    if not seeded:
        raise Unrecordable("no result needs a gradient")
    ends = [results[i] for i in seeded]
    found = torch.autograd.grad(ends, leaves, [torch.ones_like(r) for r in ends], allow_unused=True)
    return tuple(seeded), [g is not None for g in found]


def _parts(leaves: Sequence[Tensor], needed: Sequence[bool]) -> list[Part]:
    members: dict[torch.dtype, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if needed[i]:
            members.setdefault(leaf.dtype, []).append(i)
    return [
        Part(
            dtype,
            tuple(found),
            tuple(torch.empty(leaves[i].shape, device="meta") for i in found),
            sum(leaves[i].numel() for i in found),
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
        self.gradients = Gradients()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._pool_bytes = 0
        self._home = torch.cuda.current_stream(device)

    def record(self, program: Callable, inputs: list[Any], trainable: Sequence[int]) -> CudaRecording:
        """Run ``program`` twice and record the second run.

        Raises:
            Unrecordable: its results are of a kind that cannot be given again.
        """
        return CudaRecording(self, program, inputs, trainable)

    def ready(self) -> bool:
        """Whether a recording may be made or run where the caller stands."""
        return (
            not torch.cuda.is_current_stream_capturing()
            and torch.cuda.current_stream(self.device) == self._home
        )

    def bytes(self) -> int:
        """Device memory that the recordings hold."""
        return self._pool_bytes + self.gradients.bytes()

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
