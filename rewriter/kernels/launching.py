"""Compiles the Triton kernels that a call of an op would launch, without launching any and without a GPU.

The op's own kernel function is run on tensors without memory that say they are on the GPU in question, so
that it chooses tiles, strides and constants as it would there. Where it launches, Triton compiles for that
GPU instead, into its cache on disk; in Triton 3.6 also the C function that launches, by a C compiler, which
takes as long as the kernel. For a process in which nothing else runs: what asks for the GPU is replaced.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class Shape(NamedTuple):
    """What a launch depends on of a tensor, whose memory is taken to begin at a multiple of 16 bytes."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Gpu(NamedTuple):
    """What a launch depends on of a GPU, by the names of PyTorch's own record of it."""

    major: int
    minor: int
    warp_size: int
    multi_processor_count: int
    shared_memory_per_block_optin: int

    @property
    def architecture(self) -> int:
        return 10 * self.major + self.minor


class Ptxas(NamedTuple):
    """NVIDIA's assembler: the program, and what it says of itself, a part of the keys of Triton's cache."""

    path: str
    version: str

    @classmethod
    def of_this_process(cls, gpu: Gpu) -> "Ptxas":
        """The one that a launch in this process would use; asked once, as by the launch."""
        from triton.backends.nvidia import compiler

        return cls(compiler.get_ptxas(gpu.architecture).path, compiler.get_ptxas_version(gpu.architecture))


def compile_launches(
    kernel: Callable, calls: Sequence[tuple], gpu: Gpu, ptxas: Ptxas, environment: Mapping[str, str]
) -> None:
    """Compile what ``kernel``, which an op was defined with, launches in each of ``calls``.

    Args:
        calls: arguments, with a ``Shape`` for each tensor.
        ptxas: of the process that launches. Inductor's processes have another where PyTorch brings its own.
        environment: where Triton's cache is, for this process from now on.
    """
    os.environ.update(environment)
    with _compiling_for(gpu, ptxas), _AsOnGpu():
        for arguments in calls:
            kernel(*tree_map_only(Shape, _tensor, arguments, is_leaf=lambda x: isinstance(x, Shape)))


def _tensor(shape: Shape) -> Tensor:
    return torch.empty_strided(shape.sizes, shape.strides, dtype=shape.dtype, device="meta")


@contextmanager
def _compiling_for(gpu: Gpu, ptxas: Ptxas) -> Iterator[None]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.backends.nvidia import driver as nvidia
    from triton.knobs import NvidiaTool
    from triton.runtime.jit import JITFunction, MockTensor

    run: Any = JITFunction.run
    target = GPUTarget("cuda", gpu.architecture, gpu.warp_size)
    tool = NvidiaTool.from_path(ptxas.path)
    driver: Any = triton.runtime.driver

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = [MockTensor(x.dtype) if isinstance(x, Tensor) else x for x in arguments]
        done = run(self, *given, grid=grid, warmup=True, **options)
        if hasattr(nvidia, "make_launcher"):
            nvidia.CudaLauncher(done.src, done.metadata)

    absent = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    with (
        patch.object(JITFunction, "run", compiled),
        patch.object(compiler, "get_ptxas", lambda arch: tool),
        patch.object(compiler, "get_ptxas_version", lambda arch: ptxas.version),
        patch.object(torch.cuda, "get_device_properties", lambda device=None: gpu),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        driver.set_active(absent)
        try:
            yield
        finally:
            driver.set_active(None)


_DEVICE = torch.device("cuda", 0)
_ANSWERS = (
    (Tensor.device.__get__, _DEVICE),  # type: ignore[attr-defined]
    (Tensor.is_cuda.__get__, True),  # type: ignore[attr-defined]
    (Tensor.is_meta.__get__, False),  # type: ignore[attr-defined]
    (Tensor.data_ptr, 0),
)


class _AsOnGpu(TorchFunctionMode):
    """Within it, tensors are without memory, and say that they are on a GPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for question, answer in _ANSWERS:
            if type(func) is type(question) and func == question:
                return answer
        return func(*_without_memory(args), **_without_memory(kwargs or {}))


def _without_memory(arguments: Any) -> Any:
    return tree_map_only(torch.device, lambda _: torch.device("meta"), arguments)
