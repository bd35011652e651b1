"""A torch-level graph to the same graph in fp64: what its results would be without rounding.

Casts to a narrower float become casts to fp64, in the bodies of checkpoints and of custom autograd functions
too; autocast is off; dropout drops what it drops in the graph's own dtypes; and the ops of bitsandbytes,
which refuse fp64, get fp32, or, where they multiply, become a product with the dequantised weight. The graph
is changed, rather than its casts caught while it runs, since backwards run on other threads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from rewriter.canonical import dtype_of
from rewriter.kernels.dequantize import Packed4bit, dequantize_4bit_reference
from rewriter.nested import duplicate
from rewriter.opaque_linear import linear_4bit

WIDENED = torch.float64
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_CASTS = ("float", "half", "bfloat16")


@contextmanager
def without_narrow_floats() -> Iterator[None]:
    """Outside autocast, with fp64 for what is made without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(WIDENED)
    try:
        with ExitStack() as off:
            for device in ("cpu", "cuda"):
                off.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)


def widened(module: GraphModule) -> GraphModule:
    """A copy of ``module`` that computes in fp64, given fp64 for every floating input."""
    wide = duplicate(module, whole=True)
    for part in wide.modules():
        if isinstance(part, GraphModule):
            _widen(part)
    return wide


def _widen(module: GraphModule) -> None:
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if value.is_floating_point():
            delattr(module, name)
            module.register_buffer(name, value.detach().to(WIDENED))
    for node in module.graph.nodes:
        if node.op == "call_method":
            node.target = "double" if node.target in _CASTS else node.target
        elif node.op == "call_function" and (replacement := _replacement(node)) is not None:
            node.target = replacement
            continue
        node.args, node.kwargs = map_aggregate((node.args, dict(node.kwargs)), _wide_dtype)
    module.recompile()


def _wide_dtype(argument: Any) -> Any:
    return WIDENED if isinstance(argument, torch.dtype) and argument in _NARROW else argument


def _replacement(node: Node) -> Any:
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if name == "_enter_autocast":
        node.args = (*node.args[:2], False, *node.args[3:])
        return target
    if target is F.dropout:
        node.kwargs = {**node.kwargs, "dtype": dtype_of(node) or torch.float32}
        return _dropout
    if target is linear_4bit:
        return _gemm_4bit
    namespace = getattr(target, "namespace", "") or str(target).partition(".")[0]
    if namespace != "bitsandbytes":
        return None
    if name.partition(".")[0] == "gemm_4bit":
        return _gemm_4bit
    node.args = (target, *node.args)
    return _in_fp32


def _dropout(x, p=0.5, training=True, inplace=False, *, dtype: torch.dtype) -> Tensor:
    """Drops the elements that dropout of ``dtype`` drops: the numbers drawn depend on the dtype."""
    if not training or p == 0.0:
        return x
    kept = F.dropout(torch.ones_like(x, dtype=dtype), p) != 0
    scaled = x * kept / (1.0 - p) if p < 1.0 else x * 0.0
    return x.copy_(scaled) if inplace else scaled


def _gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None,
               absmax_offset=None, dtype=None):  # fmt: skip
    scales = _fp32(absmax), blocksize, quant_type, absmax_8bit, _fp32(absmax_code), _fp32(absmax_offset)
    weight = dequantize_4bit_reference(Packed4bit(B, tuple(shapeB), *scales), torch.float32)
    return F.linear(A, weight.to(WIDENED), bias)


def _in_fp32(op: Callable, *args: Any, **kwargs: Any) -> Any:
    result = op(*map(_fp32, args), **{k: _fp32(v) for k, v in kwargs.items()})
    wide = isinstance(result, Tensor) and result.is_floating_point()
    return result.to(WIDENED) if wide else result


def _fp32(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype == WIDENED else value
