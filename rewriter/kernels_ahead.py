"""A traced graph to jobs for Inductor's processes, which compile our Triton kernels before they are launched.

Triton compiles a kernel when it is first launched, so that a first step would wait for ours one after the
other, thirteen of a model with 4-bit weights and adapters. What a graph will launch is known when it is
traced, and Inductor still works on it for a while. A kernel that is launched before its job has ended is
compiled as ever, and so are those that no job foresaw: nothing is ever waited for.

Left out: calls with sizes that nobody knows yet, and Triton for other devices than CUDA's.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter.kernels.launching import Gpu, Ptxas, Shape, compile_launches
from rewriter.kernels.registration import launchers

log = logging.getLogger(__name__)


def start_processes() -> None:
    """Have Inductor's processes ready when they are needed; their start takes seconds, and none of ours."""
    # Else nothing is compiled for a GPU yet, and to ask for one would set it up.
    if torch.cuda.is_initialized():
        from torch._inductor.async_compile import maybe_warm_pool

        try:
            maybe_warm_pool()
        except Exception as error:
            # Inductor starts them again, and says so, when it needs them.
            log.warning("Inductor's processes do not start ahead: %s", error)


class KernelsAhead:
    """The jobs of this process: each call of an op is looked at once."""

    def __init__(self) -> None:
        self._seen: set[tuple] = set()

    def compile(self, graph: Graph) -> None:
        """Let what ``graph``, of ATen's and our ops with fake values (``"val"``), launches be compiled."""
        calls = [call for node in graph.nodes if (call := _call(node)) is not None]
        if not calls or not torch.version.cuda:
            return
        try:
            self._submit(calls)
        except Exception as error:
            # A graph is none the worse for it.
            log.warning("kernels are compiled when they are launched, the pool takes no jobs: %s", error)

    def _submit(self, calls: list[tuple[Callable, torch.device, tuple]]) -> None:
        from torch._inductor.async_compile import AsyncCompile

        if not AsyncCompile.use_process_pool():
            return
        jobs: dict[tuple[Callable, torch.device], list[tuple]] = {}
        for kernel, device, arguments in calls:
            if (kernel, device, arguments) not in self._seen:
                self._seen.add((kernel, device, arguments))
                jobs.setdefault((kernel, device), []).append(arguments)
        for (kernel, device), given in jobs.items():
            job = AsyncCompile.process_pool().submit(compile_launches, kernel, given, *_target(device))
            job.add_done_callback(_warn_of(kernel))


def _target(device: torch.device) -> tuple[Gpu, Ptxas, dict[str, str]]:
    """The GPU, what assembles for it here, and the environment that says where the result is looked for."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    properties = torch.cuda.get_device_properties(device)
    gpu = Gpu(*(getattr(properties, name) for name in Gpu._fields))
    # Where Inductor lets Triton's cache be; here, too, but only once it compiles in this process itself.
    folder = os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))
    return gpu, Ptxas.of_this_process(gpu), {"TRITON_CACHE_DIR": folder}


def _warn_of(kernel: Callable) -> Callable[[Future], None]:
    def warn(job: Future) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            log.warning("%s is compiled when it is launched: %s", kernel.__module__, error)

    return warn


def _call(node: Node) -> tuple[Callable, torch.device, tuple] | None:
    """What runs for ``node`` and what it is given; None where that launches nothing, or is not known."""
    op, args, kwargs = node.target, node.args, node.kwargs
    if op is torch.ops.higher_order.auto_functionalized:
        op, args = args[0], ()
    kernel = launchers.get(op)  # type: ignore[arg-type]
    if kernel is None:
        return None
    given = [
        args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(op._schema.arguments)  # type: ignore[union-attr]
    ]
    values = map_arg(tuple(given), lambda n: n.meta.get("val"))
    device = next((x.device for x in values if isinstance(x, Tensor) and x.is_cuda), None)
    try:
        return None if device is None else (kernel, device, _described(values))
    except _Unknown:
        return None


class _Unknown(Exception):
    """A size that data decides."""


def _described(value: Any) -> Any:
    """``value`` without tensors and symbols, of which the numbers of this batch are taken."""
    if isinstance(value, Tensor):
        return Shape(_described(tuple(value.shape)), _described(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if not value.node.has_hint():
            raise _Unknown
        return value.node.hint
    return value
