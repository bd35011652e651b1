"""Attention without a mask tensor where lengths vary: flash for short sequences, cuDNN for long ones.

PyTorch prefers cuDNN's kernels on Hopper, which are the faster, and builds an execution plan for each new
shape. In training on batches of varying length nearly each step brings one, and at a few hundred tokens
building the plan takes many times as long as the attention. A compiled graph with a symbolic length cannot
choose between the two; this op does, when it runs, by the length.

Both kernels accumulate in fp32, read grouped K and V by index, and are exact to rounding. Saved for the
backward: q, k, v, the result and the log-sum-exp, (batch, heads, tokens) in fp32. Takes 16-bit tensors on
CUDA, heads of a multiple of 8 up to 256, without dropout.
"""

import torch
from torch import Tensor

from .attention_key_blocks import cudnn_backward
from .registration import define, differentiate

# Beyond it the attention itself is worth a plan: its time grows with the square of the length.
LONGEST_FLASH = 4096

_aten = torch.ops.aten


def attention_by_length(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Softmax(scale · q kᵀ) v, each query seeing the keys up to its own if ``causal``, else all.

    Args:
        q: (batch, heads, tokens, dim); k, v: (batch, kv_heads, keys, dim), all of one 16-bit dtype.

    Returns:
        (batch, heads, tokens, dim), a dense (batch, tokens, heads, dim) in memory.
    """
    return torch.ops.rewriter.attention_by_length(q, k, v, scale, causal)[0]


def _is_short(q: Tensor, k: Tensor) -> bool:
    return max(q.shape[2], k.shape[2]) <= LONGEST_FLASH


def _by_token(x: Tensor) -> Tensor:
    """(batch, heads, tokens, dim) as a view of a dense (batch, tokens, heads, dim)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if _is_short(q, k):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
    return _by_token(out), lse.reshape(q.shape[:3])


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def _backward_kernel(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, lengths = _by_token(grad), (q.shape[2], k.shape[2])
    # Without dropout no random state is read.
    unused = torch.empty(2, dtype=torch.int64, device=q.device)
    if _is_short(q, k):
        grads = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    else:
        states = unused[0], unused[1], None, None, None
        grads = cudnn_backward(
            grad, q, k, v, out, lse.unsqueeze(-1), *states, *lengths, 0.0, causal, scale=scale
        )
    dq, dk, dv = map(_by_token, grads)
    return dq, dk, dv


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


_op = define(
    "attention_by_length(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    launches=False,
)
_backward_op = define(
    "attention_by_length_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    launches=False,
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, grad, _):
    return *_backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


differentiate(_op, _backward, _setup_context)
