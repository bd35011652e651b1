"""Traces as on a GPU where there is none: CPU tensors without memory are taken for tensors of a GPU.

Under ``LikeGpu`` a tensor says that it is on CUDA, so that the functions of ``kernels/`` call their ops; and
attention becomes the op that PyTorch calls there; a build without CUDA writes it out, with an S×S tensor.
Fake tensors of device "cuda" would do the same, but such a build aborts when autograd meets one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_FLASH_HEAD_DIM = 256
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_ASKS = type(_IS_CUDA)


class LikeGpu(TorchFunctionMode):
    """Within it, tensors are as on CUDA, as far as the rewriter's graphs can tell. For fake tensors alone."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if type(func) is _ASKS and func == _IS_CUDA:
            return True
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.autograd.grad:
            # A mode is off in what it calls, and a backward calls the rewriter's functions.
            with self:
                return _grad(*args, **kwargs)
        return func(*args, **kwargs)


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any, *, allow_unused: bool = False, **_: Any
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, which leaves the mode on."""
    return _engine_run_backward(
        tuple(outputs), tuple(grad_outputs), False, False, tuple(inputs), allow_unused, accumulate_grad=False
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What CUDA's dispatch comes to: flash where it can, else the memory-efficient kernel."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    flash = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1] <= _FLASH_HEAD_DIM
    if flash and attn_mask is None:
        op = _aten._scaled_dot_product_flash_attention
        return op(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    op = _aten._scaled_dot_product_efficient_attention
    return op(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
