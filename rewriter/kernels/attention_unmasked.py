"""Attention under a causal mask or none: PyTorch's own kernels, K and V repeated only where they must be.

By PyTorch's dispatch rules, cuDNN's and flash kernels on CUDA read grouped K and V by index; both want 16
bits, flash also one head dimension of at most 256. The memory-efficient kernel, which takes the rest, wants
repeated heads in these releases, and without it the math path makes S×S tensors: there, repeating is the
cheaper. The CPU's flash kernel takes groups in every dtype (seen in 2.13). Where a graph's lengths are
symbols the kernel is chosen when it runs, by the length: see ``attention_by_length``.
"""

import torch
import torch.nn.functional as F

from .attention_by_length import attention_by_length

FLASH_HEAD_DIM = 256


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """Every query sees the keys up to its own.

    Args:
        q: (batch, heads, tokens, dim); k, v: (batch, kv_heads, tokens, dim), of as many tokens.
        scale: factor of the logits; ``None`` is ``dim ** -0.5``.
        dropout: probability of dropping an attention weight.

    Returns:
        (batch, heads, tokens, dim) in q's dtype. Sums are fp32, and what is saved for the backward grows with
        the tokens alone, wherever one of PyTorch's fused kernels takes the operands.
    """
    return _unmasked(q, k, v, scale, dropout, causal=True)


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """As ``causal_attention``, every query seeing every key; the keys may be of another number."""
    return _unmasked(q, k, v, scale, dropout, causal=False)


def _unmasked(q, k, v, scale: float | None, dropout: float, *, causal: bool) -> torch.Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    if q.is_cuda and dropout == 0.0 and _lengths_vary(q, k) and _flash_takes(q, v) and q.shape[-1] % 8 == 0:
        q, k, v = (x.to(_dtype(x)) for x in (q, k, v))
        return attention_by_length(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal)
    if grouped and q.is_cuda and not _flash_takes(q, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _lengths_vary(*tensors: torch.Tensor) -> bool:
    """Whether a graph is being traced for more than one length."""
    return any(isinstance(size, torch.SymInt) for x in tensors for size in x.shape[:3])


def _flash_takes(q: torch.Tensor, v: torch.Tensor) -> bool:
    is_16_bit = _dtype(q) in (torch.bfloat16, torch.float16)
    return is_16_bit and q.shape[-1] == v.shape[-1] <= FLASH_HEAD_DIM


def _dtype(x: torch.Tensor) -> torch.dtype:
    """What eager's attention computes in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
